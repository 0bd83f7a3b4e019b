// The CPU selection kernel on torch's threads, for prune, compress and sparse_linear.
#pragma once

#include "cpu/kernels.h"
#include "ops/selection.h"

namespace nm_act::cpu_ops {

// Parameters of the kernel for a contiguous x; outputs are null until the caller sets them.
cpu::PruneParams prune_params(const Selection& selection, const at::Tensor& x);

void launch_prune(const cpu::PruneParams& params);

}  // namespace nm_act::cpu_ops
