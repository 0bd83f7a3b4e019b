// Argument checks shared by the operators. Each error is one sentence: what was expected, what was given, what to do.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>

#include "kernels/format/types.h"
#include "kernels/format/windows.h"

namespace nm_act {

using OptionalTensor = std::optional<at::Tensor>;

// A dtype as users of Python know it, torch.float64; printed itself, it is a word of C++, Double.
inline std::string dtype_text(at::ScalarType type) {
  std::string text = "torch.";
  return text += c10::getDtypeNames(type).first;
}

inline std::string dtype_text(const at::Tensor& tensor) { return dtype_text(tensor.scalar_type()); }

inline ElementType check_dtype(const at::Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case at::kFloat: return ElementType::kFloat32;
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "nm_act::", op, " expected x in float32, bfloat16 or float16, got ", dtype_text(x),
                       "; convert it first");
  }
}

inline void check_features(const at::Tensor& x, const char* op) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "nm_act::", op,
                    " expected x of shape [..., in_features], got a tensor without dimensions; add one");
  TORCH_CHECK_VALUE(x.size(-1) > 0, "nm_act::", op, " expected at least one feature, got x of shape ", x.sizes(),
                    "; skip the layer");
}

// Checks that 1 <= n < m, m in {2, 4, 8, 16, 32}, and that m divides in_features.
inline void check_pattern(int64_t n, int64_t m, int64_t in_features, const char* op) {
  TORCH_CHECK_VALUE(m <= kMaxGroup && is_group_size(int(m)), "nm_act::", op,
                    " expected a group size m in {2, 4, 8, 16, 32}, got ", n, ":", m, "; choose one of those");
  TORCH_CHECK_VALUE(n >= 1 && n < m, "nm_act::", op, " expected 1 <= n < m, got ", n, ":", m,
                    "; use torch.nn.functional.linear where nothing is pruned");
  TORCH_CHECK_VALUE(in_features % m == 0, "nm_act::", op, " expected in_features divisible by m, got in_features ",
                    in_features, " and pattern ", n, ":", m, "; choose a smaller group or pad the features");
}

inline std::string pattern_text(Pattern pattern) {
  const std::string text = std::to_string(pattern.keep) + ":" + std::to_string(pattern.group);
  return pattern.extra.count == 0 ? text : text + "+" + std::to_string(pattern.extra.count);
}

// The columns of 2:4+r's extra windows; none for any other pattern.
inline ExtraColumns check_extra_columns(at::IntArrayRef columns, int64_t n, int64_t m, int64_t in_features,
                                        const char* op) {
  ExtraColumns extra{};
  if (columns.empty()) return extra;
  TORCH_CHECK_VALUE(n == 2 && m == 4, "nm_act::", op, " expected extra_columns with the pattern 2:4 only, got ",
                    columns, " with ", n, ":", m, "; leave extra_columns out");
  extra.count = int(columns.size());
  for (size_t i = 0; i < columns.size() && i < 2; ++i) extra.column[i] = int(columns[i]);
  TORCH_CHECK_VALUE(columns.size() <= 2 && are_supported(extra), "nm_act::", op,
                    " expected one or two distinct extra_columns in 0 to 3, got ", columns, "; choose such columns");
  TORCH_CHECK_VALUE(in_features % kUnit == 0, "nm_act::", op, " expected in_features divisible by ", kUnit, " for 2:4+",
                    columns.size(), ", got in_features ", in_features, "; choose another pattern or pad the features");
  return extra;
}

inline void check_same_device(const at::Tensor& x, const at::Tensor& other, const char* name, const char* op) {
  TORCH_CHECK_VALUE(other.device() == x.device(), "nm_act::", op, " expected ", name, " on the device of x, ",
                    x.device(), ", got ", other.device(), "; move it there");
}

