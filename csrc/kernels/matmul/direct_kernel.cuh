// A persistent kernel around a sparse TMA collective: one warp loads, two warp groups multiply and store what they
// multiplied (direct_epilogue.cuh). They share the stages of the pipeline and nothing else; in CUTLASS's cooperative
// kernel they meet at several barriers of each epilogue, and the vectors of the epilogue are loaded after the main
// loop.
//
// Host side, parameters and shared memory are those of CUTLASS's cooperative kernel.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace nm_act {
namespace sm90 {

template <class Base>
struct DirectKernel : Base {
  using Params = typename Base::Params;
  using SharedStorage = typename Base::SharedStorage;
  using Mainloop = typename Base::CollectiveMainloop;
  using Epilogue = typename Base::CollectiveEpilogue;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using Cluster = typename Base::ClusterShape;
  using Tile = typename Base::TileShape;
  using Scheduler = typename Base::TileScheduler;
  static constexpr int kWarpGroups = Epilogue::kWarpGroups;
  static_assert(cute::size(typename Base::TiledMma{}) == kWarpGroups * 128);
  static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;  // CUTLASS's; 24 are too few to load in step

  CUTLASS_DEVICE void operator()(const Params& params, char* memory) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(memory);
    const int warp_group = cutlass::canonical_warp_group_idx(), warp = cutlass::canonical_warp_idx_sync();
    const int group_thread = threadIdx.x % 128;
    if (warp == 0 && cute::elect_one_sync()) Mainloop::prefetch_tma_descriptors(params.mainloop);

    typename Pipeline::Params pipeline_params;
    if (warp == 0) pipeline_params.role = Pipeline::ThreadCategory::Producer;
    if (warp_group > 0) pipeline_params.role = Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = group_thread == 0;
    pipeline_params.num_consumers = kWarpGroups * 128;
    pipeline_params.num_producers = Mainloop::NumProducerThreadEvents;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(shared.pipelines.mainloop, pipeline_params, Cluster{});
    if constexpr (cute::size(Cluster{}) > 1) {  // the barriers are visible to the whole cluster
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }

    const auto problem = cute::append<4>(params.problem_shape, cute::_1{});
    const int tokens = cute::get<0>(problem), outputs = cute::get<1>(problem);
    constexpr int kTileTokens = cute::size<0>(Tile{}), kTileOutputs = cute::size<1>(Tile{});
    Scheduler scheduler{params.scheduler};
    auto work = scheduler.initial_work_tile_info(Cluster{});
    const int steps = Scheduler::get_work_k_tile_count(work, problem, Tile{});
    const auto advance = [&] {
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
    };
    Mainloop mainloop;

    if (warp_group == 0) {
      cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
      if (warp != 0) return;
      cutlass::arch::wait_on_dependent_grids();
      const auto inputs = mainloop.load_init(problem, params.mainloop);
      const auto& values = cute::get<0>(inputs);
      const auto& weight = cute::get<1>(inputs);
      auto write = cutlass::make_producer_start_state<Pipeline>();
      for (; work.is_valid(); advance()) {
        const auto coordinate = cute::make_coord(cute::idx2crd(work.M_idx, cute::shape<2>(values)),
                                                 cute::idx2crd(work.N_idx, cute::shape<2>(weight)), cute::_,
                                                 cute::idx2crd(work.L_idx, cute::shape<4>(weight)));
        mainloop.load(params.mainloop, pipeline, write, inputs, coordinate,
                      cute::make_coord_iterator(cute::shape<3>(values)), steps, threadIdx.x % 32,
                      cute::block_rank_in_cluster(), shared.tensors.mainloop);
        write.advance(steps);
      }
      mainloop.load_tail(pipeline, write);
      return;
    }

    cutlass::arch::warpgroup_reg_alloc<kMultiplyRegisters>();
    Epilogue epilogue(params.epilogue, shared.tensors.epilogue);
    const int group = warp_group - 1;
    cutlass::arch::wait_on_dependent_grids();  // the kernel before writes the row scales
    typename Mainloop::PipelineState read;
    typename Base::TiledMma tiled_mma;
    int slot = 0;
    for (; work.is_valid(); advance()) {
      const int token = work.M_idx * kTileTokens + group * 64, output = work.N_idx * kTileOutputs;
      auto& vectors = shared.tensors.epilogue.vectors[group][slot];
      slot ^= 1;
      epilogue.prefetch(tokens, outputs, token, output, vectors, group_thread);
      auto accumulators = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(Tile{}));
      mainloop.mma(pipeline, read, accumulators, steps, threadIdx.x - 128, shared.tensors.mainloop, params.mainloop);
      mainloop.mma_tail(pipeline, read, steps);
      read.advance(steps);
      if (scheduler.is_last_tile(work)) cutlass::arch::launch_dependent_grids();
      epilogue.store_tile(tokens, outputs, token, output, vectors, accumulators, group_thread, group);
    }
#else
    __trap();  // compiled for another architecture
#endif
  }
};

}  // namespace sm90
}  // namespace nm_act
