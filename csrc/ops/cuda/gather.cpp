// nm_act::gather_linear on CUDA, and the decode path of sparse_linear.
#include "ops/cuda/gather.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

namespace nm_act::cuda_ops {
namespace {

// Operands that decide which kernel runs, and where they are; pointers to vectors stay null.
GatherParams operand_params(const at::Tensor& x, int64_t x_stride, const at::Tensor& weight, Pattern pattern,
                            int64_t tokens) {
  GatherParams params{};
  params.x = x.const_data_ptr();
  params.x_stride = x_stride;
  params.weight = weight.const_data_ptr();
  params.weight_stride = weight.stride(1);
  params.tokens = int(tokens);
  params.in_features = int(weight.size(1));
  params.out_features = int(weight.size(0));
  params.pattern = pattern;
  params.x_type = element_type(x.scalar_type());
  params.weight_type = element_type(weight.scalar_type());
  return params;
}

void set_epilogue(GatherParams& params, const GatherEpilogueTensors& epilogue, const at::Tensor& contiguous_bias) {
  params.weight_scale = data_or_null(epilogue.weight_scale);
  params.shift_out = data_or_null(epilogue.shift_out);
  params.column_scale = data_or_null(epilogue.column_scale);
  params.bias = contiguous_bias.defined() ? contiguous_bias.const_data_ptr() : nullptr;
}

at::Tensor contiguous_or_undefined(const at::Tensor& tensor) { return tensor.defined() ? tensor.contiguous() : tensor; }

}  // namespace

bool takes_gather(const at::Tensor& x, const at::Tensor& weight, Pattern pattern, int64_t tokens, GemmDevice device) {
  if (!stored_in_out(weight) || weight.size(0) > INT32_MAX || weight.size(1) > INT32_MAX) return false;
  return gather_supports(operand_params(x, weight.size(1), weight, pattern, tokens), device);
}

at::Tensor gather_product(const at::Tensor& x, const at::Tensor& weight, const Selection& selection,
                          bool variance_correction, const GatherEpilogueTensors& epilogue, GemmDevice device,
                          const char* op) {
  const cudaStream_t stream = current_stream(x);
  const at::Tensor y = at::empty({selection.tokens, weight.size(0)}, x.options());
  const at::Tensor bias = contiguous_or_undefined(epilogue.bias);
  if (variance_correction || selection.pattern.extra.count > 0) {
    // The factor needs the whole token, and windows a kernel of their own: the selection runs by itself and the decode
    // kernel skips its zeros.
    const DenseOperand operand = prune_dense(x, selection, variance_correction, op);
    GatherParams params = operand_params(operand.values, selection.in_features, weight, {}, selection.tokens);
    set_epilogue(params, epilogue, bias);
    params.y = y.mutable_data_ptr();
    params.row_scale = data_or_null(operand.nu);
    params.eta = data_or_null(operand.eta);
    check_status(launch_gather(params, device, stream), op);
    return y;
  }
  const Rows rows = rows_of(x);
  const bool token_shift = selection.token_shift != cpu::TokenShift::kNone;
  check_row_statistics(selection, token_shift, op);
  const at::Tensor eta = token_shift ? empty_vector(x, selection.tokens) : at::Tensor();
  if (token_shift) {
    const TokenStatisticsParams statistics{rows.tensor.const_data_ptr(), rows.stride, selection.tokens,
                                           int(selection.in_features), element_type(x.scalar_type())};
    check_status(
        launch_token_shift(statistics, token_shift_kind(selection.token_shift), eta.mutable_data_ptr<float>(), stream),
        op);
  }
  GatherParams params = operand_params(rows.tensor, rows.stride, weight, selection.pattern, selection.tokens);
  set_epilogue(params, epilogue, bias);
  params.y = y.mutable_data_ptr();
  params.channel_scale = data_or_null(selection.channel_scale);
  params.shift = data_or_null(selection.shift);
  params.eta = data_or_null(eta);
  check_status(launch_gather(params, device, stream), op);
  return y;
}

namespace {

at::Tensor gather_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* kOp = "gather_linear";
  const int64_t tokens = check_gather_linear(x, weight, bias, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<int64_t> sizes = with_last(x.sizes(), weight.size(0));
  if (tokens == 0 || weight.size(0) == 0) return at::empty(sizes, x.options());
  const GemmDevice device = gemm_device(x, kOp);
  if (!takes_gather(x, weight, {}, tokens, device)) return at::linear(x, weight, bias);
  const Rows rows = rows_of(x);
  const at::Tensor y = at::empty(sizes, x.options());
  const at::Tensor bias_vector = contiguous_or_undefined(bias.value_or(at::Tensor()));
  GatherParams params = operand_params(rows.tensor, rows.stride, weight, {}, tokens);
  set_epilogue(params, {}, bias_vector);
  params.y = y.mutable_data_ptr();
  check_status(launch_gather(params, device, current_stream(x)), kOp);
  return y;
}

at::Tensor tune_gather(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& weight_scale, int64_t n,
                       int64_t m, at::IntArrayRef given) {
  constexpr const char* kOp = "_tune_gather";
  const Selection selection = check_selection(x, n, m, {}, {}, "none", kOp);
  const at::Tensor scale = check_scaled_weight(x, weight, weight_scale, {}, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const GemmDevice device = gemm_device(x, kOp);
  const Pattern pattern = selection.pattern;
  TORCH_CHECK_VALUE(given.size() == 4, "nm_act::_tune_gather expected config as (lanes, splits, threads, ahead), got ",
                    given, "; see csrc/kernels/gather/config.h");
  const GatherConfig config{int(given[0]), int(given[1]), int(given[2]), given[3] != 0};
  const GatherProblem problem{int(selection.tokens),
                              int(weight.size(0)),
                              int(weight.size(1)),
                              element_type(weight.scalar_type()),
                              pattern,
                              device};
  TORCH_CHECK_VALUE(selection.tokens <= kMaxDecodeTokens &&
                        takes_gather(x, weight, pattern, selection.tokens, device) && is_valid(problem, config),
                    "nm_act::_tune_gather expected a product and a configuration of the decode kernel, got ",
                    selection.tokens, " tokens, weight ", weight.sizes(), " with strides ", weight.strides(),
                    ", config ", given, "; see csrc/kernels/gather/config.h");
  const Rows rows = rows_of(x);
  const at::Tensor y = at::empty(with_last(x.sizes(), weight.size(0)), x.options());
  GatherParams params = operand_params(rows.tensor, rows.stride, weight, pattern, selection.tokens);
  params.weight_scale = data_or_null(scale);
  params.y = y.mutable_data_ptr();
  check_status(launch_gather(params, device, config, current_stream(x)), kOp);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("gather_linear", gather_linear);
  m.impl("_tune_gather", tune_gather);
}

}  // namespace nm_act::cuda_ops