// A float32 contiguous [size] copy of an optional per-channel vector, or an undefined tensor.
inline at::Tensor check_vector(const OptionalTensor& vector, const at::Tensor& x, int64_t size, const char* name,
                               const char* op) {
  if (!vector.has_value() || !vector->defined()) return {};
  check_same_device(x, *vector, name, op);
  TORCH_CHECK_TYPE(vector->scalar_type() == at::kFloat || vector->scalar_type() == x.scalar_type(), "nm_act::", op,
                   " expected ", name, " in float32 or the dtype of x, ", dtype_text(x), ", got ", dtype_text(*vector),
                   "; convert it first");
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, "nm_act::", op, " expected ", name, " of shape [",
                    size, "], got ", vector->sizes(), "; give one value a channel");
  return vector->to(at::kFloat).contiguous();
}

inline TokenShift check_token_shift(std::string_view token_shift, bool has_shift, const char* op) {
  const bool none = token_shift == "none", mean = token_shift == "mean", median = token_shift == "median";
  TORCH_CHECK_VALUE(none || mean || median, "nm_act::", op,
                    " expected token_shift to be \"none\", \"mean\" or \"median\", got \"", token_shift,
                    "\"; choose one of those");
  TORCH_CHECK_VALUE(none || !has_shift, "nm_act::", op,
                    " expected either shift or token_shift, got both (token_shift \"", token_shift,
                    "\"); drop one of them");
  return none ? TokenShift::kNone : mean ? TokenShift::kMean : TokenShift::kMedian;
}

// Shapes and devices of a weight [out, in] and a bias [out]; the caller checks the weight's dtype.
inline void check_weight_shape(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                               const char* op) {
  check_same_device(x, weight, "weight", op);
  TORCH_CHECK_VALUE(weight.dim() == 2, "nm_act::", op, " expected weight of shape [out_features, in_features], got ",
                    weight.sizes(), "; reshape it");
  TORCH_CHECK_VALUE(weight.size(1) == x.size(-1), "nm_act::", op, " expected weight of shape [out_features, ",
                    x.size(-1), "] for x of shape ", x.sizes(), ", got ", weight.sizes(),
                    "; transpose the weight or check the layer's input");
  if (!bias.has_value() || !bias->defined()) return;
  check_same_device(x, *bias, "bias", op);
  TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "nm_act::", op, " expected bias in the dtype of x, ",
                   dtype_text(x), ", got ", dtype_text(*bias), "; convert it");
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "nm_act::", op, " expected bias of shape [",
                    weight.size(0), "], got ", bias->sizes(), "; give one value an output feature");
}

inline void check_weight(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const char* op) {
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "nm_act::", op, " expected weight in the dtype of x, ",
                   dtype_text(x), ", got ", dtype_text(weight), "; convert one of them");
  check_weight_shape(x, weight, bias, op);
}

// Checks a weight in the dtype of x, or in e4m3 or int8 with a weight_scale. Returns the scale, or an undefined tensor.
inline at::Tensor check_scaled_weight(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& weight_scale,
                                      const OptionalTensor& bias, const char* op) {
  const bool bits8 = weight.scalar_type() == at::kFloat8_e4m3fn || weight.scalar_type() == at::kChar;
  const bool scaled = weight_scale.has_value() && weight_scale->defined();
  if (!scaled) {
    TORCH_CHECK_TYPE(!bits8, "nm_act::", op, " expected weight_scale along with a weight in ", dtype_text(weight),
                     ", got none; give one scale an output channel");
    check_weight(x, weight, bias, op);
    return {};
  }
  TORCH_CHECK_TYPE(bits8, "nm_act::", op, " expected weight in float8_e4m3fn or int8 along with weight_scale, got ",
                   dtype_text(weight), "; leave weight_scale out or quantise the weight");
  check_weight_shape(x, weight, bias, op);
  TORCH_CHECK_TYPE(weight_scale->scalar_type() == at::kFloat, "nm_act::", op, " expected weight_scale in float32, got ",
                   dtype_text(*weight_scale), "; convert it first");
  return check_vector(weight_scale, x, weight.size(0), "weight_scale", op);
}

inline const float* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
}

}  // namespace nm_act
