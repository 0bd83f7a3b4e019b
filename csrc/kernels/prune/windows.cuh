// A unit of sixteen features in registers: its selection under a pattern with windows, and its lifted survivors.
#pragma once

#include "compress.cuh"
#include "threshold.cuh"
#include "window_select.h"

namespace nm_act {

// What every unit of a launch needs to know.
struct WindowRule {
  Pattern pattern;
  Removal removal;  // of 2:4+1's extra column
  const uint8_t* cycle_table;
};

template <WindowSet kSet>
__device__ __forceinline__ WindowRule window_rule(const Pattern& pattern, const uint8_t* cycle_table) {
  WindowRule rule{pattern, {}, cycle_table};
  if constexpr (kSet == WindowSet::kPlusOne) rule.removal = removal_of(pattern.extra.column[0]);
  return rule;
}

template <class E>
struct Unit {
  Chunk<E> chunk[2];
};

struct ChannelUnit {
  ChannelChunk chunk[2];
};

template <class E>
__device__ __forceinline__ void words_of(const Unit<E>& unit, uint32_t (&word)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i] = unit.chunk[i / 4].word[i % 4];
}

template <class E>
__device__ __forceinline__ void keys_of(const Unit<E>& unit, const ChannelUnit& scale, uint32_t (&key)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    key[i] = scaled_key(unit.chunk[i / kChunk].get(i % kChunk), scale.chunk[i / kChunk].value[i % kChunk]);
  }
}

// 2:4+r. kKeys: by 32-bit keys, |z| * scale.
template <class E, WindowSet kSet, bool kKeys>
__device__ __forceinline__ WindowSlots select_plus(const Unit<E>& unit, const ChannelUnit& scale,
                                                   const WindowRule& rule) {
  const int e0 = rule.pattern.extra.column[0], e1 = rule.pattern.extra.column[1];
  if constexpr (kKeys) {
    uint32_t key[kUnit];
    keys_of(unit, scale, key);
    if constexpr (kSet == WindowSet::kPlusOne) return plus_one_of_keys(key, e0);
    return plus_two_of_keys(key, e0, e1);
  } else {
    uint32_t word[8];
    words_of(unit, word);
    if constexpr (kSet == WindowSet::kPlusOne) return plus_one_16(word, E::kNanKeys, rule.removal);
    return plus_two_16(word, E::kNanKeys, e0, e1);
  }
}

// Masks of the survivors of n:8 or 8:16. Two units at a time: without a scale, both are sorted together.
template <class E, WindowSet kSet, bool kScaled>
__device__ __forceinline__ void exact_survivors(const Unit<E> (&unit)[2], const ChannelUnit (&scale)[2], int n,
                                                uint32_t (&mask)[2]) {
  constexpr int kGroup = kSet == WindowSet::kOf8 ? 8 : 16;
  if constexpr (kScaled) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t key[kUnit];
      keys_of(unit[u], scale[u], key);
      mask[u] = 0;
#pragma unroll
      for (int first = 0; first < kUnit; first += kGroup) {
        uint32_t group_key[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) group_key[i] = key[first + i];
        mask[u] |= survivors_of_one<kGroup>(group_key, n) << first;
      }
    }
  } else {
    uint32_t word[2][8];
#pragma unroll
    for (int u = 0; u < 2; ++u) words_of(unit[u], word[u]);
    if constexpr (kGroup == 16) {
      survivors_of_two<E, 16>(word[0], word[1], n, mask[0], mask[1]);
    } else {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        uint32_t lower, upper;
        survivors_of_two<E, 8>(word[u], word[u] + 4, n, lower, upper);
        mask[u] = lower | upper << 8;
      }
    }
  }
}

template <class E, WindowSet kSet, bool kScaled>
__device__ __forceinline__ void select_pair(const Unit<E> (&unit)[2], const ChannelUnit (&scale)[2],
                                            const WindowRule& rule, WindowSlots (&windows)[2]) {
  if constexpr (kSet == WindowSet::kPlusOne || kSet == WindowSet::kPlusTwo) {
#pragma unroll
    for (int u = 0; u < 2; ++u) windows[u] = select_plus<E, kSet, kScaled>(unit[u], scale[u], rule);
  } else {
    uint32_t mask[2];
    exact_survivors<E, kSet, kScaled>(unit, scale, rule.pattern.keep, mask);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      windows[u] = kSet == WindowSet::kOf8 ? assign_of_8(mask[u]) : assign_8_of_16(mask[u], rule.cycle_table);
    }
  }
}

