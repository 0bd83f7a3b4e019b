// The loads of a sparse TMA collective, with the blocks of a launch kept in step.
//
// A persistent block goes through its tiles on its own, so blocks drift apart, and those that share a row of values or
// a column of the weight then read them at different times: once the operands of a wave are larger than L2, they come
// from memory more than once: up to twice the reads, and with large weights a tenth of the time
// (docs/kernels/sparse_gemm.md).
//
// Every 16 k-tiles, one thread of each cluster counts itself in global memory, and waits until there are as many counts
// as if all clusters had come as far as the count before (pacer.h). It is the thread that loads, several k-tiles ahead
// of the tensor cores. Nothing depends on a wait but time: it ends after 20000 clocks, and the cluster then goes on
// alone.
#pragma once

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include <atomic>
#include <cstdint>

#include "pacer.h"

namespace nm_act {
namespace sm90 {

// How a launch is paced.
struct Pace {
  int slot;        // of pace_counters, the launch's own
  uint32_t steps;  // k-tiles of a block in waves that all blocks take part in; 0: unpaced
};

struct alignas(32) PaceCounter {
  unsigned arrived, done;
};
// Launches take the slots in turn. Two that run at once in one slot disturb each other's pace, but leave the counters
// as they were, since they have the same number of clusters: each source has counters of its own.
inline constexpr int kPaceSlots = 256;
static __device__ PaceCounter pace_counters[kPaceSlots];

inline int next_pace_slot() {
  static std::atomic<unsigned> next{0};
  return static_cast<int>(next++ % kPaceSlots);
}

// A counter in global memory.
struct GlobalCounter {
  PaceCounter* at;

  CUTLASS_DEVICE void count() const {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(&at->arrived) : "memory");
  }
  CUTLASS_DEVICE unsigned counts() const {
    unsigned sum;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(sum) : "l"(&at->arrived) : "memory");
    return sum;
  }
  CUTLASS_DEVICE bool leave(unsigned clusters) const {
    __threadfence();
    return atomicInc(&at->done, clusters - 1) == clusters - 1;
  }
  CUTLASS_DEVICE void clear() const {
    __threadfence();
    atomicExch(&at->arrived, 0);
  }
  CUTLASS_DEVICE static unsigned now() { return clock(); }
};

template <class Base>
struct PacedMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using Cluster = typename Base::DispatchPolicy::ClusterShape;

  struct Arguments : Base::Arguments {
    Pace pace;
  };
  struct Params : Base::Params {
    Pace pace;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& arguments, void* workspace) {
    return {Base::to_underlying_arguments(problem, arguments, workspace), arguments.pace};
  }

  template <class Inputs, class BlockCoord, class TileIterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState write, const Inputs& inputs,
                           const BlockCoord& block, TileIterator tile, int tiles, int, uint32_t block_rank_in_cluster,
                           TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const auto smem_b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Base::SmemLayoutB{});
    const auto weight = get<1>(inputs);
    const auto blocks = make_layout(Cluster{});
    const auto mine = blocks.get_flat_coord(block_rank_in_cluster);
    const uint16_t to_column = create_tma_multicast_mask<0>(blocks, mine);
    const auto copy_b = params.tma_load_b.get_slice(get<0>(mine));
    const auto source_b = copy_b.partition_S(weight(_, _, get<1>(block), _, get<3>(block)));
    const auto stages_b = copy_b.partition_D(smem_b);
    load_with(params, pipeline, write, inputs, block, tile, tiles, block_rank_in_cluster, shared,
              [&](auto& barrier, int k_tile, int stage) {
                copy(params.tma_load_b.with(barrier, to_column), source_b(_, _, _, k_tile), stages_b(_, _, _, stage));
              });
  }

 protected:
  // Loads the k-tiles of a tile in step with the other clusters: values and metadata, and what
  // load_weight(barrier, k_tile, stage) loads beside them. For one thread.
  template <class Inputs, class BlockCoord, class TileIterator, class LoadWeight>
  CUTLASS_DEVICE void load_with(const Params& params, MainloopPipeline& pipeline, PipelineState& write,
                                const Inputs& inputs, const BlockCoord& block, TileIterator& tile, int tiles,
                                uint32_t block_rank_in_cluster, TensorStorage& shared, const LoadWeight& load_weight) {
    using namespace cute;
    const auto smem_a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const auto smem_e = make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Base::SmemLayoutE{});
    const auto values = get<0>(inputs);
    const auto metadata = get<2>(inputs);
    const auto blocks = make_layout(Cluster{});
    const auto mine = blocks.get_flat_coord(block_rank_in_cluster);
    const uint16_t to_row = create_tma_multicast_mask<1>(blocks, mine);
    const auto copy_a = params.tma_load_a.get_slice(get<1>(mine));
    const auto copy_e = params.tma_load_e.get_slice(get<1>(mine));
    const auto source_a = copy_a.partition_S(values(_, _, get<0>(block), _, get<3>(block)));
    const auto source_e = copy_e.partition_S(metadata(_, _, get<0>(block), _, get<3>(block)));
    const auto stages_a = copy_a.partition_D(smem_a);
    const auto stages_e = copy_e.partition_D(smem_e);

    const unsigned clusters = gridDim.x * gridDim.y * gridDim.z / size(Cluster{});
    const uint32_t first = write.count();
    const uint32_t steps = block_rank_in_cluster == 0 ? params.pace.steps : 0;
    Pacer<GlobalCounter> pacer({pace_counters + params.pace.slot}, clusters, steps);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < tiles; ++i) {
      if (!alone_) alone_ = !pacer.step(first + i);
      pipeline.producer_acquire(write);
      auto& barrier = *pipeline.producer_get_barrier(write);
      const int stage = write.index();
      copy(params.tma_load_a.with(barrier, to_row), source_a(_, _, _, *tile), stages_a(_, _, _, stage));
      copy(params.tma_load_e.with(barrier, to_row), source_e(_, _, _, *tile), stages_e(_, _, _, stage));
      load_weight(barrier, *tile, stage);
      ++tile;
      ++write;
    }
    pacer.finish(first, tiles);
  }

 private:
  bool alone_ = false;
};

}  // namespace sm90
}  // namespace nm_act
