// A consumer loop for CUTLASS's sparse TMA collectives that keeps one k-tile of wgmma in flight.
//
// CUTLASS's own loop waits for every wgmma of a k-tile before it issues those of the next: the metadata registers are
// loaded once per tile, and an asynchronous wgmma may still be reading them. Here two register sets alternate: tile i
// uses set i % 2, which tile i - 2 no longer reads, so the tensor cores already have the next tile when one ends. A
// stage of shared memory is released when its tile is done, as in CUTLASS.
//
// A stage holds its metadata in the order of the sm90 layouts (format/metadata.h): slabs of T features, each with its
// 64-token tiles one after the other. A thread needs one 32-bit word per 64-token tile and wgmma.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "../format/metadata.h"

namespace nm_act {
namespace sm90 {

template <class Base>
struct OverlappedMainloop : Base {
  using typename Base::ElementEMma;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TiledMma;
  using Params = typename Base::Params;

  static constexpr int kTileTokens = cute::size<0>(typename Base::TileShape{});
  static constexpr int kTileFeatures = cute::size<2>(typename Base::TileShape{});
  static constexpr bool kBits8 = cute::sizeof_bits_v<typename Base::ElementB> == 8;
  static constexpr int kInstructionFeatures = kBits8 ? 64 : 32;
  static constexpr int kWarpGroups = cute::size(TiledMma{}) / 128;
  static constexpr int kRowBlocks = kTileTokens / (64 * kWarpGroups);  // 64-token blocks per warp group
  static constexpr int kSteps = kTileFeatures / kInstructionFeatures;  // wgmma per k-tile, along the features
  static constexpr int kStageBytes = kTileTokens * kTileFeatures / 8;
  static constexpr MetadataLayout kLayout = kBits8 ? MetadataLayout::kSm90Bits8 : MetadataLayout::kSm90Bits16T64;
  static constexpr int kSlabFeatures = static_cast<int>(metadata_tile_features(kLayout));
  static_assert(kTileFeatures % kSlabFeatures == 0, "a k-tile holds whole metadata tiles");

  struct Metadata {
    uint32_t word[kSteps][kRowBlocks];
  };

  static CUTLASS_DEVICE void load_metadata(Metadata& metadata, const uint8_t* stage, int thread) {
    const int first_block = thread / 128;
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < kRowBlocks; ++block) {
      CUTLASS_PRAGMA_UNROLL
      for (int slab = 0; slab < kTileFeatures / kSlabFeatures; ++slab) {
        const uint8_t* words = stage + slab * (kTileTokens * kSlabFeatures / 8) +
                               (first_block + kWarpGroups * block) * (64 * kSlabFeatures / 8) +
                               wgmma_metadata_byte(kLayout, thread % 128, 0);
        if constexpr (kBits8) {
          // Of rows 8 apart, which two adjacent threads have, the words of a step lie in one bank: the odd threads load
          // those of the second step first.
          const bool odd = thread % 2 != 0;
          const uint32_t first = *reinterpret_cast<const uint32_t*>(words + (odd ? 8 : 0));
          const uint32_t second = *reinterpret_cast<const uint32_t*>(words + (odd ? 0 : 8));
          metadata.word[2 * slab][block] = odd ? second : first;
          metadata.word[2 * slab + 1][block] = odd ? first : second;
        } else {  // the words of a tile's steps are adjacent
          const uint2 two = *reinterpret_cast<const uint2*>(words);
          metadata.word[2 * slab][block] = two.x;
          metadata.word[2 * slab + 1][block] = two.y;
        }
      }
    }
  }

  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& accumulators, int tiles,
                          int thread, TensorStorage& shared, const Params&) {
    using namespace cute;
    const auto smem_a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const auto smem_b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Base::SmemLayoutB{});
    const uint8_t* smem_e = reinterpret_cast<const uint8_t*>(&shared.smem_E);
    const int warp_group = __shfl_sync(0xFFFFFFFFu, thread / 128, 0);
    TiledMma tiled_mma;
    const auto slice = tiled_mma.get_thread_slice(warp_group * 128);
    const auto a = slice.make_fragment_A(slice.partition_A(smem_a));  // (atom, row block, step, stage)
    const auto b = slice.make_fragment_B(slice.partition_B(smem_b));
    const auto fragment = make_layout(make_shape(Int<32>{}, Int<kRowBlocks>{}));  // 32 features per word

    PipelineState release = read;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    const auto issue = [&](Metadata& metadata) {
      pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
      load_metadata(metadata, smem_e + read.index() * kStageBytes, thread);
      warpgroup_fence_operand(accumulators);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const auto e = make_tensor(recast_ptr<ElementEMma>(&metadata.word[step][0]), fragment);
        cute::gemm(tiled_mma, make_zip_tensor(a(_, _, step, read.index()), e), b(_, _, step, read.index()),
                   accumulators);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++read;
    };
    const auto issue_next = [&](Metadata& metadata) {
      issue(metadata);
      warpgroup_wait<1>();
      warpgroup_fence_operand(accumulators);
      pipeline.consumer_release(release);
      ++release;
    };

    Metadata even, odd;
    if (tiles > 0) issue(even);
    CUTLASS_PRAGMA_NO_UNROLL
    for (--tiles; tiles > 1; tiles -= 2) {
      issue_next(odd);
      issue_next(even);
    }
    if (tiles > 0) issue_next(odd);
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
  }

  // Releases the stage of the last tile, which mma() still holds.
  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState release, int tiles) {
    if (tiles == 0) return;
    release.advance(tiles - 1);
    pipeline.consumer_release(release);
  }
};

}  // namespace sm90
}  // namespace nm_act
