// The seam between dispatch (plain C++) and the GEMM instantiations (CUTLASS): a function template for each architecture.
// CMakeLists.txt writes a source for each combination of tile (tiles.h), type and weight storage.
#pragma once

#include "config.h"

namespace nm_act {

// Which vectors the epilogue reads. kPlain is what ordinary inference needs: bias for 16-bit values; row scale, column
// scale and bias for e4m3. kFull is the whole formula of SparseGemmParams.
enum class GemmEpilogue : int { kPlain = 0, kFull = 1 };

struct GemmLaunch {
  GemmConfig config;
  int multiprocessors;
  cudaStream_t stream;
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Any epilogue; e4m3 and outputs of another type are not served.
template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream);

}  // namespace nm_act
