// Split tiles: several blocks share a tile along its features, for grids or last waves that leave multiprocessors idle.
// This is CUTLASS's stream-K scheduler, in its split-K mode or, for streamed tiles, in that of stream-K. Each block
// writes or adds its partial sums to a workspace; the block with the last features adds them to its own and runs the
// epilogue. The order is always the same, so results are bitwise reproducible.
//
// The scheduler is derived from CUTLASS's (4.2) because that one does not compile with CUTLASS_ENABLE_GDC_FOR_SM90: its
// is_last_tile is a const function that passes a member as a non-const reference. The kernel calls it only to let the
// next kernel start early; returning false leaves that to the end of the grid.
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
