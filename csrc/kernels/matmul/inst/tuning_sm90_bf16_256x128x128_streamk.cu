// Candidate for benchmarks/tune.py: bf16 values, weight [out, in], bf16 output.
#include "../sparse_sm90.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm90<ElementType::kBFloat16, ElementType::kBFloat16, false,
                                          GemmTile::k256x128x128StreamK, GemmEpilogue::kPlain>(const SparseGemmParams&,
                                                                                               const GemmLaunch&);
template cudaError_t run_sparse_gemm_sm90<ElementType::kBFloat16, ElementType::kBFloat16, false,
                                          GemmTile::k256x128x128StreamK, GemmEpilogue::kFull>(const SparseGemmParams&,
                                                                                              const GemmLaunch&);
template size_t sparse_gemm_workspace_sm90<ElementType::kBFloat16, ElementType::kBFloat16, false,
                                           GemmTile::k256x128x128StreamK>(const SparseGemmParams&, const GemmLaunch&);

}  // namespace nm_act
