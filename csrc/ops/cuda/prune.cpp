// nm_act::prune on CUDA: the token shift, then the selection, then the variance factor, each one launch if asked for.
#include "ops/prune.h"

#include <torch/library.h>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

DenseOperand prune_dense(const at::Tensor& x, const Selection& selection, bool variance_correction, const char* op) {
  const bool token_shift = selection.token_shift != cpu::TokenShift::kNone;
  check_row_statistics(selection, token_shift || variance_correction, op);
  const Rows rows = rows_of(x);
  const cudaStream_t stream = current_stream(x);
  DenseOperand operand;
  operand.values = at::empty({selection.tokens, selection.in_features}, x.options());
  if (token_shift) operand.eta = empty_vector(x, selection.tokens);
  if (variance_correction) operand.nu = empty_vector(x, selection.tokens);
  if (operand.values.numel() == 0) return operand;

  const TokenStatisticsParams statistics{rows.tensor.const_data_ptr(), rows.stride, selection.tokens,
                                         int(selection.in_features), element_type(x.scalar_type())};
  if (token_shift) {
    check_status(launch_token_shift(statistics, token_shift_kind(selection.token_shift),
                                    operand.eta.mutable_data_ptr<float>(), stream),
                 op);
  }
  PruneParams params{};
  params.x = statistics.x;
  params.x_stride = rows.stride;
  params.out = operand.values.mutable_data_ptr();
  params.channel_scale = data_or_null(selection.channel_scale);
  params.shift = data_or_null(selection.shift);
  params.eta = data_or_null(operand.eta);
  params.tokens = selection.tokens;
  params.in_features = int(selection.in_features);
  params.pattern = selection.pattern;
  params.x_type = statistics.x_type;
  check_status(launch_prune(params, stream), op);
  if (variance_correction) {
    check_status(launch_variance_ratio(statistics, params.out, params.shift, params.eta,
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
