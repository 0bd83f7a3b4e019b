// sm_80, bf16, weight [in, out].
#include "../sparse_sm80.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm80<ElementType::kBFloat16, true>(const SparseGemmParams&, cudaStream_t);

}  // namespace nm_act
