// The operators before a sparse layer, fused with its selection on CUDA: RMSNorm and SiLU * up, then compress or prune.
#include <torch/library.h>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {
namespace {

void check_same_shape(const at::Tensor& x, const at::Tensor& other, const char* name, const char* op) {
  check_same_device(x, other, name, op);
  TORCH_CHECK_TYPE(other.scalar_type() == x.scalar_type(), "nm_act::", op, " expected ", name, " in ", dtype_text(x),
                   ", got ", dtype_text(other), "; convert it");
  TORCH_CHECK_VALUE(other.sizes() == x.sizes(), "nm_act::", op, " expected ", name, " of shape ", x.sizes(), ", got ",
                    other.sizes(), "; give them one shape");
}

// The arguments of RMSNorm after checking, aligned, and its results: the tensors that the kernel's input points to.
struct NormTensors {
  at::Tensor x, weight, residual, x_weight;
  at::Tensor hidden;  // a result must not alias an input, so without a residual it is empty
  RmsNormInput input;
};

void check_norm(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& residual,
                const OptionalTensor& x_weight, const char* op) {
  check_norm_weight(x, weight, x.size(-1), "weight", op);
  const bool add = residual.has_value() && residual->defined();
  if (add) check_same_shape(x, *residual, "residual", op);
  if (!x_weight.has_value() || !x_weight->defined()) return;
  TORCH_CHECK_VALUE(add, "nm_act::", op,
                    " expected a residual with x_weight, got none; give one of zeros or apply the norm "
                    "before");
  check_norm_weight(x, *x_weight, x.size(-1), "x_weight", op);
}

NormTensors norm_tensors(const at::Tensor& x, const at::Tensor& weight, double eps, const OptionalTensor& residual,
                         const OptionalTensor& x_weight, bool unit_offset, const Selection& selection) {
  NormTensors norm{aligned(x), aligned(weight), {}, {}, {}, {}};
  const bool add = residual.has_value() && residual->defined();
  if (add) norm.residual = aligned(*residual);
  if (x_weight.has_value() && x_weight->defined()) norm.x_weight = aligned(*x_weight);
  norm.hidden = add ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  norm.input = {norm.x.const_data_ptr(),
                add ? norm.residual.const_data_ptr() : nullptr,
                add ? norm.hidden.mutable_data_ptr() : nullptr,
                norm.weight.const_data_ptr(),
                float(eps),
                selection.tokens,
                int(selection.in_features),
                selection.type,
                unit_offset,
                norm.x_weight.defined() ? norm.x_weight.const_data_ptr() : nullptr};
  return norm;
}

struct GatedTensors {
  at::Tensor gate, up;
  SiluMulInput input;
};

GatedTensors gated_tensors(const at::Tensor& gate, const at::Tensor& up, const Selection& selection,
                           Activation activation) {
  const auto [gates, ups] = aligned_rows(gate, up);
  GatedTensors gated{gates.tensor, ups.tensor, {}};
  gated.input = {gated.gate.const_data_ptr(),
                 gated.up.const_data_ptr(),
                 gates.stride,
                 selection.tokens,
                 int(selection.in_features),
                 selection.type,
                 activation};
  return gated;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> rms_norm_compress(
    const at::Tensor& x, const at::Tensor& weight, double eps, const OptionalTensor& residual,
    const OptionalTensor& channel_scale, const OptionalTensor& shift, c10::string_view token_shift,
    bool variance_correction, std::optional<at::ScalarType> activation_dtype, bool unit_offset,
    const OptionalTensor& x_weight) {
  constexpr const char* kOp = "rms_norm_compress";
  const Selection selection = check_selection(x, 2, 4, channel_scale, shift, token_shift, kOp);
  const bool fp8 = is_e4m3(activation_dtype, x, kOp);
  check_packable(x, selection, true, fp8, kOp);
  check_norm(x, weight, residual, x_weight, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const Selection vectors = with_aligned_vectors(selection);
  auto [operand, out] = allocate_packed(x, vectors, variance_correction, fp8, gemm_device(x, kOp));
  const NormTensors norm = norm_tensors(x, weight, eps, residual, x_weight, unit_offset, selection);
  if (selection.tokens != 0) check_status(launch_rmsnorm_compress(norm.input, out, current_stream(x)), kOp);
  return std::tuple_cat(results(operand), std::make_tuple(norm.hidden));
}

PackedTensors silu_mul_compress(const at::Tensor& gate, const at::Tensor& up, const OptionalTensor& channel_scale,
                                const OptionalTensor& shift, c10::string_view token_shift, bool variance_correction,
                                std::optional<at::ScalarType> activation_dtype, c10::string_view activation) {
  constexpr const char* kOp = "silu_mul_compress";
  const Selection selection = check_selection(gate, 2, 4, channel_scale, shift, token_shift, kOp);
  const bool fp8 = is_e4m3(activation_dtype, gate, kOp);
  check_packable(gate, selection, true, fp8, kOp);
  const Activation function = activation_of(activation, kOp);
  check_same_shape(gate, up, "up", kOp);
  const c10::cuda::CUDAGuard guard(gate.device());
  const Selection vectors = with_aligned_vectors(selection);
  auto [operand, out] = allocate_packed(gate, vectors, variance_correction, fp8, gemm_device(gate, kOp));
  if (selection.tokens != 0) {
    check_status(
        launch_silu_mul_compress(gated_tensors(gate, up, selection, function).input, out, current_stream(gate)), kOp);
  }
  return results(operand);
}

// Checks for pruning fused with a producer or with the conversion to e4m3. Returns whether the values are e4m3.
bool check_prunable(const at::Tensor& x, const Selection& selection, std::optional<at::ScalarType> activation_dtype,
                    int64_t most_features, const char* op) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "nm_act::", op,
                   " expected x in bfloat16 or float16, got ", dtype_text(x), "; convert it first");
  const bool fp8 = activation_dtype.has_value() && *activation_dtype != x.scalar_type();
  TORCH_CHECK_TYPE(!fp8 || (*activation_dtype == at::kFloat8_e4m3fn && x.scalar_type() == at::kBFloat16),
                   "nm_act::", op, " expected activation_dtype of x, or float8_e4m3fn with x in bfloat16, got ",
                   dtype_text(activation_dtype.value_or(x.scalar_type())), " with ", dtype_text(x),
                   "; choose one of those");
  TORCH_CHECK_VALUE(selection.in_features % 8 == 0, "nm_act::", op, " expected in_features divisible by 8, got ",
                    selection.in_features, "; prune after the unfused operator");
  TORCH_CHECK_NOT_IMPLEMENTED(selection.in_features <= most_features, "nm_act::", op, " expected at most ",
                              most_features, " features in a fused row, got ", selection.in_features,
                              "; prune after the unfused operator");
  return fp8;
}

struct Pruned {
  at::Tensor values;     // [tokens, in_features]
  at::Tensor row_scale;  // [tokens], or empty
  PruneOutput out;
};

Pruned allocate_pruned(const at::Tensor& x, const Selection& selection, bool fp8) {
  const at::ScalarType type = fp8 ? at::kFloat8_e4m3fn : x.scalar_type();
  Pruned pruned{at::empty({selection.tokens, selection.in_features}, x.options().dtype(type)),
                empty_vector(x, fp8 ? selection.tokens : 0),
                {}};
  pruned.out = {pruned.values.mutable_data_ptr(), fp8 ? pruned.row_scale.mutable_data_ptr<float>() : nullptr,
                selection.pattern, element_type(type)};
  return pruned;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_prune(const at::Tensor& x, const at::Tensor& weight, double eps,
                                                              const OptionalTensor& residual, int64_t n, int64_t m,
                                                              std::optional<at::ScalarType> activation_dtype,
                                                              bool unit_offset, const OptionalTensor& x_weight) {
  constexpr const char* kOp = "rms_norm_prune";
  const Selection selection = check_selection(x, n, m, {}, {}, "none", kOp);
  const bool fp8 = check_prunable(x, selection, activation_dtype, kMaxNormFeatures, kOp);
  check_norm(x, weight, residual, x_weight, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const Pruned pruned = allocate_pruned(x, selection, fp8);
  const NormTensors norm = norm_tensors(x, weight, eps, residual, x_weight, unit_offset, selection);
  if (selection.tokens != 0) check_status(launch_rmsnorm_prune(norm.input, pruned.out, current_stream(x)), kOp);
  return {pruned.values, pruned.row_scale, norm.hidden};
}

std::tuple<at::Tensor, at::Tensor> silu_mul_prune(const at::Tensor& gate, const at::Tensor& up, int64_t n, int64_t m,
                                                  std::optional<at::ScalarType> activation_dtype,
                                                  c10::string_view activation) {
  constexpr const char* kOp = "silu_mul_prune";
  const Selection selection = check_selection(gate, n, m, {}, {}, "none", kOp);
  const bool fp8 = check_prunable(gate, selection, activation_dtype, kMaxRowFeatures, kOp);
  const Activation function = activation_of(activation, kOp);
  check_same_shape(gate, up, "up", kOp);
  const c10::cuda::CUDAGuard guard(gate.device());
  const Pruned pruned = allocate_pruned(gate, selection, fp8);
  if (selection.tokens != 0) {
    check_status(
        launch_silu_mul_prune(gated_tensors(gate, up, selection, function).input, pruned.out, current_stream(gate)),
        kOp);
  }
  return {pruned.values, pruned.row_scale};
}

at::Tensor rms_norm_add(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& residual,
                        bool unit_offset) {
  constexpr const char* kOp = "rms_norm_add";
  check_features(x, kOp);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "nm_act::", kOp,
                   " expected x in bfloat16 or float16, got ", dtype_text(x), "; convert it first");
  TORCH_CHECK_VALUE(x.size(-1) % 8 == 0 && x.size(-1) <= kMaxNormFeatures, "nm_act::", kOp,
                    " expected in_features divisible by 8 and at most ", kMaxNormFeatures, ", got ", x.size(-1),
                    "; use the separate operators");
  check_norm(x, weight, residual, {}, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor rows = aligned(x), by = aligned(weight), added = aligned(residual);
  const at::Tensor y = at::empty(x.sizes(), x.options());
  const RmsNormAddParams params{
      rows.const_data_ptr(), added.const_data_ptr(), by.const_data_ptr(), y.mutable_data_ptr(),         float(eps),
      unit_offset,           x.numel() / x.size(-1), int(x.size(-1)),     element_type(x.scalar_type())};
  check_status(launch_rmsnorm_add(params, current_stream(x)), kOp);
  return y;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> prune_e4m3(const at::Tensor& x, const Selection& selection, const char* op) {
  check_prunable(x, selection, at::kFloat8_e4m3fn, kMaxRowFeatures, op);
  const Pruned pruned = allocate_pruned(x, selection, true);
  const Rows rows = aligned_rows(x);
  const RowsInput input{rows.tensor.const_data_ptr(), rows.stride, selection.tokens, int(selection.in_features),
                        selection.type};
  if (selection.tokens != 0) check_status(launch_prune_e4m3(input, pruned.out, current_stream(x)), op);
  return {pruned.values, pruned.row_scale};
}

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("rms_norm_compress", rms_norm_compress);
  m.impl("silu_mul_compress", silu_mul_compress);
  m.impl("rms_norm_prune", rms_norm_prune);
  m.impl("silu_mul_prune", silu_mul_prune);
  m.impl("rms_norm_add", rms_norm_add);
}

}  // namespace nm_act::cuda_ops
