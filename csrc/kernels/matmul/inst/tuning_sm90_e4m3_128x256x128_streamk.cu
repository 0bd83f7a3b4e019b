// Candidate for benchmarks/tune.py: e4m3 values, bf16 output.
#include "../sparse_sm90.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kBFloat16, false,
                                          GemmTile::k128x256x128StreamK, GemmEpilogue::kPlain>(const SparseGemmParams&,
                                                                                               const GemmLaunch&);
template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kBFloat16, false,
                                          GemmTile::k128x256x128StreamK, GemmEpilogue::kFull>(const SparseGemmParams&,
                                                                                              const GemmLaunch&);
template size_t sparse_gemm_workspace_sm90<ElementType::kE4M3, ElementType::kBFloat16, false,
                                           GemmTile::k128x256x128StreamK>(const SparseGemmParams&, const GemmLaunch&);

}  // namespace nm_act
