// Tiles that several blocks share along the features, for grids that leave multiprocessors idle: CUTLASS's stream-K
// scheduler in its split-K mode. Each block writes or adds its partial sums to scratch memory; the one with the last
// features adds them to its own and runs the epilogue, always in the same order, so results are the same bits each time.
//
// Derived from rather than used, because it does not compile with CUTLASS_ENABLE_GDC_FOR_SM90 (4.2): its is_last_tile is
// a const function that passes a member as a reference to non-const. The kernel asks it only when the next kernel may
// start early; "never" leaves that to the end of the grid.
#pragma once

#include <cutlass/gemm/kernel/tile_scheduler.hpp>

namespace nm_act {
namespace sm90 {

template <class Tile, class Cluster>
struct SplitTileScheduler : cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster> {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster>;
  using Base::Base;
  CUTLASS_DEVICE bool is_last_tile(typename Base::WorkTileInfo const&, uint32_t = 1) const { return false; }
};

struct SplitScheduler {};

}  // namespace sm90
}  // namespace nm_act

template <class Tile, class Cluster, uint32_t kStages>
struct cutlass::gemm::kernel::detail::TileSchedulerSelector<nm_act::sm90::SplitScheduler, cutlass::arch::Sm90, Tile,
                                                            Cluster, kStages> {
  using Scheduler = nm_act::sm90::SplitTileScheduler<Tile, Cluster>;
};
