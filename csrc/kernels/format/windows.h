// Windows over duplicated weight columns: how a pattern richer than 2:4 becomes a 2:4-legal operand.
//
// The sixteen features of a unit are covered by four-wide windows, the same for every token; a window holds at most two
// of its four columns. The lifted operand has one group of four a window, and the weight's columns are duplicated once
// to match. Feature f of window w of unit u lies
//
//   windows 0 to 3   at 16 * u + 4 * w                              the first in_features columns
//   window 4 + j     at in_features + 4 * (extras * u + j)          extras = 1 or 2 windows a unit
//
//   2:4+1, 2:4+2     the four quads, then {e, 4 + e, 8 + e, 12 + e} for each extra column e
//   4:8, 5:8, 6:8    the four quads, then the middle {2, 3, 4, 5} of either eight
//   8:16             six windows that hold each of the 12870 masks; five cannot. Features 0 to 7 are in one of them, 8
//                    to 15 in two
//
// Wherever the quads come first, the first in_features columns of the lifted weight are the weight itself.
// docs/kernels/windows.md says why these, tests/native/windows.cpp that they suffice.
#pragma once

#include <cstdint>

#include "pattern.h"

namespace nm_act {

inline constexpr int kUnit = 16;
inline constexpr int kMaxWindows = 6;

enum class WindowSet : int { kNone = 0, kPlusOne = 1, kPlusTwo = 2, kOf8 = 3, k8Of16 = 4 };

// Distinct columns in 0 ... 3; a pattern 2:4 with any is 2:4+count.
NM_ACT_HOST_DEVICE constexpr bool are_supported(ExtraColumns extra) {
  if (extra.count < 0 || extra.count > 2) return false;
  for (int i = 0; i < extra.count; ++i) {
    if (extra.column[i] < 0 || extra.column[i] > 3) return false;
  }
  return extra.count < 2 || extra.column[0] != extra.column[1];
}

// Which windows serve a pattern; kNone where none do (or, for plain 2:4, where none are needed).
NM_ACT_HOST_DEVICE constexpr WindowSet window_set(Pattern pattern) {
  if (pattern.extra.count > 0) return pattern.extra.count == 1 ? WindowSet::kPlusOne : WindowSet::kPlusTwo;
  if (pattern.group == 8 && pattern.keep >= 4 && pattern.keep <= 6) return WindowSet::kOf8;
  return pattern.group == 16 && pattern.keep == 8 ? WindowSet::k8Of16 : WindowSet::kNone;
}

// Windows of a unit beyond the first four.
NM_ACT_HOST_DEVICE constexpr int extra_windows(WindowSet set) {
  return set == WindowSet::kNone ? 0 : set == WindowSet::kPlusOne ? 1 : 2;
}

// K' of a lifted operand; in_features is a multiple of kUnit.
NM_ACT_HOST_DEVICE constexpr int64_t lifted_features(WindowSet set, int64_t in_features) {
  return in_features + in_features / 4 * extra_windows(set);
}

namespace detail {
inline constexpr int8_t k8Of16Windows[kMaxWindows][4] = {{0, 1, 8, 9},   {2, 3, 10, 11},  {4, 8, 12, 13},
                                                         {5, 9, 14, 15}, {6, 10, 12, 14}, {7, 11, 13, 15}};
}  // namespace detail

// The feature of the unit in slot 0 ... 3 of a window; ascending in the slot.
constexpr int window_feature(Pattern pattern, int window, int slot) {
  const WindowSet set = window_set(pattern);
  if (set == WindowSet::k8Of16) return detail::k8Of16Windows[window][slot];
  if (window < 4) return 4 * window + slot;
  return set == WindowSet::kOf8 ? 8 * (window - 4) + 2 + slot : 4 * slot + pattern.extra.column[window - 4];
}

}  // namespace nm_act
