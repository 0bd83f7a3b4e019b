// Which features of a unit of sixteen survive under 2:4+1 and 2:4+2 (format/windows.h), for host and device.
//
// The survivors are the best set that the windows can hold: visit the features by descending key, the lowest index
// first among equals, and accept each one that still fits. The sets that the windows can hold form a transversal
// matroid, so this greedy set is the unique optimum. The functions below find it directly.
//
//   2:4+1   With the extra slot, a quad keeps e and the top two of its other features instead of its top two: it gains
//           one feature. The two quads that gain most get a slot, the lower quad among equals: a 2:4 selection over the
//           four gains.
//   2:4+2   The top two of every quad survive, and all but four of the eight others, the "losers". Losers are dropped
//           from the lowest key up, except where that leaves an extra window with fewer than two quads to serve: a quad
//           that has lost two is served by neither window, and a quad that has lost only e is not served by e's.
//
// tests/native/windows.cpp compares both with the greedy set, exhaustively over masks and over orders of the keys.
#pragma once

#include "../format/windows.h"
#include "select.h"

namespace nm_act {

// Byte masks over the four slots of each window of 2:4+1: two survivors each.
struct WindowSlots {
  uint32_t held[kWindows];
};

// Expands bit i of a nibble to byte i.
NM_ACT_INLINE uint32_t spread_nibble(uint32_t nibble) { return (nibble * 0x00204081u & 0x01010101u) * 0xFFu; }

// All ones if byte i of a byte mask is set.
NM_ACT_INLINE uint32_t replicate_byte(uint32_t mask, int i) { return permute_bytes(mask, 0, 0x8888u + 0x1111u * i); }

NM_ACT_INLINE uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

// ---- 2:4+1

// Masks that make feature e of a group lose every comparison: x' = (x & keep) | set, for each word of Comparisons.
struct Removal {
  Comparisons keep, set;
  Winners feature;  // e itself
};

NM_ACT_INLINE Removal removal_of(int e) {
  constexpr uint32_t kLow = 0x00008000u, kHigh = 0x80000000u;
  Removal r{{~0u, ~0u, ~0u, ~0u, ~0u}, {0, 0, 0, 0, 0}, {0, 0}};
  if (e < 2) {
    const uint32_t own = e == 0 ? kLow : kHigh, other = e == 0 ? kHigh : kLow;
    r.keep.straight = r.keep.crossed = r.keep.within_a = ~own;
    r.set.within_a = r.set.from_b = other;
    r.feature.a = own;
  } else {
    const uint32_t own = e == 2 ? kLow : kHigh, other = e == 2 ? kHigh : kLow;
    r.set.straight = own;
    r.set.crossed = r.set.within_b = other;
    r.keep.from_b = r.keep.within_b = ~own;
    r.feature.b = own;
  }
  return r;
}

NM_ACT_INLINE Comparisons without(const Comparisons& c, const Removal& r) {
  return {(c.straight & r.keep.straight) | r.set.straight, (c.crossed & r.keep.crossed) | r.set.crossed,
          (c.within_a & r.keep.within_a) | r.set.within_a, (c.from_b & r.keep.from_b) | r.set.from_b,
          (c.within_b & r.keep.within_b) | r.set.within_b};
}

// `word` holds eight pairs of 16-bit features.
NM_ACT_INLINE WindowSlots plus_one_16(const uint32_t (&word)[8], uint32_t nan_keys, const Removal& removal) {
  Winners all[4], others[4];
  uint32_t gain[4];
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    const uint32_t a = magnitude_keys(word[2 * quad], nan_keys), b = magnitude_keys(word[2 * quad + 1], nan_keys);
    const Comparisons comparisons = compare_keys(a, b);
    all[quad] = winners_of(comparisons);
    others[quad] = winners_of(without(comparisons, removal));
    // The feature that the slot adds, in its half of one of the two words.
    const uint32_t added_a = (others[quad].a | removal.feature.a) & ~all[quad].a;
    const uint32_t added_b = (others[quad].b | removal.feature.b) & ~all[quad].b;
    gain[quad] = (a & permute_bytes(added_a, added_a, 0xBB99)) | (b & permute_bytes(added_b, added_b, 0xBB99));
  }
  const uint32_t gains_a = permute_bytes(gain[0], gain[1], 0x5410) | permute_bytes(gain[0], gain[1], 0x7632);
  const uint32_t gains_b = permute_bytes(gain[2], gain[3], 0x5410) | permute_bytes(gain[2], gain[3], 0x7632);
  WindowSlots result;
  const uint32_t served = byte_mask(winners_of(compare_keys(gains_a, gains_b)));
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    const uint32_t is_served = replicate_byte(served, quad);
    result.held[quad] =
        byte_mask({choose(is_served, others[quad].a, all[quad].a), choose(is_served, others[quad].b, all[quad].b)});
  }
  result.held[4] = served;
  return result;
}

