// The interface between dispatch (plain C++) and the GEMM instances (CUTLASS): one function template for each
// architecture. CMakeLists.txt generates a source for each sm_90a instance (tiles.h); those for sm_80 are in inst/.
#pragma once

#include "config.h"

namespace nm_act {

// The vectors that the epilogue reads. kPlain is what ordinary inference needs: the bias for 16-bit values; row scale,
// column scale and bias for e4m3. kFull is the whole formula of SparseGemmParams.
enum class GemmEpilogue : int { kPlain = 0, kFull = 1 };

struct GemmLaunch {
  GemmConfig config;
  int multiprocessors;
  cudaStream_t stream;
  bool overlapped;  // programmatic dependent launch: start while the previous kernel ends
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Serves every epilogue, but neither e4m3 values nor outputs of another type than the values.
template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream);

// launch_sparse_gemm on sm_90a with the caller's configuration, for tuning.
cudaError_t launch_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
