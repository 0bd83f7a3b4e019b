// nm_act::sparse_linear on CUDA.
//
// ops/choice.h chooses: a few tokens over a weight stored [in, out] go to the gather kernel; with enough tokens, 2:4 in
// 16 bits goes to the sparse tensor cores, and so does 2:4+1 with its lifted weight, if that pays; everything else
// prunes and runs cuBLAS. An 8-bit weight that the gather kernel does not take is first multiplied by its scale, in the
// dtype of x. With e4m3 activations, the weight goes to the fp8 tensor cores unconverted: the sparse ones for 2:4, the
// dense ones over the pruned activation for any other N:M.
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

// Prune, then torch's dense product; the rest of the epilogue are torch operations in float32, on a product that is not
// yet rounded to 16 bits (in float16 it may overflow although the scaled one does not).
at::Tensor dense_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                         const Selection& selection, bool variance_correction, const at::Tensor& shift_out,
                         const at::Tensor& column_scale, const char* op) {
  const DenseOperand operand = prune_dense(x, selection, variance_correction, op);
  if (!operand.nu.defined() && !shift_out.defined() && !column_scale.defined())
    return at::linear(operand.values, weight, bias.defined() ? OptionalTensor(bias) : std::nullopt);
  at::Tensor y = x.scalar_type() == at::kFloat ? at::linear(operand.values, weight)
                                               : at::mm(operand.values, weight.t(), at::kFloat);
  if (operand.nu.defined()) y.mul_(operand.nu.unsqueeze(1));
  if (operand.eta.defined()) {
    y.addcmul_(operand.eta.unsqueeze(1), shift_out);
  } else if (shift_out.defined()) {
    y.add_(shift_out);
  }
  if (column_scale.defined()) y.mul_(column_scale);
  if (bias.defined()) y.add_(bias);
  return y.to(x.scalar_type());
}

// The choice was the sparse tensor cores: compress, multiply.
at::Tensor sparse_product(const at::Tensor& x, const at::Tensor& weight, const Selection& selection,
                          bool variance_correction, GemmEpilogueTensors epilogue, const GemmPlan& plan,
                          GemmDevice device, const char* op) {
  const bool fp8 = weight.scalar_type() == at::kFloat8_e4m3fn;
  const PackedOperand operand = compress_packed(x, selection, variance_correction, fp8, device, op);
  const at::Tensor y = at::empty({selection.tokens, weight.size(0)}, x.options());
  epilogue.row_scale = operand.row_scale;
  epilogue.eta = operand.eta;
  for (at::Tensor* vector : {&epilogue.shift_out, &epilogue.column_scale, &epilogue.bias}) *vector = aligned(*vector);
  SparseGemmParams params = gemm_params(operand, weight, epilogue, x.scalar_type());
  run_sparse_gemm(params, device, plan, y, op);
  return y;
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& stored_weight, const OptionalTensor& optional_bias,
                         int64_t n, int64_t m, const OptionalTensor& channel_scale, const OptionalTensor& shift,
                         c10::string_view token_shift, const OptionalTensor& shift_out, bool variance_correction,
                         const OptionalTensor& column_scale, const OptionalTensor& weight_scale,
                         at::IntArrayRef extra_columns, const OptionalTensor& lifted_weight,
                         std::optional<at::ScalarType> activation_dtype) {
  constexpr const char* kOp = "sparse_linear";
  const NoAutocast no_autocast;
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, kOp, extra_columns);
  const bool fp8 = check_activation_dtype(activation_dtype, x, stored_weight, kOp);
  const at::Tensor scale = check_scaled_weight(x, stored_weight, weight_scale, optional_bias, kOp);
  const at::Tensor lifted = check_lifted_weight(lifted_weight, selection, x, stored_weight, kOp);
  const at::Tensor bias = optional_bias.value_or(at::Tensor());
  const int64_t out_features = stored_weight.size(0);
  const at::Tensor given = check_shift_out(shift_out, selection, x, out_features, kOp);
  const at::Tensor column_vector = check_vector(column_scale, x, out_features, "column_scale", kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<int64_t> sizes = with_last(x.sizes(), out_features);
  if (selection.tokens == 0 || out_features == 0) return at::empty(sizes, x.options());
  const GemmDevice device = gemm_device(x, kOp);
  LinearFacts facts{selection.tokens,
                    selection.type,
                    element_type(stored_weight.scalar_type()),
                    fp8 ? ElementType::kE4M3 : selection.type,
                    selection.pattern,
                    facts_of(stored_weight),
                    {},
                    variance_correction};
  if (lifted.defined()) facts.lifted = facts_of(lifted);
  const LinearChoice choice = choose_on_cuda(facts, device);
  if (fp8) {
    const bool plain = !selection.has_shift() && !selection.channel_scale.defined() && !variance_correction &&
                       !column_vector.defined();
    if (choice.why == Why::kE4M3Dense && plain) {
      const auto [values, row_scale] = prune_e4m3(x, selection, kOp);
      return e4m3_product(values, row_scale, stored_weight, scale, bias, kOp).view(sizes);
    }
    TORCH_CHECK_NOT_IMPLEMENTED(choice.path == LinearPath::kSparse,
                                "nm_act::sparse_linear expected a compiled combination along with activation_dtype ",
                                "float8_e4m3fn (", text_of(choice, facts), "), got ", pattern_text(selection.pattern),
                                ", x ", dtype_text(x), ", weight ", stored_weight.sizes(), " with strides ",
                                stored_weight.strides(), " on compute capability ", device.compute_capability_major,
                                ".x; leave activation_dtype out");
    // The kernel's column scale, here also the weight's scale, multiplies the shift term, so a given image is divided
    // by it.
    const GemmEpilogueTensors epilogue{
        {},
        {},
        given.defined() ? given.div(scale) : shift_image(stored_weight, selection, given),
        column_vector.defined() ? scale.mul(column_vector) : scale,
        bias};
    return sparse_product(x, stored_weight, selection, variance_correction, epilogue, choice.gemm, device, kOp)
        .view(sizes);
  }
  const at::Tensor shift_vector = selection.has_shift() && !given.defined()
                                      ? shift_image(dequantised(stored_weight, scale, at::kFloat), selection, given)
                                      : given;
  if (choice.path == LinearPath::kGather) {
    const GatherEpilogueTensors epilogue{scale, shift_vector, column_vector, bias};
    return gather_product(x, stored_weight, selection, variance_correction, epilogue, choice.gather, device, kOp)
        .view(sizes);
  }
  const at::Tensor weight =
      choice.path == LinearPath::kLifted ? lifted : dequantised(stored_weight, scale, x.scalar_type());
  if (choice.path == LinearPath::kDense)
    return dense_product(x, weight, bias, selection, variance_correction, shift_vector, column_vector, kOp).view(sizes);
  return sparse_product(x, weight, selection, variance_correction, {{}, {}, shift_vector, column_vector, bias},
                        choice.gemm, device, kOp)
      .view(sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("sparse_linear", sparse_linear); }

}  // namespace nm_act::cuda_ops
