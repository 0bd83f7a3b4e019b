// 2:4 sparse GEMM for sm_90a: y[tokens, out] = epilogue(A @ W^T), where the activation A is the sparse operand of
// wgmma.sp, from the CUTLASS 3.x sparse collectives (TMA, warp-specialised, persistent).
//
//   A   values [tokens, in / 2] row-major, with metadata in the layout of Sm90GemmSparseConfig (format/metadata.h)
//   W   [out, in] (K-major) or, 16-bit only, [in, out] (N-major). Both run at the same speed with the same tile, so one
//       [in, out] copy of a weight serves this kernel and the gather kernel, which skips rows.
//   y   rows y_stride elements apart; the epilogue in float32, from registers (direct_epilogue.cuh) or as a visitor
//       tree of CUTLASS's:
//         kPlain, 16-bit  acc + bias
//         kPlain, e4m3    column_scale * (row_scale * acc) + bias
//         kFull           column_scale * (row_scale * acc + eta (x) shift_out) + bias
//         kResidual       residual + kPlain, rounded before and after the sum
//       A null vector stands for ones (a factor) or zeros (a term), filled in once per tile without loads.
//
// Limits: in_features % 16 == 0 (32 for e4m3), out_features % 8 == 0 (16 for e4m3), 16-byte aligned pointers and weight
// rows.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <type_traits>

#include "direct_epilogue.cuh"
#include "direct_kernel.cuh"
#include "overlapped_mainloop.cuh"
#include "paced_mainloop.cuh"
#include "sparse_gemm.h"
#include "split_scheduler.cuh"

namespace nm_act {
namespace sm90 {

template <ElementType kType>
using CutlassElement = std::conditional_t<
    kType == ElementType::kBFloat16, cutlass::bfloat16_t,
    std::conditional_t<kType == ElementType::kFloat16, cutlass::half_t,
                       std::conditional_t<kType == ElementType::kE4M3, cutlass::float_e4m3_t, float>>>;

// The same of the pruning kernels, for 16 bits.
template <ElementType kType>
using HalfElement = std::conditional_t<kType == ElementType::kBFloat16, BFloat16, Float16>;

enum class Schedule { kCooperative, kPingPong, kSplit };

enum class Loop { kPlain, kOverlapped };

template <int kTokens, int kOutputs, int kFeatures, int kTokenTiles, int kOutputTiles, Schedule kSchedule, Loop kLoop>
struct TileTraits {
  using Shape = cute::Shape<cute::Int<kTokens>, cute::Int<kOutputs>, cute::Int<kFeatures>>;
  using Cluster = cute::Shape<cute::Int<kTokenTiles>, cute::Int<kOutputTiles>, cute::_1>;
  static constexpr bool kPingPong = kSchedule == Schedule::kPingPong;
  static constexpr bool kSplit = kSchedule == Schedule::kSplit;
  static constexpr bool kOverlapped = kLoop == Loop::kOverlapped;
};
template <GemmTile kTile>
struct TileShape;
#define NM_ACT_SHAPE(name, value, tokens, outputs, features, token_tiles, output_tiles, schedule, loop) \
  template <>                                                                                           \
  struct TileShape<GemmTile::name>                                                                      \
      : TileTraits<tokens, outputs, features, token_tiles, output_tiles, Schedule::k##schedule, Loop::k##loop> {};
NM_ACT_TILES(NM_ACT_SHAPE)
#undef NM_ACT_SHAPE

// The epilogue's visitor tree and its arguments.
template <class Tile, class Output, bool kScaled, GemmEpilogue kEpilogue>
struct Epilogue {
  template <template <class> class Op, class Result = float>
  using Compute = cutlass::epilogue::fusion::Sm90Compute<Op, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class Node, class... Children>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Node, Children...>;
  using PerToken = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float>;
  using PerOutput = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Output, float>;
  using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;

