// Gather kernels for weights of the input's type.
#include "dispatch.cuh"

namespace nm_act {

cudaError_t launch_gather_bits16(const GatherParams& params, const GatherLaunch& launch) {
  return params.x_type == ElementType::kBFloat16
             ? launch_gather_tokens<BFloat16, Weight16<BFloat16>, kMaxGatherTokens>(params, launch)
             : launch_gather_tokens<Float16, Weight16<Float16>, kMaxGatherTokens>(params, launch);
}

}  // namespace nm_act
