// The interface between dispatch and the instances of the gated GEMM (gated_sm90.cuh). CMakeLists.txt generates a source
// for each.
#pragma once

#include "sparse_gemm.h"

namespace nm_act {

// The widest tile of each type: a merged gate and up projection fills its grid.
constexpr GemmTile gated_tile(ElementType value_type) {
  return value_type == ElementType::kE4M3 ? GemmTile::k128x256x128E4M3 : GemmTile::k128x256x64;
}

inline GemmConfig gated_config(const GemmProblem& problem) {
  return configure(problem, facts_of(gated_tile(problem.value_type)));
}

template <ElementType kValue, ElementType kOutput, bool kWeightInOut>
cudaError_t run_gated_gemm_sm90(const GatedGemmParams& params, const GemmLaunch& launch);

cudaError_t launch_gated_gemm(const GatedGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
