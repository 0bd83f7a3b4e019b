// Gather kernels for int8 weights.
#include "dispatch.cuh"

namespace nm_act {

cudaError_t launch_gather_int8(const GatherParams& params, const GatherLaunch& launch) {
  return launch_gather_bits8<WeightInt8>(params, launch);
}

}  // namespace nm_act
