// A 2:4 sparse GEMM for sm_90a over a merged gate and up weight, with SiLU(gate) * up and the packing of its 2:4
// selection in the epilogue: the mainloop of sparse_sm90.cuh over both halves of the weight (gated_mainloop.cuh), and
// gated_epilogue.cuh.
#pragma once

#include "gated_epilogue.cuh"
#include "gated_gemm.h"
#include "gated_mainloop.cuh"
#include "sparse_sm90.cuh"

namespace nm_act {
namespace sm90 {

// The weight is stored [in, out], as in an optimized model.
template <ElementType kValue>
struct GatedGemm {
  using Types = GemmTypes<kValue, /*kWeightInOut=*/true, wide_tile(kValue)>;
  using Element = HalfElement<kValue>;
  static constexpr int kHalf = cute::size<1>(typename Types::Tile{}) / 2;
  using CollectiveEpilogue =
      GatedEpilogue<Element, CutlassElement<kValue>, cute::size<0>(typename Types::Tile{}), kHalf>;
  using CollectiveMainloop = GatedMainloop<typename Types::template Mainloop<CollectiveEpilogue>>;
  using Kernel = typename Types::template Kernel<CollectiveMainloop, CollectiveEpilogue>;

  static typename Kernel::Arguments arguments(const GatedGemmParams& params, const GemmLaunch& launch) {
    const SparseGemmParams& product = params.product;
    auto arguments = Types::template arguments<Kernel>(product, launch);
    // From the gate's weight to that of up.
    cute::get<2>(arguments.mainloop.dB) = int64_t{product.out_features / 2};
    arguments.epilogue = {static_cast<typename Element::Raw*>(product.y), params.metadata, params.activation};
    return arguments;
  }
};

}  // namespace sm90

template <ElementType kValue>
cudaError_t run_gated_gemm_sm90(const GatedGemmParams& params, const GemmLaunch& launch) {
  using Gemm = sm90::GatedGemm<kValue>;
  return sm90::run<typename Gemm::Kernel>(Gemm::arguments(params, launch), params.product.metadata_tokens, launch);
}

}  // namespace nm_act