// The same for 32-bit keys below 2^31 - 1.
NM_ACT_INLINE WindowSlots plus_one_of_keys(const uint32_t (&key)[kUnit], int e) {
  uint32_t all[4], others[4], gain[4];
  const uint32_t feature = 0xFFu << 8 * e;
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    uint32_t lowered[4];
    NM_ACT_UNROLL
    for (int i = 0; i < 4; ++i) lowered[i] = i == e ? 0 : key[4 * quad + i] + 1;
    all[quad] = survivors_key(key[4 * quad], key[4 * quad + 1], key[4 * quad + 2], key[4 * quad + 3]);
    others[quad] = survivors_key(lowered[0], lowered[1], lowered[2], lowered[3]);
    const uint32_t added = (others[quad] | feature) & ~all[quad];
    gain[quad] = 0;
    NM_ACT_UNROLL
    for (int i = 0; i < 4; ++i) gain[quad] |= key[4 * quad + i] & replicate_byte(added, i);
  }
  WindowSlots result;
  const uint32_t served = survivors_key(gain[0], gain[1], gain[2], gain[3]);
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    result.held[quad] = choose(replicate_byte(served, quad), others[quad], all[quad]);
  }
  result.held[4] = served;
  return result;
}

// Byte mask of the survivors of a quad.
NM_ACT_INLINE uint32_t quad_survivors(const WindowSlots& windows, int e, int quad) {
  return windows.held[quad] | (replicate_byte(windows.held[4], quad) & 0xFFu << 8 * e);
}

// ---- 2:4+2: bit 4 * quad + column of each survivor

NM_ACT_LOCAL int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return static_cast<int>(((word + (word >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24);
#endif
}

// The four dropped features, as bits, given the losers' keys and places (4 * quad + column): two per quad, in ascending
// order of place.
NM_ACT_LOCAL uint32_t drop_four(const uint32_t (&key)[8], const uint32_t (&place)[8], int e0, int e1) {
  // Lowest key first, and highest place first among equals: nibble i of `order` is the place of the i-th candidate.
  uint32_t order = 0;
  NM_ACT_UNROLL
  for (int i = 0; i < 8; ++i) {
    uint32_t rank = 0;
    NM_ACT_UNROLL
    for (int j = 0; j < 8; ++j) {
      if (j != i) rank += (j > i ? key[j] <= key[i] : key[j] < key[i]) ? 1u : 0u;
    }
    order |= place[i] << 4 * rank;
  }
  // At bit 4 * quad: whether the quad has lost a feature, and whether an extra window can no longer serve it.
  uint32_t dropped = 0, lost_one = 0, unserved_0 = 0, unserved_1 = 0;
  int count = 0;
  NM_ACT_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t at = order >> 4 * i & 15u, quad = 1u << (at & 12u), column = at & 3u;
    const bool second = (lost_one & quad) != 0;
    const uint32_t then_0 = unserved_0 | (second || column == static_cast<uint32_t>(e0) ? quad : 0u);
    const uint32_t then_1 = unserved_1 | (second || column == static_cast<uint32_t>(e1) ? quad : 0u);
    if (count < 4 && count_bits(then_0) <= 2 && count_bits(then_1) <= 2) {
      ++count;
      dropped |= 1u << at;
      lost_one |= quad;
      unserved_0 = then_0;
      unserved_1 = then_1;
    }
  }
  return dropped;
}

NM_ACT_INLINE uint32_t plus_two_of_keys(const uint32_t (&key)[kUnit], int e0, int e1) {
  uint32_t loser[8], place[8];
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    const uint32_t *k = key + 4 * quad, kept = survivors_key(k[0], k[1], k[2], k[3]);
    const bool kept0 = kept & 0xFFu, kept1 = kept & 0xFF00u, kept2 = kept & 0xFF0000u, kept3 = kept & 0xFF000000u;
    loser[2 * quad] = !kept0 ? k[0] : !kept1 ? k[1] : k[2];
    place[2 * quad] = 4 * quad + (!kept0 ? 0 : !kept1 ? 1 : 2);
    loser[2 * quad + 1] = !kept3 ? k[3] : !kept2 ? k[2] : k[1];
    place[2 * quad + 1] = 4 * quad + (!kept3 ? 3 : !kept2 ? 2 : 1);
  }
  return ~drop_four(loser, place, e0, e1) & 0xFFFFu;
}

}  // namespace nm_act
