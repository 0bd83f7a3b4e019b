// The compiled gather kernels, by type of the weight; each is defined in a source file of its own.
#pragma once

#include "../launch.cuh"
#include "config.h"

namespace nm_act {

struct GatherLaunch {
  GatherConfig config;
  LaunchShape shape;
  bool vector;  // x, channel_scale and shift can be read 16 bytes at a time
  cudaStream_t stream;
};

cudaError_t launch_gather_bits16(const GatherParams& params, const GatherLaunch& launch);
cudaError_t launch_gather_e4m3(const GatherParams& params, const GatherLaunch& launch);
cudaError_t launch_gather_int8(const GatherParams& params, const GatherLaunch& launch);

}  // namespace nm_act
