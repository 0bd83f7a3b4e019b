// The interface between dispatch and the instances of the gated GEMM (gated_sm90.cuh). CMakeLists.txt generates a
// source for each.
#pragma once

#include "sparse_gemm.h"

namespace nm_act {

template <ElementType kValue>
cudaError_t run_gated_gemm_sm90(const GatedGemmParams& params, const GemmLaunch& launch);

cudaError_t launch_gated_gemm(const GatedGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