  static constexpr bool kFull = kEpilogue == GemmEpilogue::kFull;
  using Shift = Tree<Compute<cutlass::multiplies>, PerToken, PerOutput>;
  using Shifted = Tree<Compute<cutlass::homogeneous_multiply_add>, PerToken, Accumulator, Shift>;
  using Scaled = Tree<Compute<cutlass::multiplies>, PerToken, Accumulator>;
  using Inner = std::conditional_t<kFull, Shifted, Scaled>;
  using Layer = std::conditional_t<kFull || kScaled,
                                   Tree<Compute<cutlass::homogeneous_multiply_add, Output>, PerOutput, Inner, Bias>,
                                   Tree<Compute<cutlass::plus, Output>, Accumulator, Bias>>;
  static constexpr bool kResidual = kEpilogue == GemmEpilogue::kResidual;
  using Residual = cutlass::epilogue::fusion::Sm90SrcFetch<Output>;
  using Callbacks = std::conditional_t<kResidual, Tree<Compute<cutlass::plus, Output>, Residual, Layer>, Layer>;

  static typename Callbacks::Arguments arguments(const SparseGemmParams& params) {
    if constexpr (kResidual) {
      return {{}, layer(params), {}};
    } else {
      return layer(params);
    }
  }

  static typename Layer::Arguments layer(const SparseGemmParams& params) {
    const typename Bias::Arguments bias{static_cast<const Output*>(params.bias), Output(0)};
    const typename PerToken::Arguments row_scale{params.row_scale, 1.0f};
    const typename PerOutput::Arguments column_scale{params.column_scale, 1.0f};
    if constexpr (kFull) {
      const typename PerToken::Arguments eta{params.eta, 1.0f};
      const typename PerOutput::Arguments shift_out{params.shift_out, 0.0f};
      return {column_scale, {row_scale, {}, {eta, shift_out, {}}, {}}, bias, {}};
    } else if constexpr (kScaled) {
      return {column_scale, {row_scale, {}, {}}, bias, {}};
    } else {
      return {{}, bias, {}};
    }
  }
};

// What a tile, a type and a weight storage determine: everything but the epilogue.
template <ElementType kValue, bool kWeightInOut, GemmTile kTile>
struct GemmTypes {
  static constexpr bool kE4M3 = kValue == ElementType::kE4M3;
  static_assert(!kE4M3 || !kWeightInOut, "wgmma takes e4m3 weights K-major only");
  static_assert(kE4M3 == (cute::size<2>(typename TileShape<kTile>::Shape{}) >= 128),
                "16-bit metadata is laid out for tiles 64 features deep, 8-bit metadata for 128 and more");
  using Value = CutlassElement<kValue>;
  using Tile = typename TileShape<kTile>::Shape;
  using Cluster = typename TileShape<kTile>::Cluster;
  static constexpr bool kPingPong = TileShape<kTile>::kPingPong;
  using MainloopSchedule =
      std::conditional_t<kE4M3,
                         std::conditional_t<kPingPong, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                            cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum>,
                         std::conditional_t<kPingPong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                            cutlass::gemm::KernelTmaWarpSpecializedCooperative>>;
  using EpilogueSchedule = std::conditional_t<kPingPong, cutlass::epilogue::TmaWarpSpecialized,
                                              cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using WeightLayout = std::conditional_t<kWeightInOut, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  template <class CollectiveEpilogue>
  using CutlassMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Value, cutlass::layout::RowMajor, 32 / sizeof(Value),
      Value, WeightLayout, 16 / sizeof(Value), float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp;
  template <class Base>
  using Loads = std::conditional_t<can_pace(kTile), PacedMainloop<Base>, Base>;
  template <class Base>
  using Products = std::conditional_t<TileShape<kTile>::kOverlapped, OverlappedMainloop<Base>, Base>;
  template <class CollectiveEpilogue>
  using Mainloop = Products<Loads<CutlassMainloop<CollectiveEpilogue>>>;
  template <class CollectiveMainloop, class CollectiveEpilogue>
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue,
      std::conditional_t<TileShape<kTile>::kSplit, SplitScheduler, cutlass::gemm::PersistentScheduler>>;

