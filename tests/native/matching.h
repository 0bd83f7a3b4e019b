// Which features of a unit the windows of a pattern can hold together, as a bipartite matching.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/format/windows.h"

namespace nm_act {

inline constexpr int kMaxWindows = 6;

// The feature of the unit in slot 0 ... 3 of a window of 2:4+r, ascending in the slot.
inline int window_feature(ExtraColumns extra, int window, int slot) {
  return window < 4 ? 4 * window + slot : 4 * slot + extra.column[window - 4];
}

// Kuhn's algorithm: a place for each accepted feature, two in a window.
class Matching {
 public:
  explicit Matching(Pattern pattern) : windows_(4 + pattern.extra.count) {
    for (int window = 0; window < windows_; ++window) {
      for (int slot = 0; slot < 4; ++slot) covers_[window] |= 1u << window_feature(pattern.extra, window, slot);
    }
    for (auto& place : holds_) place = -1;
  }
  bool accept(int feature) {
    uint32_t visited = 0;
    return place(feature, visited);
  }

 private:
  bool place(int feature, uint32_t& visited) {
    for (int at = 0; at < 2 * windows_; ++at) {
      if ((covers_[at / 2] >> feature & 1u) == 0 || (visited >> at & 1u) != 0) continue;
      visited |= 1u << at;
      if (holds_[at] < 0 || place(holds_[at], visited)) {
        holds_[at] = feature;
        return true;
      }
    }
    return false;
  }
  int windows_;
  std::array<uint32_t, kMaxWindows> covers_{};
  std::array<int, 2 * kMaxWindows> holds_;
};

}  // namespace nm_act
