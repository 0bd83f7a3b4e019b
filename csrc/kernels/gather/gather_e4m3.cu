// Gather kernels for e4m3 weights.
#include "dispatch.cuh"

namespace nm_act {

cudaError_t launch_gather_e4m3(const GatherParams& params, const GatherLaunch& launch) {
  return launch_gather_bits8<WeightE4M3>(params, launch);
}

}  // namespace nm_act
