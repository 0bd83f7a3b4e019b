// The seam between dispatch (plain C++) and the GEMM instantiations (CUTLASS): one function template, instantiated a
// combination a file in inst/.
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
  bool overlapped;  // programmatic dependent launch: start while the kernel before ends
  void* workspace;  // sparse_gemm_workspace's bytes, 16-byte aligned; null if none
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Bytes of scratch memory for partial sums and barriers; instantiated for the tiles that split along the features.
template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile>
size_t sparse_gemm_workspace_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Any epilogue; e4m3 and outputs of another type are not served.
template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream);

// launch_sparse_gemm on sm_90a with a configuration of the caller's choice, for tuning.
cudaError_t launch_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Bytes that such a launch needs in launch.workspace (which is not read here).
size_t sparse_gemm_workspace(const SparseGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
