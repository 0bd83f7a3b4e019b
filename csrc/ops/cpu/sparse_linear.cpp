// nm_act::sparse_linear, sparse_linear_prepacked, gather_linear and dense_linear on CPUs.
//
// An 8-bit weight is first multiplied by its scale, in the dtype of x. A few tokens with a weight stored [in, out] run
// on the gather kernel, which reads only the rows of survivors. Everything else prunes and runs a dense product: our
// own where it is faster (dense.cpp), else torch's, or if more than a bias follows, one that keeps float32 until the
// end. With a prepacked weight the product is oneDNN's, called through torch or vLLM. It is faster, so rows are skipped
// for fewer tokens.
#include "ops/cpu/sparse_linear.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/prune.h"
#include "ops/tensors.h"

namespace nm_act::cpu_ops {
namespace {

// The rows that some token needs and their multipliers, in the order in which the gather kernel reads them.
struct SurvivingRows {
  std::vector<int64_t> rows;  // the first `count` are in use
  std::vector<float> coefficients;
  int64_t count;
};

template <class T>
const SurvivingRows& surviving_rows(const at::Tensor& operand) {
  const int64_t tokens = operand.size(0), in_features = operand.size(1);
  const T* p = operand.const_data_ptr<T>();
  // Kept between calls and never shrunk: allocating fresh pages costs more than filling them.
  static thread_local SurvivingRows s;
  if (int64_t(s.rows.size()) < in_features + cpu::kGatherUnroll) s.rows.resize(in_features + cpu::kGatherUnroll);
  int64_t found = 0;
  for (int64_t k = 0; k < in_features; ++k) {
    bool needed = false;
    for (int64_t t = 0; t < tokens; ++t) needed |= float(p[t * in_features + k]) != 0.0f;  // true for NaN
    // No branch, because which half survives cannot be predicted.
    s.rows[found] = k;
    found += needed;
  }
  // The last step is padded with a row that is read anyway, multiplied by zero.
  s.count = (found + cpu::kGatherUnroll - 1) / cpu::kGatherUnroll * cpu::kGatherUnroll;
  for (int64_t r = found; r < s.count; ++r) s.rows[r] = s.rows[found - 1];
  s.coefficients.assign(s.count * tokens, 0.0f);
  for (int64_t r = 0; r < found; ++r) {
    const int64_t step = r / cpu::kGatherUnroll, lane = r % cpu::kGatherUnroll;
    for (int64_t t = 0; t < tokens; ++t)
      s.coefficients[(step * tokens + t) * cpu::kGatherUnroll + lane] = float(p[t * in_features + s.rows[r]]);
  }
  return s;
}

// Computes y [tokens, out] in one pass from the dense operand [tokens, in] and a weight stored [in, out].
void gather_pass(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue, ElementType dtype,
                 const at::Tensor& y) {
  const SurvivingRows& survivors = dtype == ElementType::kFloat32    ? surviving_rows<float>(operand)
                                   : dtype == ElementType::kBFloat16 ? surviving_rows<at::BFloat16>(operand)
                                                                     : surviving_rows<at::Half>(operand);
  cpu::GatherParams p{};
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.rows = survivors.rows.data();
  p.coefficients = survivors.coefficients.data();
  p.num_rows = survivors.count;
  p.tokens = operand.size(0);
  p.out_features = weight.size(0);
  p.row_stride = weight.stride(1);
  p.dtype = dtype;
  p.epilogue = epilogue;
  // At least 64 Ki multiply-adds per thread, about 10 us.
  constexpr int64_t kLine = cpu::kGatherColumns;
  const int64_t lines = (p.out_features + kLine - 1) / kLine;
  const int64_t grain = 1 + 65536 / (kLine * (1 + p.num_rows));
  const cpu::CpuKernels& kernels = cpu::cpu_kernels();
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    kernels.gather(p, begin * kLine, std::min(end * kLine, p.out_features));
  });
}

void launch_gather(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y) {
  for (int64_t token = 0; token < operand.size(0); token += cpu::kGatherTokens) {
    const int64_t tokens = std::min<int64_t>(cpu::kGatherTokens, operand.size(0) - token);
    cpu::Epilogue pass = epilogue;
    if (pass.row_scale != nullptr) pass.row_scale += token;
    if (pass.eta != nullptr) pass.eta += token;
    gather_pass(operand.narrow(0, token, tokens), weight, pass, dtype, y.narrow(0, token, tokens));
  }
}

