// N:M patterns: of every `group` consecutive features of a token, `keep` survive. 2:4+r adds r windows (windows.h).
#pragma once

#include "host_device.h"

namespace nm_act {

inline constexpr int kMaxGroup = 32;

// The columns of 2:4+count's extra windows; column e stands for feature e of each quad of a 16-feature unit
// (windows.h).
struct ExtraColumns {
  int count;
  int column[2];
};

struct Pattern {
  int keep;   // N
  int group;  // M
  ExtraColumns extra;
};

NM_ACT_HOST_DEVICE constexpr bool is_group_size(int group) {
  return group >= 2 && group <= kMaxGroup && (group & (group - 1)) == 0;
}

NM_ACT_HOST_DEVICE constexpr bool is_2_4(Pattern pattern) {
  return pattern.keep == 2 && pattern.group == 4 && pattern.extra.count == 0;
}

NM_ACT_HOST_DEVICE constexpr bool is_supported(Pattern pattern) {
  return is_group_size(pattern.group) && pattern.keep >= 1 && pattern.keep < pattern.group;
}

// Number of features that are selected together; in_features must be a multiple of it.
NM_ACT_HOST_DEVICE constexpr int span_of(Pattern pattern) { return pattern.extra.count > 0 ? 16 : pattern.group; }

}  // namespace nm_act
