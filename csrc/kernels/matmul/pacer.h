// Keeps the clusters of a launch in step: none gets ahead of their mean by more than a count, which is made every
// kPeriod k-tiles. Says when a cluster counts itself and for how long it waits, and leaves the counter as it was found.
// How the counter is reached is the template's parameter, so that tests/native/pacer.cpp runs it on a host.
#pragma once

#include <cstdint>

#include "../format/host_device.h"

namespace nm_act {

// Counter: count() adds one, counts() reads the sum, leave(clusters) is true for the last of so many that call it,
// clear() sets the sum to 0, now() reads a clock.
template <class Counter>
class Pacer {
 public:
  static constexpr uint32_t kPeriod = 16;
  static constexpr unsigned kPatience = 20000;  // clocks

  // clusters: of the launch. steps: k-tiles of a cluster in the waves that all of them take part in, so a multiple of a
  // tile's; 0 for who takes no part.
  NM_ACT_DEVICE Pacer(Counter counter, unsigned clusters, uint32_t steps)
      : counter_(counter), clusters_(clusters), steps_(steps) {}

  // Before the loads of a k-tile of the launch. Returns false if the others did not come in time: then the cluster
  // makes no more counts, so the others give up as well, once each.
  NM_ACT_DEVICE bool step(uint32_t k_tile) {
    if (k_tile >= steps_) return true;
    const uint32_t phase = k_tile % kPeriod, period = k_tile / kPeriod;
    // Read ahead of the count, so that a cluster in step does not wait for memory; in the middle of a period, which a
    // tile's end seldom divides.
    if (phase == kPeriod / 2 - 2) seen_ = counter_.counts();
    if (phase != kPeriod / 2) return true;
    counter_.count();
    const unsigned awaited = period * clusters_;
    if (seen_ >= awaited) return true;
    const unsigned start = counter_.now();
    do {
      seen_ = counter_.counts();
      if (seen_ >= awaited) return true;
    } while (counter_.now() - start < kPatience);
    return false;
  }

  // After the loads of a tile whose first k-tile and number of k-tiles are given: the last cluster that needs the
  // counter no longer leaves it as it was before the launch.
  NM_ACT_DEVICE void finish(uint32_t first, uint32_t k_tiles) {
    if (first + k_tiles != steps_ || !counter_.leave(clusters_)) return;
    counter_.clear();
  }

 private:
  Counter counter_;
  unsigned clusters_, seen_ = 0;
  uint32_t steps_;
};

}  // namespace nm_act
