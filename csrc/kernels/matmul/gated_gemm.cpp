// Dispatch of gated_gemm.
#include "gated_gemm.h"

namespace nm_act {

bool gated_gemm_supports(const GatedGemmParams& params, GemmDevice device) {
  const SparseGemmParams& product = params.product;
  const bool plain = product.row_scale == nullptr && product.eta == nullptr && product.shift_out == nullptr &&
                     product.column_scale == nullptr && product.bias == nullptr && product.residual == nullptr;
  return device.compute_capability_major == 9 && product.value_type != ElementType::kE4M3 && product.weight_in_out &&
         product.out_features % 32 == 0 && plain && sparse_gemm_supports(product, device);
}

cudaError_t launch_gated_gemm(const GatedGemmParams& params, const GemmLaunch& launch) {
  if (!gated_gemm_supports(params, launch.device)) return cudaErrorInvalidValue;
  if (params.product.tokens == 0 || params.product.out_features == 0) return cudaSuccess;
  return params.product.value_type == ElementType::kBFloat16
             ? run_gated_gemm_sm90<ElementType::kBFloat16>(params, launch)
             : run_gated_gemm_sm90<ElementType::kFloat16>(params, launch);
}

}  // namespace nm_act
