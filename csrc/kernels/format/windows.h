// Windows over duplicated weight columns: how 2:4+1 becomes a 2:4-legal operand.
//
// The sixteen features of a unit are covered by five windows of four columns, the same for every token: the four quads,
// and {e, 4 + e, 8 + e, 12 + e} for the pattern's extra column e. A window holds two of its columns, so ten of sixteen
// features survive. The lifted operand has one 2:4 group per window, and the weight's columns are duplicated once to
// match. Column f of window w of unit u lies
//
//   windows 0 to 3   at 16 * u + 4 * w + f           the first in_features columns: the weight itself
//   window 4         at in_features + 4 * u + f
//
// 2:4+2 has two such extra windows and is pruned but not lifted: half more columns cost more than the tensor cores gain
// (docs/kernels/windows.md).
#pragma once

#include <cstdint>

#include "pattern.h"

namespace nm_act {

inline constexpr int kUnit = 16;
inline constexpr int kWindows = 5;

// Whether the columns are distinct and in 0 ... 3.
NM_ACT_HOST_DEVICE constexpr bool are_supported(ExtraColumns extra) {
  if (extra.count < 0 || extra.count > 2) return false;
  for (int i = 0; i < extra.count; ++i) {
    if (extra.column[i] < 0 || extra.column[i] > 3) return false;
  }
  return extra.count < 2 || extra.column[0] != extra.column[1];
}

// Whether the sparse tensor cores run the pattern with a lifted weight.
NM_ACT_HOST_DEVICE constexpr bool is_lifted(Pattern pattern) { return pattern.extra.count == 1; }

// Number of features of the lifted operand; in_features is a multiple of kUnit.
NM_ACT_HOST_DEVICE constexpr int64_t lifted_features(int64_t in_features) { return in_features + in_features / 4; }

}  // namespace nm_act
