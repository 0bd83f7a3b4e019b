// The interface between dispatch (plain C++) and the GEMM instances (CUTLASS): one function template for each
// architecture. CMakeLists.txt generates a source for each tile (tiles.h), type and weight storage.
#pragma once

#include "tiles.h"

namespace nm_act {

// The vectors that the epilogue reads. kPlain: see has_plain_epilogue. kFull is the whole formula of SparseGemmParams
// except the residual; kResidual is kPlain plus the residual.
enum class GemmEpilogue : int { kPlain = 0, kFull = 1, kResidual = 2 };

struct GemmLaunch {
  GemmDevice device;
  GemmConfig config;  // of sm_90; select_plan's, or a caller's own for tuning
  cudaStream_t stream;
  void* workspace;          // the bytes that sparse_gemm_workspace returns, 16-byte aligned; null if there are none
  size_t* workspace_bytes;  // if not null, only this is written and nothing is launched
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch);

// Supports every epilogue, but neither e4m3 values nor outputs of a type other than that of the values.
template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream);

// Number of bytes of launch.workspace, which is not read here.
size_t sparse_gemm_workspace(const SparseGemmParams& params, GemmLaunch launch);

// Refuses a residual where the tile's kernel does not add it: choose_packed in ops/choice.h knows.
cudaError_t launch_sparse_gemm(const SparseGemmParams& params, const GemmLaunch& launch);

}  // namespace nm_act
