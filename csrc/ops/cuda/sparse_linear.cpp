// nm_act::sparse_linear and sparse_linear_fp8 on CUDA.
//
// ops/choice.h chooses: a few tokens over a weight stored [in, out] go to the gather kernel; with enough tokens, 2:4 in
// 16 bits goes to the sparse tensor cores, and so does 2:4+1 that brings its lifted weight, where that
// pays; everything else prunes and runs cuBLAS. An 8-bit weight that the gather kernel does not take is first
// multiplied by its scale, in the dtype of x.
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include "ops/choice.h"
#include "ops/cuda/gather.h"
#include "ops/cuda/sparse_gemm.h"

namespace nm_act::cuda_ops {
namespace {

// W @ shift, or the row sums W @ 1, in float32; undefined without a shift.
at::Tensor shift_image(const at::Tensor& weight, const Selection& selection, const at::Tensor& given) {
  if (given.defined() || !selection.has_shift()) return given;
  if (selection.shift.defined()) return at::mv(weight.to(at::kFloat), selection.shift);
  return weight.scalar_type() == at::kFloat8_e4m3fn ? at::sum(weight.to(at::kFloat), {1})
                                                    : at::sum(weight, {1}, false, at::kFloat);
}

// Prune, then torch's dense product; the rest of the epilogue as torch operations in float32, on a product that is not
// rounded to 16 bits before (in float16 it may overflow where the scaled one does not).
at::Tensor dense_product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const Selection& selection, bool variance_correction, const at::Tensor& shift_out,
                         const at::Tensor& column_scale, const char* op) {
  const DenseOperand operand = prune_dense(x, selection, variance_correction, op);
  if (!operand.nu.defined() && !shift_out.defined() && !column_scale.defined())
    return at::linear(operand.values, weight, bias);
  at::Tensor y = x.scalar_type() == at::kFloat ? at::linear(operand.values, weight)
                                               : at::mm(operand.values, weight.t(), at::kFloat);
  if (operand.nu.defined()) y.mul_(operand.nu.unsqueeze(1));
  if (operand.eta.defined()) {
    y.addcmul_(operand.eta.unsqueeze(1), shift_out);
  } else if (shift_out.defined()) {
    y.add_(shift_out);
  }
  if (column_scale.defined()) y.mul_(column_scale);
  if (bias.has_value() && bias->defined()) y.add_(*bias);
  return y.to(x.scalar_type());
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& stored_weight, const OptionalTensor& bias, int64_t n,
                         int64_t m, const OptionalTensor& channel_scale, const OptionalTensor& shift,
                         c10::string_view token_shift, const OptionalTensor& shift_out, bool variance_correction,
                         const OptionalTensor& column_scale, const OptionalTensor& weight_scale,
                         at::IntArrayRef extra_columns, const OptionalTensor& lifted_weight) {
  constexpr const char* kOp = "sparse_linear";
  const NoAutocast no_autocast;
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, kOp, extra_columns);
  const at::Tensor scale = check_scaled_weight(x, stored_weight, weight_scale, bias, kOp);
  const at::Tensor lifted = check_lifted_weight(lifted_weight, selection, x, stored_weight, kOp);
  const int64_t out_features = stored_weight.size(0);
  const at::Tensor given = check_shift_out(shift_out, selection, x, out_features, kOp);
  const at::Tensor column_vector = check_vector(column_scale, x, out_features, "column_scale", kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<int64_t> sizes = with_last(x.sizes(), out_features);
  if (selection.tokens == 0 || out_features == 0) return at::empty(sizes, x.options());
  const GemmDevice device = gemm_device(x, kOp);
  const at::Tensor shift_vector = selection.has_shift() && !given.defined()
                                      ? shift_image(dequantised(stored_weight, scale, at::kFloat), selection, given)
                                      : given;
  LinearFacts facts{selection.tokens,   selection.type,          element_type(stored_weight.scalar_type()),
                    selection.pattern,  facts_of(stored_weight), {},
                    variance_correction};
  if (lifted.defined()) facts.lifted = facts_of(lifted);
  const LinearChoice choice = choose_on_cuda(facts, device);
  if (choice.path == LinearPath::kGather) {
    const GatherEpilogueTensors epilogue{scale, shift_vector, column_vector, bias.value_or(at::Tensor())};
    return gather_product(x, stored_weight, selection, variance_correction, epilogue, choice.gather, device, kOp)
        .view(sizes);
  }
  const at::Tensor weight = dequantised(stored_weight, scale, x.scalar_type());
  if (choice.path == LinearPath::kDense) {
    return dense_product(x, weight, bias, selection, variance_correction, shift_vector, column_vector, kOp).view(sizes);
  }
  const auto compress = choice.path == LinearPath::kLifted ? compress_lifted : compress_packed;
  const PackedOperand operand = compress(x, selection, variance_correction, false, device, kOp);
  const at::Tensor y = at::empty(sizes, x.options());
  const GemmEpilogueTensors epilogue{operand.row_scale, operand.eta, aligned(shift_vector), aligned(column_vector),
                                     aligned(bias.value_or(at::Tensor()))};
  const at::Tensor& multiplied = choice.path == LinearPath::kLifted ? lifted : weight;
  SparseGemmParams params = gemm_params(operand, multiplied, epilogue, x.scalar_type());
  run_sparse_gemm(params, device, choice.gemm, y, kOp);
  return y;
}

at::Tensor sparse_linear_fp8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                             const OptionalTensor& bias, const OptionalTensor& channel_scale,
                             const OptionalTensor& shift, c10::string_view token_shift, const OptionalTensor& shift_out,
                             bool variance_correction, const OptionalTensor& column_scale) {
  constexpr const char* kOp = "sparse_linear_fp8";
  const NoAutocast no_autocast;
  const Selection selection = check_selection(x, 2, 4, channel_scale, shift, token_shift, kOp);
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "nm_act::sparse_linear_fp8 expected weight in ",
                   "float8_e4m3fn, got ", weight.scalar_type(), "; quantise it per output channel");
  check_weight_shape(x, weight, bias, kOp);
  const int64_t out_features = weight.size(0);
  const at::Tensor scale = check_vector(weight_scale, x, out_features, "weight_scale", kOp);
  const at::Tensor given = check_shift_out(shift_out, selection, x, out_features, kOp);
  const at::Tensor column_vector = check_vector(column_scale, x, out_features, "column_scale", kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const GemmDevice device = gemm_device(x, kOp);
  TORCH_CHECK_NOT_IMPLEMENTED(
      weight_fits_gemm(weight, at::kFloat8_e4m3fn, x.scalar_type(), device),
      "nm_act::sparse_linear_fp8 expected a compiled combination ",
      "(bfloat16 or float16 x, a contiguous e4m3 weight [out, in] with in_features % 32 == 0 and out_features % 16 == "
      "0, on ",
      "sm_90), got x ", x.scalar_type(), ", weight ", weight.sizes(), " with strides ", weight.strides(),
      " on compute capability ", device.compute_capability_major, ".x; use a bfloat16 weight with sparse_linear");
  const PackedOperand operand = compress_packed(x, selection, variance_correction, true, device, kOp);
  const at::Tensor y = at::empty(with_last(x.sizes(), out_features), x.options());
  if (y.numel() == 0) return y;
  // The kernel's column scale multiplies the shift term too, so the weight's scale is taken out of a given image.
  GemmEpilogueTensors epilogue{
      operand.row_scale, operand.eta, given.defined() ? given.div(scale) : shift_image(weight, selection, given),
      column_vector.defined() ? scale.mul(column_vector) : aligned(scale), aligned(bias.value_or(at::Tensor()))};
  SparseGemmParams params = gemm_params(operand, weight, epilogue, x.scalar_type());
  const GemmConfig config = select_config(
      {selection.tokens, out_features, selection.in_features, ElementType::kE4M3, device.multiprocessors});
  run_sparse_gemm(params, device, config, y, kOp);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("sparse_linear", sparse_linear);
  m.impl("sparse_linear_fp8", sparse_linear_fp8);
}

}  // namespace nm_act::cuda_ops