// W @ shift, or the row sums W @ 1, in float32.
at::Tensor shift_image(const at::Tensor& weight, const Selection& selection) {
  if (selection.shift.defined()) return at::mv(weight.to(at::kFloat), selection.shift);
  return at::sum(weight, {1}, false, at::kFloat);
}

}  // namespace

at::Tensor pruned_product(const char* op, const at::Tensor& prepacked, const at::Tensor& x,
                          const at::Tensor& stored_weight, const OptionalTensor& bias, int64_t n, int64_t m,
                          const OptionalTensor& channel_scale, const OptionalTensor& shift,
                          c10::string_view token_shift, const OptionalTensor& shift_out, bool variance_correction,
                          const OptionalTensor& column_scale, const OptionalTensor& weight_scale,
                          at::IntArrayRef extra_columns, const OptionalTensor& lifted_weight,
                          std::optional<at::ScalarType> activation_dtype) {
  const NoAutocast no_autocast;
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, op, extra_columns);
  const at::Tensor scale = check_scaled_weight(x, stored_weight, weight_scale, bias, op);
  check_lifted_weight(lifted_weight, selection, x, stored_weight, op);
  TORCH_CHECK_NOT_IMPLEMENTED(!check_activation_dtype(activation_dtype, x, stored_weight, op),
                              "nm_act::sparse_linear expected CUDA tensors along with activation_dtype float8_e4m3fn, ",
                              "got CPU tensors; leave activation_dtype out");
  const int64_t tokens = selection.tokens, in_features = selection.in_features, out_features = stored_weight.size(0);
  at::Tensor shift_vector = check_shift_out(shift_out, selection, x, out_features, op);
  const at::Tensor column_vector = check_vector(column_scale, x, out_features, "column_scale", op);
  at::Tensor y = at::empty({tokens, out_features}, x.options());
  if (y.numel() == 0) return y.view(with_last(x.sizes(), out_features));
  if (selection.has_shift() && !shift_vector.defined())
    shift_vector = shift_image(dequantised(stored_weight, scale, at::kFloat), selection);
  const at::Tensor weight = dequantised(stored_weight, scale, x.scalar_type());

  const at::Tensor dense = x.contiguous();
  const at::TensorOptions vector_options = x.options().dtype(at::kFloat);
  at::Tensor operand = at::empty({tokens, in_features}, x.options());
  const at::Tensor eta =
      selection.token_shift != TokenShift::kNone ? at::empty({tokens}, vector_options) : at::Tensor();
  const at::Tensor nu = variance_correction ? at::empty({tokens}, vector_options) : at::Tensor();
  cpu::PruneParams params = prune_params(selection, dense);
  params.out = operand.mutable_data_ptr();
  params.eta = eta.defined() ? eta.mutable_data_ptr<float>() : nullptr;
  params.nu = nu.defined() ? nu.mutable_data_ptr<float>() : nullptr;
  launch_prune(params);

  const at::Tensor bias_vector = bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  const cpu::Epilogue epilogue{data_or_null(nu), data_or_null(eta), data_or_null(shift_vector),
                               data_or_null(column_vector),
                               bias_vector.defined() ? bias_vector.const_data_ptr() : nullptr};
  const ElementType type = element_type(x.scalar_type());
  const bool scales = nu.defined() || shift_vector.defined() || column_vector.defined();
  const LinearFacts facts{tokens, type, type, type, selection.pattern, facts_of(weight), {}, variance_correction};
  const LinearPath path = choose_on_cpu(facts, prepacked.defined()).path;
  if (path == LinearPath::kGather) {
    launch_gather(operand, weight, epilogue, selection.type, y);
  } else if (path == LinearPath::kPrepacked) {
    const OptionalTensor added = scales || !bias_vector.defined() ? OptionalTensor() : bias_vector;
    if (prepacked.is_mkldnn())
      y = prepacked_product(operand, prepacked, added);
    else
      vllm_product(operand, prepacked, added, y);
    if (scales) apply_epilogue(epilogue, type, y);
  } else if (tokens <= cpu::most_gathered_tokens(type == ElementType::kFloat32) && weight.stride(1) == 1) {
    dense_rows(operand, weight, epilogue, selection.type, y);
  } else if (stored_in_out(weight) && columns_pay(type, tokens) && !(scales && type == ElementType::kBFloat16)) {
    // With scaled bfloat16, both storages round alike: the product, and then the result.
    dense_columns(operand, weight, epilogue, selection.type, y);
  } else if (scales) {
    dense_product(operand, weight, epilogue, selection.type, y);
  } else {
    y = at::linear(operand, weight, bias);
  }
  return y.view(with_last(x.sizes(), out_features));
}

