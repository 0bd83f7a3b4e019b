// N:M patterns: of every `group` consecutive features of a token, `keep` survive.
#pragma once

#include "host_device.h"

namespace nm_act {

inline constexpr int kMaxGroup = 32;

struct Pattern {
  int keep;   // N
  int group;  // M
};

NM_ACT_HOST_DEVICE constexpr bool is_group_size(int group) {
  return group >= 2 && group <= kMaxGroup && (group & (group - 1)) == 0;
}

NM_ACT_HOST_DEVICE constexpr bool is_supported(Pattern pattern) {
  return is_group_size(pattern.group) && pattern.keep >= 1 && pattern.keep < pattern.group;
}

}  // namespace nm_act
