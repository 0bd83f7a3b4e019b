// Launches the compiled kernel for a problem's types and number of tokens.
#pragma once

#include "gather.cuh"
#include "instances.h"

namespace nm_act {

template <class E, class W, int kTokens>
cudaError_t launch_gather_kernel(const GatherParams& params, const GatherLaunch& launch) {
  return launch_kernel(gather_kernel<E, W, kTokens>, launch.shape, launch.stream, params, launch.config, launch.vector);
}

template <class E, class W, int kMaxTokens>
cudaError_t launch_gather_tokens(const GatherParams& params, const GatherLaunch& launch) {
  switch (compiled_tokens(params.tokens)) {
    case 1: return launch_gather_kernel<E, W, 1>(params, launch);
    case 2: return launch_gather_kernel<E, W, 2>(params, launch);
    case 4: return launch_gather_kernel<E, W, 4>(params, launch);
    default:
      if constexpr (kMaxTokens == 8) return launch_gather_kernel<E, W, 8>(params, launch);
      return cudaErrorInvalidValue;
  }
}

// 8-bit weights, with inputs of either 16-bit type.
template <class W>
cudaError_t launch_gather_bits8(const GatherParams& params, const GatherLaunch& launch) {
  return params.x_type == ElementType::kBFloat16 ? launch_gather_tokens<BFloat16, W, kFewTokens>(params, launch)
                                                 : launch_gather_tokens<Float16, W, kFewTokens>(params, launch);
}

}  // namespace nm_act
