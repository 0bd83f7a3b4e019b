// bf16 values, fp32 output, weight [in, out], tile 128x128x128.
#include "../sparse_sm90.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm90<ElementType::kBFloat16, ElementType::kFloat32, true, GemmTile::k128x128x128,
                                          GemmEpilogue::kPlain>(const SparseGemmParams&, const GemmLaunch&);
template cudaError_t run_sparse_gemm_sm90<ElementType::kBFloat16, ElementType::kFloat32, true, GemmTile::k128x128x128,
                                          GemmEpilogue::kFull>(const SparseGemmParams&, const GemmLaunch&);

}  // namespace nm_act