// The survivors of a unit by window, and their metadata.
template <WindowSet kSet>
struct Lifted {
  static constexpr int kExtras = extra_windows(kSet);
  uint32_t word[4 + kExtras];  // two survivors a window
  uint32_t base;               // the two metadata bytes of the first four windows
  uint32_t extra;              // the nibble or byte of the others
};

// The four features of a window, in two words.
template <WindowSet kSet>
__device__ __forceinline__ uint2 window_features(const uint32_t (&word)[8], const ExtraColumns& extra, int window) {
  if constexpr (kSet == WindowSet::k8Of16) {
    switch (window) {
      case 0: return make_uint2(word[0], word[4]);
      case 1: return make_uint2(word[1], word[5]);
      case 2: return make_uint2(permute_bytes(word[2], word[4], 0x5410), word[6]);
      case 3: return make_uint2(permute_bytes(word[2], word[4], 0x7632), word[7]);
      case 4: return make_uint2(permute_bytes(word[3], word[5], 0x5410), permute_bytes(word[6], word[7], 0x5410));
      default: return make_uint2(permute_bytes(word[3], word[5], 0x7632), permute_bytes(word[6], word[7], 0x7632));
    }
  } else {
    if (window < 4) return make_uint2(word[2 * window], word[2 * window + 1]);
    if constexpr (kSet == WindowSet::kOf8) return make_uint2(word[4 * window - 15], word[4 * window - 14]);
    const int e = extra.column[window - 4];
    const uint32_t halves = e & 1 ? 0x7632u : 0x5410u;
    const bool high = e >= 2;
    return make_uint2(permute_bytes(high ? word[1] : word[0], high ? word[3] : word[2], halves),
                      permute_bytes(high ? word[5] : word[4], high ? word[7] : word[6], halves));
  }
}

template <class E, WindowSet kSet>
__device__ __forceinline__ Lifted<kSet> lift(const Unit<E>& unit, const WindowSlots& windows,
                                             const ExtraColumns& extra) {
  constexpr bool kFull = kSet == WindowSet::kPlusOne || kSet == WindowSet::kPlusTwo;  // two survivors in each window
  uint32_t word[8];
  words_of(unit, word);
  Lifted<kSet> lifted;
#pragma unroll
  for (int window = 0; window < 4 + Lifted<kSet>::kExtras; ++window) {
    uint2 features = window_features<kSet>(word, extra, window);
    // A window with fewer than two is filled up at positions 0 and 1 (pad_nibble), with zeros.
    if constexpr (!kFull) features.x &= permute_bytes(windows.held[window], 0, 0x1100);
    lifted.word[window] = gather_16(features.x, features.y, windows.slots[window]);
  }
  lifted.base = metadata_byte(windows.slots[0], windows.slots[1]) | metadata_byte(windows.slots[2], windows.slots[3])
                                                                        << 8;
  if constexpr (Lifted<kSet>::kExtras == 1) {
    lifted.extra = metadata_byte(windows.slots[4], 0xFFFFu) & 0xFu;
  } else {
    lifted.extra = metadata_byte(windows.slots[4], windows.slots[5]);
  }
  return lifted;
}

// The metadata byte of the extra windows as it is stored; with one window a unit, two lanes share it and the even one
// stores it. `kPaddingByte`s come of units that are not `real`. The whole warp calls.
template <WindowSet kSet>
__device__ __forceinline__ uint32_t extra_byte(const Lifted<kSet>& lifted, bool real) {
  if constexpr (Lifted<kSet>::kExtras == 2) return real ? lifted.extra : kPaddingByte;
  const uint32_t own = real ? lifted.extra : kPaddingNibble;
  return own | __shfl_down_sync(0xFFFFFFFFu, own, 1) << 4;
}
template <WindowSet kSet>
__device__ __forceinline__ bool stores_extra_byte() {
  return Lifted<kSet>::kExtras == 2 || threadIdx.x % 2 == 0;
}

}  // namespace nm_act