namespace {

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t n,
                         int64_t m, const OptionalTensor& channel_scale, const OptionalTensor& shift,
                         c10::string_view token_shift, const OptionalTensor& shift_out, bool variance_correction,
                         const OptionalTensor& column_scale, const OptionalTensor& weight_scale,
                         at::IntArrayRef extra_columns, const OptionalTensor& lifted_weight,
                         std::optional<at::ScalarType> activation_dtype) {
  return pruned_product("sparse_linear", {}, x, weight, bias, n, m, channel_scale, shift, token_shift, shift_out,
                        variance_correction, column_scale, weight_scale, extra_columns, lifted_weight,
                        activation_dtype);
}

at::Tensor sparse_linear_prepacked(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& prepacked,
                                   const OptionalTensor& bias, int64_t n, int64_t m,
                                   const OptionalTensor& channel_scale, const OptionalTensor& shift,
                                   c10::string_view token_shift, const OptionalTensor& shift_out,
                                   bool variance_correction, const OptionalTensor& column_scale,
                                   at::IntArrayRef extra_columns) {
  constexpr const char* kOp = "sparse_linear_prepacked";
  TORCH_CHECK_VALUE(
      prepacked.is_mkldnn() && prepacked.scalar_type() == weight.scalar_type() && prepacked.sizes() == weight.sizes(),
      "nm_act::", kOp, " expected prepacked_weight as oneDNN's layout of the weight, ", dtype_text(weight), " ",
      weight.sizes(), prepacked.is_mkldnn() ? ", got " : ", got a plain tensor, ", dtype_text(prepacked), " ",
      prepacked.sizes(), "; make it with torch.ops.mkldnn._reorder_linear_weight");
  return pruned_product(kOp, prepacked, x, weight, bias, n, m, channel_scale, shift, token_shift, shift_out,
                        variance_correction, column_scale, {}, extra_columns, {}, {});
}

at::Tensor gather_linear(const at::Tensor& x, const at::Tensor& stored_weight, const OptionalTensor& bias,
                         const OptionalTensor& weight_scale) {
  constexpr const char* kOp = "gather_linear";
  const auto [tokens, scale] = check_gather_linear(x, stored_weight, bias, weight_scale, kOp);
  const at::Tensor weight = scale.defined() ? dequantised(stored_weight, scale, x.scalar_type()) : stored_weight;
  const ElementType dtype = check_dtype(x, kOp);
  at::Tensor y = at::empty(with_last(x.sizes(), weight.size(0)), x.options());
  if (y.numel() == 0) return y;
  const at::Tensor rows = y.view({tokens, weight.size(0)});
  const at::Tensor bias_vector = bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  cpu::Epilogue epilogue{};
  epilogue.bias = bias_vector.defined() ? bias_vector.const_data_ptr() : nullptr;
  launch_gather(x.contiguous().view({tokens, x.size(-1)}), weight, epilogue, dtype, rows);
  return y;
}

at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* kOp = "dense_linear";
  const int64_t tokens = check_dense_linear(x, weight, bias, kOp);
  const at::Tensor y = at::empty(with_last(x.sizes(), weight.size(0)), x.options());
  if (y.numel() == 0) return y;
  const at::Tensor bias_vector = bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  cpu::Epilogue epilogue{};
  epilogue.bias = bias_vector.defined() ? bias_vector.const_data_ptr() : nullptr;
  dense_rows(x.reshape({tokens, x.size(-1)}), weight, epilogue, check_dtype(x, kOp), y.view({tokens, -1}));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CPU, m) {
  m.impl("sparse_linear", sparse_linear);
  m.impl("sparse_linear_prepacked", sparse_linear_prepacked);
  m.impl("gather_linear", gather_linear);
  m.impl("dense_linear", dense_linear);
}

// The dispatch key of a tensor in oneDNN's layout.
TORCH_LIBRARY_IMPL(nm_act, MkldnnCPU, m) { m.impl("sparse_linear_prepacked", sparse_linear_prepacked); }

}  // namespace nm_act::cpu_ops
