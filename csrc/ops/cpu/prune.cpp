// nm_act::prune on CPUs: the sparse operand as a dense tensor.
#include "ops/cpu/prune.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace nm_act::cpu_ops {

cpu::PruneParams prune_params(const Selection& s, const at::Tensor& x) {
  cpu::PruneParams p{};
  p.x = x.const_data_ptr();
  p.channel_scale = data_or_null(s.channel_scale);
  p.shift = data_or_null(s.shift);
  p.tokens = s.tokens;
  p.in_features = s.in_features;
  p.pattern = s.pattern;
  p.dtype = s.type;
  p.token_shift = s.token_shift;
  return p;
}

void launch_prune(const cpu::PruneParams& params) {
  const cpu::CpuKernels& kernels = cpu::cpu_kernels();
  // About 20 us of work per thread: for less, waking a thread costs more than it gains.
  const int64_t grain = 1 + 16384 / (1 + params.in_features);
  at::parallel_for(0, params.tokens, grain, [&](int64_t begin, int64_t end) { kernels.prune(params, begin, end); });
}

namespace {

at::Tensor prune(const at::Tensor& x, int64_t n, int64_t m, const OptionalTensor& channel_scale,
                 const OptionalTensor& shift, c10::string_view token_shift, at::IntArrayRef extra_columns) {
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, "prune", extra_columns);
  const at::Tensor dense = x.contiguous();
  at::Tensor out = at::empty(x.sizes(), x.options());
  cpu::PruneParams params = prune_params(selection, dense);
  params.out = out.mutable_data_ptr();
  launch_prune(params);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CPU, m) { m.impl("prune", prune); }

}  // namespace nm_act::cpu_ops
