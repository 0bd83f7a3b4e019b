// e4m3 values and weight [out, in], fp32 output, tile 128x256x128, fast accumulation.
#include "../sparse_sm90.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kFloat32, false, GemmTile::k128x256x128,
                                          GemmEpilogue::kPlain>(const SparseGemmParams&, const GemmLaunch&);
template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kFloat32, false, GemmTile::k128x256x128,
                                          GemmEpilogue::kFull>(const SparseGemmParams&, const GemmLaunch&);

}  // namespace nm_act
