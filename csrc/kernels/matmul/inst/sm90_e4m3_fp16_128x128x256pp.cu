// e4m3 values and weight [out, in], fp16 output, tile 128x128x256 ping-pong, fast accumulation.
#include "../sparse_sm90.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kFloat16, false,
                                          GemmTile::k128x128x256PingPong, GemmEpilogue::kPlain>(const SparseGemmParams&,
                                                                                                const GemmLaunch&);
template cudaError_t run_sparse_gemm_sm90<ElementType::kE4M3, ElementType::kFloat16, false,
                                          GemmTile::k128x128x256PingPong, GemmEpilogue::kFull>(const SparseGemmParams&,
                                                                                               const GemmLaunch&);

}  // namespace nm_act
