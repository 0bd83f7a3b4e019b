// Dispatch of gated_gemm: the table of instances, and the call.
#include "gated_gemm.h"

namespace nm_act {
namespace {

struct Instance {
  ElementType value_type;
  ElementType y_type;
  bool weight_in_out;
  cudaError_t (*run)(const GatedGemmParams&, const GemmLaunch&);
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut>
constexpr Instance instance() {
  return {kValue, kOutput, kWeightInOut, run_gated_gemm_sm90<kValue, kOutput, kWeightInOut>};
}

// 16-bit weights are stored [in, out] in an optimized model, e4m3 ones [out, in].
const Instance kInstances[] = {instance<ElementType::kBFloat16, ElementType::kBFloat16, true>(),
                               instance<ElementType::kFloat16, ElementType::kFloat16, true>(),
                               instance<ElementType::kE4M3, ElementType::kBFloat16, false>()};

const Instance* find(const SparseGemmParams& product) {
  for (const Instance& instance : kInstances) {
    if (instance.value_type == product.value_type && instance.y_type == product.y_type &&
        instance.weight_in_out == product.weight_in_out) {
      return &instance;
    }
  }
  return nullptr;
}

}  // namespace

bool gated_gemm_supports(const GatedGemmParams& params, GemmDevice device) {
  const SparseGemmParams& product = params.product;
  // A half of the weight is loaded through a descriptor of its own, and so starts on 16 bytes. Scores of the packed
  // result would need the whole token, so its values have the type of z.
  const int alignment = product.weight_in_out ? 8 : 1;
  return device.compute_capability_major == 9 && product.out_features % 2 == 0 &&
         product.out_features / 2 % alignment == 0 && sparse_gemm_supports(product, device) &&
         find(product) != nullptr && product.bias == nullptr && product.shift_out == nullptr &&
         product.eta == nullptr && (params.metadata == nullptr || product.value_type != ElementType::kE4M3);
}

cudaError_t launch_gated_gemm(const GatedGemmParams& params, const GemmLaunch& launch) {
  if (!gated_gemm_supports(params, launch.device)) return cudaErrorInvalidValue;
  if (params.product.tokens == 0 || params.product.out_features == 0) return cudaSuccess;
  return find(params.product)->run(params, launch);
}

}  // namespace nm_act