  // K-tiles of a block in the waves that fill all multiprocessors.
  static uint32_t paced_steps(const SparseGemmParams& params, const GemmLaunch& launch) {
    const auto sizes = cute::make_shape(params.tokens, params.out_features, params.in_features);
    const auto [rows, columns, k_tiles] = cute::ceil_div(sizes, Tile{});
    return static_cast<uint32_t>(int64_t{rows} * columns / launch.device.multiprocessors * k_tiles);
  }

  // Arguments of a kernel, without its epilogue's.
  template <class Kernel>
  static typename Kernel::Arguments arguments(const SparseGemmParams& params, const GemmLaunch& launch) {
    using CollectiveMainloop = typename Kernel::CollectiveMainloop;
    using SparseConfig = typename CollectiveMainloop::SparseConfig;
    const auto shape = cute::make_shape(params.tokens, params.out_features, params.in_features, 1);
    typename CollectiveMainloop::StrideB weight_stride{};
    cute::get<kWeightInOut ? 1 : 0>(weight_stride) = params.weight_stride;

    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = shape;
    arguments.mainloop.ptr_A = static_cast<const Value*>(params.values);
    arguments.mainloop.layout_a = SparseConfig::fill_layoutA(shape);
    arguments.mainloop.ptr_B = static_cast<const Value*>(params.weight);
    arguments.mainloop.dB = weight_stride;
    arguments.mainloop.ptr_E = reinterpret_cast<const typename CollectiveMainloop::ElementE*>(params.metadata);
    arguments.mainloop.layout_e = SparseConfig::fill_layoutE(shape);
    if constexpr (can_pace(kTile)) {
      if (launch.config.paced) arguments.mainloop.pace = {next_pace_slot(), paced_steps(params, launch)};
    }
    arguments.hw_info.sm_count = launch.device.multiprocessors;
    arguments.scheduler.max_swizzle_size = launch.config.swizzle;
    using Raster = std::remove_reference_t<decltype(arguments.scheduler.raster_order)>;
    arguments.scheduler.raster_order = launch.config.raster == GemmRaster::kAlongTokens    ? Raster::AlongM
                                       : launch.config.raster == GemmRaster::kAlongOutputs ? Raster::AlongN
                                                                                           : Raster::Heuristic;
    return arguments;
  }
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
struct SparseGemm : GemmTypes<kValue, kWeightInOut, kTile> {
  using Types = GemmTypes<kValue, kWeightInOut, kTile>;
  using Output = CutlassElement<kOutput>;
  using Fusion = Epilogue<typename Types::Tile, Output, Types::kE4M3, kEpilogue>;
  // Where it was faster: 128x256 in e4m3. Ping-pong tiles hide CUTLASS's epilogue, a residual is loaded by it, 256x192 was
  // 2 % slower and 16-bit tiles no faster (docs/kernels/sparse_gemm.md); of 256x160 it was not tried.
  static constexpr bool kDirect = Types::kE4M3 && TileShape<kTile>::kOverlapped && !Types::kPingPong &&
                                  !Fusion::kResidual && cute::size<0>(typename Types::Tile{}) == 128;
  using Element = HalfElement<kOutput>;
  struct FromRegisters {
    using CollectiveOp = DirectEpilogue<Element, Output, typename Types::Tile, Fusion::kFull>;
  };
  struct FromSharedMemory : cutlass::epilogue::collective::CollectiveBuilder<
                                cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, typename Types::Tile,
                                typename Types::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
                                std::conditional_t<Fusion::kResidual, Output, void>, cutlass::layout::RowMajor,
                                16 / sizeof(Output), Output, cutlass::layout::RowMajor, 16 / sizeof(Output),
                                typename Types::EpilogueSchedule, typename Fusion::Callbacks> {};
  using CollectiveEpilogue = typename std::conditional_t<kDirect, FromRegisters, FromSharedMemory>::CollectiveOp;
  using CutlassKernel =
      typename Types::template Kernel<typename Types::template Mainloop<CollectiveEpilogue>, CollectiveEpilogue>;
  using Kernel = std::conditional_t<kDirect && !TileShape<kTile>::kSplit, DirectKernel<CutlassKernel>, CutlassKernel>;

