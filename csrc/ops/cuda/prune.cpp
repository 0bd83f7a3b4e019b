// nm_act::prune on CUDA: the token shift, the selection and the variance ratio, one launch each if requested.
#include <torch/library.h>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

namespace {

TokenStatisticsParams statistics_params(const Rows& rows, const Selection& selection) {
  return {rows.tensor.const_data_ptr(), rows.stride, selection.tokens, int(selection.in_features), selection.type};
}

}  // namespace

at::Tensor token_shift_of(const Rows& rows, const Selection& selection, const char* op) {
  if (selection.token_shift == TokenShift::kNone) return {};
  check_row_statistics(selection, true, op);
  const at::Tensor eta = empty_vector(rows.tensor, selection.tokens);
  if (eta.numel() == 0) return eta;
  check_status(launch_token_shift(statistics_params(rows, selection), selection.token_shift,
                                  eta.mutable_data_ptr<float>(), current_stream(rows.tensor)),
               op);
  return eta;
}

DenseOperand prune_dense(const at::Tensor& x, const Selection& selection, bool variance_correction, const char* op) {
  check_row_statistics(selection, variance_correction, op);
  const Rows rows = rows_of(x);
  const cudaStream_t stream = current_stream(x);
  DenseOperand operand;
  operand.eta = token_shift_of(rows, selection, op);
  operand.values = at::empty({selection.tokens, selection.in_features}, x.options());
  if (variance_correction) operand.nu = empty_vector(x, selection.tokens);
  if (operand.values.numel() == 0) return operand;
  PruneParams params{};
  params.x = rows.tensor.const_data_ptr();
  params.x_stride = rows.stride;
  params.out = operand.values.mutable_data_ptr();
  params.channel_scale = data_or_null(selection.channel_scale);
  params.shift = data_or_null(selection.shift);
  params.eta = data_or_null(operand.eta);
  params.tokens = selection.tokens;
  params.in_features = int(selection.in_features);
  params.pattern = selection.pattern;
  params.x_type = selection.type;
  check_status(launch_prune(params, stream), op);
  if (variance_correction) {
    check_status(launch_variance_ratio(statistics_params(rows, selection), params.out, params.shift, params.eta,
                                       operand.nu.mutable_data_ptr<float>(), stream),
                 op);
  }
  return operand;
}

namespace {

at::Tensor prune(const at::Tensor& x, int64_t n, int64_t m, const OptionalTensor& channel_scale,
                 const OptionalTensor& shift, c10::string_view token_shift, at::IntArrayRef extra_columns) {
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, "prune", extra_columns);
  const c10::cuda::CUDAGuard guard(x.device());
  return prune_dense(x, selection, false, "prune").values.view(x.sizes());
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("prune", prune); }

}  // namespace nm_act::cuda_ops
