// CUTLASS's stream-K scheduler, made to compile with CUTLASS_ENABLE_GDC_FOR_SM90: its is_last_tile is a const function
// that hands a member to a reference to non-const (4.2). The kernel asks it only when to let the next kernel start
// early; "never the last" leaves that to the end of the grid.
#pragma once

#include <cutlass/gemm/kernel/tile_scheduler.hpp>

namespace nm_act {
namespace sm90 {

template <class Tile, class Cluster>
struct StreamKTileScheduler : cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster> {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster>;
  using Base::Base;
  CUTLASS_DEVICE bool is_last_tile(typename Base::WorkTileInfo const&, uint32_t = 1) const { return false; }
};

struct StreamK {};

}  // namespace sm90
}  // namespace nm_act

template <class Tile, class Cluster, uint32_t kStages>
struct cutlass::gemm::kernel::detail::TileSchedulerSelector<nm_act::sm90::StreamK, cutlass::arch::Sm90, Tile, Cluster,
                                                            kStages> {
  using Scheduler = nm_act::sm90::StreamKTileScheduler<Tile, Cluster>;
};
