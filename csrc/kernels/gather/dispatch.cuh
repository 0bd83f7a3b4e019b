// From the problem's sizes to a compiled kernel.
#pragma once

#include "gather.cuh"
#include "instances.h"

namespace nm_act {

template <class E, class W, int kMaxTokens>
cudaError_t launch_gather_tokens(const GatherParams& params, const GatherLaunch& launch) {
  const auto run = [&](auto* kernel) {
    return launch_kernel(kernel, launch.shape, launch.stream, params, launch.config, launch.vector);
  };
  switch (compiled_tokens(params.tokens)) {
    case 1: return run(gather_kernel<E, W, 1>);
    case 2: return run(gather_kernel<E, W, 2>);
    case 4: return run(gather_kernel<E, W, 4>);
    default:
      if constexpr (kMaxTokens == 8) return run(gather_kernel<E, W, 8>);
      return cudaErrorInvalidValue;
  }
}

// 8-bit weights with inputs of either 16-bit type.
template <class W>
cudaError_t launch_gather_bits8(const GatherParams& params, const GatherLaunch& launch) {
  return params.x_type == ElementType::kBFloat16 ? launch_gather_tokens<BFloat16, W, kMaxDecodeTokens>(params, launch)
                                                 : launch_gather_tokens<Float16, W, kMaxDecodeTokens>(params, launch);
}

}  // namespace nm_act
