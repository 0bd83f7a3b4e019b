// sm_80, fp16, weight [out, in].
#include "../sparse_sm80.cuh"

namespace nm_act {

template cudaError_t run_sparse_gemm_sm80<ElementType::kFloat16, false>(const SparseGemmParams&, cudaStream_t);

}  // namespace nm_act
