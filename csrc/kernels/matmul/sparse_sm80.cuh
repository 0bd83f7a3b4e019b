// 2:4 sparse GEMM for sm_80, and as compute_80 PTX for later devices: y[tokens, out] = epilogue(A @ W^T), from the
// CUTLASS 2.x multistage sparse kernel (mma.sp.m16n8k32). Its visitor epilogue computes the whole formula of
// SparseGemmParams in float32.
//
//   A   values [tokens, in / 2] row-major, metadata in MetadataLayout::kSm80Bits16
//   W   [out, in] or [in, out]
//   y   rows y_stride elements apart, of the type of the values
//
// The metadata of 32 tokens is interleaved, so the main loop rounds the tokens up to 32 and reads that many rows of
// `values`: they must be allocated, but their contents do not matter. The epilogue gets the real number of tokens.
// Limits: in_features % 32 == 0, out_features % 8 == 0, 16-byte aligned pointers (the epilogue's vectors too) and
// weight rows. The one tile, 128x128x64 with 64x64 warps and three stages, also fits the shared memory of sm_86 and
// sm_89. Its speed on Ampere is unmeasured; its correctness is tested on Hopper through the compute_80 PTX.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_sparse_with_visitor.h>
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include <type_traits>

#include "sparse_gemm.h"

namespace nm_act {
namespace sm80 {

template <ElementType kValue, bool kWeightInOut>
struct SparseGemm {
  using Value = std::conditional_t<kValue == ElementType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  using WeightLayout = std::conditional_t<kWeightInOut, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using Tile = cutlass::gemm::GemmShape<128, 128, 64>;
  using Warp = cutlass::gemm::GemmShape<64, 64, 64>;
  using Instruction = cutlass::gemm::GemmShape<16, 8, 32>;
  static constexpr int kStages = 3;
  static constexpr int kAlignment = 8;

  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, Warp, Value, kAlignment, 1>;
  template <template <class> class Op, class Result = float>
  using Compute =
      cutlass::epilogue::threadblock::VisitorCompute<Op, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class Node, class... Children>
  using Tree = cutlass::epilogue::threadblock::Sm80EVT<Node, Children...>;
  using PerToken =
      cutlass::epilogue::threadblock::VisitorColBroadcast<ThreadMap, float, cute::Stride<cute::_1, cute::_0, int32_t>>;
  using PerOutput =
      cutlass::epilogue::threadblock::VisitorRowBroadcast<ThreadMap, float, cute::Stride<cute::_0, cute::_1, int32_t>>;
  using Bias =
      cutlass::epilogue::threadblock::VisitorRowBroadcast<ThreadMap, Value, cute::Stride<cute::_0, cute::_1, int32_t>>;
  using Store =
      cutlass::epilogue::threadblock::VisitorAuxStore<ThreadMap, Value, cutlass::FloatRoundStyle::round_to_nearest,
                                                      cute::Stride<int64_t, cute::_1, int64_t>>;
  using Accumulator = cutlass::epilogue::threadblock::VisitorAccFetch;
  using Shift = Tree<Compute<cutlass::multiplies>, PerToken, PerOutput>;
  using Shifted = Tree<Compute<cutlass::homogeneous_multiply_add>, PerToken, Accumulator, Shift>;
  using Output = Tree<Compute<cutlass::homogeneous_multiply_add>, PerOutput, Shifted, Bias>;
  using Callbacks = Tree<Store, Output>;

  using Adapter =
      cutlass::gemm::device::SparseGemmWithVisitor<Value, cutlass::layout::RowMajor, Value, WeightLayout, Value,
                                                   cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp,
                                                   cutlass::arch::Sm80, Tile, Warp, Instruction, Callbacks,
                                                   cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>,
                                                   kStages, kAlignment, kAlignment, cutlass::arch::OpMultiplyAdd, 1>;
  using Kernel = typename Adapter::GemmKernel;
  using Swizzle = typename Adapter::ThreadblockSwizzle;

  static typename Kernel::Params kernel_params(const SparseGemmParams& params) {
    const int padded = static_cast<int>(metadata_padded_tokens(MetadataLayout::kSm80Bits16, params.tokens));
    const cutlass::gemm::GemmCoord problem(padded, params.out_features, params.in_features);
    const cutlass::gemm::GemmCoord grid = Swizzle().get_tiled_shape(problem, {Tile::kM, Tile::kN, Tile::kK}, 1);
    const typename PerToken::Arguments row_scale{params.row_scale, 1.0f, {}}, eta{params.eta, 1.0f, {}};
    const typename PerOutput::Arguments shift_out{params.shift_out, 0.0f, {}},
        column_scale{params.column_scale, 1.0f, {}};
    const typename Bias::Arguments bias{static_cast<const Value*>(params.bias), Value(0), {}};
    const typename Store::Arguments store{static_cast<Value*>(params.y), {params.y_stride, cute::_1{}, 0}};
    const typename Callbacks::Arguments callbacks{{column_scale, {row_scale, {}, {eta, shift_out, {}}, {}}, bias, {}},
                                                  store};
    typename Kernel::Params result{
        problem,
        grid,
        {const_cast<Value*>(static_cast<const Value*>(params.values)), params.in_features / 2},
        {const_cast<Value*>(static_cast<const Value*>(params.weight)), static_cast<int>(params.weight_stride)},
        {reinterpret_cast<typename Adapter::ElementE*>(const_cast<uint8_t*>(params.metadata)),
         Adapter::LayoutE::packed({padded, params.in_features / 16})},
        callbacks};
    result.problem_shape = {params.tokens, params.out_features, 1};
    return result;
  }
};

}  // namespace sm80

template <ElementType kValue, bool kWeightInOut>
cudaError_t run_sparse_gemm_sm80(const SparseGemmParams& params, cudaStream_t stream) {
  using Gemm = sm80::SparseGemm<kValue, kWeightInOut>;
  using Kernel = typename Gemm::Kernel;
  const typename Kernel::Params kernel_params = Gemm::kernel_params(params);
  constexpr int kSharedBytes = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  const cudaError_t error =
      cudaFuncSetAttribute(cutlass::Kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid = typename Gemm::Swizzle().get_grid_shape(kernel_params.grid_tiled_shape);
  cutlass::Kernel<Kernel><<<grid, Kernel::kThreadCount, kSharedBytes, stream>>>(kernel_params);
  return cudaGetLastError();
}

}  // namespace nm_act
