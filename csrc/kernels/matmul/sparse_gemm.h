// The seam between dispatch (plain C++) and the GEMM instantiations (CUTLASS): a function template for each architecture.
// CMakeLists.txt writes a source for each combination of tile (tiles.h), type and weight storage.
#pragma once

#include "config.h"

namespace nm_act {

// Which vectors the epilogue reads. kPlain is what ordinary inference needs: bias for 16-bit values; row scale, column
// scale and bias for e4m3. kFull is the whole formula of SparseGemmParams.
enum class GemmEpilogue : int { kPlain = 0, kFull = 1 };

struct GemmLaunch {
  GemmDevice device;
  GemmConfig config;  // of sm_90; select_config's, or a caller's own for tuning
  cudaStream_t stream;
  void* workspace;          // as many bytes as workspace_bytes is told, 16-byte aligned; null where none are needed
  size_t* workspace_bytes;  // not null: nothing is launched, only this is written
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Any epilogue; e4m3 and outputs of another type are not served.
template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream);

// Bytes that launch.workspace needs (which is not read here).
size_t sparse_gemm_workspace(const SparseGemmParams& params, GemmLaunch launch);

cudaError_t launch_sparse_gemm(const SparseGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
