// nm_act::e4m3_product: the product of a dense e4m3 operand with a scale a token and a weight with one an output.
#include <ATen/ops/_scaled_mm.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "kernels/matmul/config.h"
#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

at::Tensor e4m3_product(const at::Tensor& values, const at::Tensor& row_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& bias, const char* op) {
  const int64_t tokens = values.size(0), out_features = weight.size(0);
  if (tokens > kOneScaleTokens) {
    return at::_scaled_mm(values, weight.t(), row_scale.unsqueeze(1), weight_scale.unsqueeze(0),
                          bias.defined() ? OptionalTensor(bias) : std::nullopt, std::nullopt, at::kBFloat16, true);
  }
  const float* address = nullptr;
  check_status(device_one(&address), op);
  const at::Tensor one = at::from_blob(const_cast<float*>(address), {1}, weight_scale.options());
  const at::Tensor y = at::_scaled_mm(values, weight.t(), one, one, std::nullopt, std::nullopt, at::kBFloat16, true);
  const at::Tensor bias_vector = bias.defined() ? aligned(bias) : bias;
  check_status(launch_scale_product(
                   {y.mutable_data_ptr(), row_scale.const_data_ptr<float>(), weight_scale.const_data_ptr<float>(),
                    bias.defined() ? bias_vector.const_data_ptr() : nullptr, tokens, int(out_features)},
                   current_stream(y)),
               op);
  return y;
}

namespace {

at::Tensor checked_product(const at::Tensor& values, const at::Tensor& row_scale, const at::Tensor& weight,
                           const at::Tensor& weight_scale, const OptionalTensor& bias) {
  constexpr const char* kOp = "e4m3_product";
  const auto is_e4m3 = [](const at::Tensor& tensor) {
    return tensor.dim() == 2 && tensor.scalar_type() == at::kFloat8_e4m3fn && tensor.is_contiguous();
  };
  TORCH_CHECK_VALUE(is_e4m3(values) && is_e4m3(weight) && values.size(1) == weight.size(1) &&
                        weight.size(0) % 16 == 0 && weight.size(1) % 16 == 0,
                    "nm_act::", kOp, " expected contiguous values [tokens, in_features] and weight [out_features, ",
                    "in_features] in float8_e4m3fn with features divisible by 16, got ", values.sizes(), " in ",
                    dtype_text(values), " and ", weight.sizes(), " in ", dtype_text(weight),
                    "; quantise them, or use sparse_linear");
  check_same_device(values, weight, "weight", kOp);
  TORCH_CHECK_TYPE(row_scale.scalar_type() == at::kFloat && weight_scale.scalar_type() == at::kFloat, "nm_act::", kOp,
                   " expected row_scale and weight_scale in float32, got ", dtype_text(row_scale), " and ",
                   dtype_text(weight_scale), "; convert them");
  const at::Tensor rows = check_vector(row_scale, row_scale, values.size(0), "row_scale", kOp),
                   columns = check_vector(weight_scale, weight_scale, weight.size(0), "weight_scale", kOp),
                   added = bias.value_or(at::Tensor());
  check_same_device(values, row_scale, "row_scale", kOp);
  check_same_device(values, weight_scale, "weight_scale", kOp);
  if (added.defined()) {
    check_same_device(values, added, "bias", kOp);
    TORCH_CHECK_VALUE(added.dim() == 1 && added.size(0) == weight.size(0) && added.scalar_type() == at::kBFloat16,
                      "nm_act::", kOp, " expected bias of shape [", weight.size(0), "] in bfloat16, got ",
                      added.sizes(), " in ", dtype_text(added), "; convert it");
  }
  const c10::cuda::CUDAGuard guard(values.device());
  if (values.size(0) == 0 || weight.size(0) == 0) {
    return at::empty({values.size(0), weight.size(0)}, values.options().dtype(at::kBFloat16));
  }
  return e4m3_product(values, rows, weight, columns, added, kOp);
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("e4m3_product", checked_product); }

}  // namespace nm_act::cuda_ops