  static typename Kernel::Arguments arguments(const SparseGemmParams& params, const GemmLaunch& launch) {
    auto arguments = Types::template arguments<Kernel>(params, launch);
    if constexpr (kDirect) {
      using Raw = typename Element::Raw;
      arguments.epilogue = {static_cast<Raw*>(params.y),
                            params.y_stride,
                            static_cast<const Raw*>(params.bias),
                            params.row_scale,
                            params.column_scale,
                            params.eta,
                            params.shift_out};
    } else {
      arguments.epilogue.thread = Fusion::arguments(params);
      arguments.epilogue.ptr_D = static_cast<Output*>(params.y);
      cute::get<0>(arguments.epilogue.dD) = params.y_stride;
      if constexpr (Fusion::kResidual) {
        arguments.epilogue.ptr_C = static_cast<const Output*>(params.residual);
        arguments.epilogue.dC = arguments.epilogue.dD;
      }
    }
    if constexpr (TileShape<kTile>::kSplit) {
      using Mode = decltype(arguments.scheduler.decomposition_mode);
      const bool streamed = launch.config.splits == kStreamed;
      arguments.scheduler.splits = streamed ? 1 : launch.config.splits;
      arguments.scheduler.reduction_mode = decltype(arguments.scheduler.reduction_mode)::Deterministic;
      arguments.scheduler.decomposition_mode = streamed ? Mode::StreamK : Mode::SplitK;
    }
    return arguments;
  }
};

// Runs a kernel, or only writes the bytes of its workspace. metadata_tokens: of the whole operand.
template <class Kernel>
cudaError_t run(typename Kernel::Arguments arguments, int metadata_tokens, const GemmLaunch& launch) {
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  if (launch.workspace_bytes != nullptr) {
    *launch.workspace_bytes = Adapter::get_workspace_size(arguments);
    return cudaSuccess;
  }
  if (Adapter::can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  // CUTLASS allows no other strides of the metadata than those of an operand of these tokens alone; a part of an
  // operand has the whole's.
  auto whole = arguments.problem_shape;
  cute::get<0>(whole) = metadata_tokens;
  auto& layout = arguments.mainloop.layout_e;
  layout = cute::make_layout(layout.shape(), Kernel::CollectiveMainloop::SparseConfig::fill_layoutE(whole).stride());
  // An overlapped launch starts while the previous kernel ends. CUTLASS's producer warp waits for that kernel
  // (griddepcontrol.wait) before it loads. The consumer warps read the epilogue's vectors after a tile's main loop, and
  // so after the producer's wait, or wait themselves (direct_kernel.cuh).
#ifndef CUTLASS_ENABLE_GDC_FOR_SM90
#error "an overlapped launch waits for its operands only with CUTLASS_ENABLE_GDC_FOR_SM90"
#endif
  Adapter gemm;
  if (gemm.initialize(arguments, launch.workspace, launch.stream) != cutlass::Status::kSuccess ||
      gemm.run(launch.stream, nullptr, /*launch_with_pdl=*/launch.config.overlapped) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error != cudaSuccess ? error : cudaErrorLaunchFailure;
  }
  return cudaGetLastError();
}

}  // namespace sm90

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile, GemmEpilogue kEpilogue>
cudaError_t run_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch) {
  using Gemm = sm90::SparseGemm<kValue, kOutput, kWeightInOut, kTile, kEpilogue>;
  return sm90::run<typename Gemm::Kernel>(Gemm::arguments(params, launch), params.metadata_tokens, launch);
}

}  // namespace nm_act
