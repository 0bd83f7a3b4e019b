// Which features of a unit of sixteen survive under a pattern with windows (format/windows.h), and which window holds
// each: for host and device.
//
// The survivors are the best set that the windows can hold: take the features by descending key, the lowest index first
// among equals, and accept each that still fits. What windows can hold is a transversal matroid, so this greedy set is
// the one optimum; the functions below find it directly.
//
//   2:4+1   Giving a quad the extra slot turns its top two into e and the top two of the others: it gains one feature.
//           The two quads that gain most get the slot, the lower quad among equals: a 2:4 selection over four gains.
//   2:4+2   Twelve of sixteen survive: the top two of every quad, and all but four of the eight others, its "losers".
//           Dropping losers from the lowest key up, a drop is refused if it leaves one of the extra windows with fewer
//           than two quads to serve. A quad that loses two is served by neither, one that loses only e not by e's.
//   n:8     Of an eight's survivors (at most six) a quad with three or four gives the middle window what it has in it.
//   8:16    Features 0 to 7 have one window each. 8 to 11 go to window 0 or 1 as far as there is room, and of two
//           where there is room for one, the one whose other window is fuller. 12 to 15 are the edges of a cycle of
//           windows 2, 4, 3, 5; a table says which way they go.
//
// tests/native/windows.cpp holds each of them to the greedy set, exhaustively over masks and over orders of the keys.
#pragma once

#include "../format/windows.h"
#include "select.h"

namespace nm_act {

// Byte masks over the four slots of each window. A window with fewer than two survivors has two slots all the same.
struct WindowSlots {
  uint32_t held[kMaxWindows];   // 0xFF where a survivor is
  uint32_t slots[kMaxWindows];  // exactly two bytes 0xFF, held's among them
};

// Bit i of a nibble to byte i.
NM_ACT_INLINE uint32_t spread_nibble(uint32_t nibble) { return (nibble * 0x00204081u & 0x01010101u) * 0xFFu; }

// Bit 4 * i of the word to byte i.
NM_ACT_INLINE uint32_t spread_fourths(uint32_t word) {
  const uint32_t pairs = (word & 0x0011u) | (word & 0x1100u) << 8;
  return ((pairs & 0x00010001u) | (pairs & 0x00100010u) << 4) * 0xFFu;
}

// All ones if byte i of a byte mask is set.
NM_ACT_INLINE uint32_t replicate_byte(uint32_t mask, int i) { return permute_bytes(mask, 0, 0x8888u + 0x1111u * i); }

NM_ACT_INLINE uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

// ---- 2:4+1
// ----------------------------------------------------------------------------------------------------------- What
// makes feature e of a group lose every comparison: x' = (x & keep) | set, for each word of Comparisons.
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
    // The one feature that the slot adds, in its half of one of the two words.
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
    result.held[quad] = result.slots[quad] =
        byte_mask({choose(is_served, others[quad].a, all[quad].a), choose(is_served, others[quad].b, all[quad].b)});
  }
  result.held[4] = result.slots[4] = served;
  return result;
}

// The same of 32-bit keys below 2^31 - 1.
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
    result.held[quad] = result.slots[quad] = choose(replicate_byte(served, quad), others[quad], all[quad]);
  }
  result.held[4] = result.slots[4] = served;
  return result;
}

// ---- 2:4+2
// ----------------------------------------------------------------------------------------------------------- Bit 4 *
// quad + column of each of the four dropped features, and what follows for the windows, at bits 4 * quad.
struct Drops {
  uint32_t features;
  uint32_t one, two;     // quads that lost at least one, two
  uint32_t unserved[2];  // quads that extra window 0, 1 cannot serve
};

NM_ACT_LOCAL int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return static_cast<int>(((word + (word >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24);
#endif
}

// The losers' keys and places (4 * quad + column) in ascending order of place, two a quad.
NM_ACT_LOCAL Drops drop_four(const uint32_t (&key)[8], const uint32_t (&place)[8], int e0, int e1) {
  // Lowest key first, and of equal keys the highest place: nibble i of `order` is the place of the i-th to go.
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
  Drops drops{};
  int count = 0;
  NM_ACT_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t at = order >> 4 * i & 15u, quad = 1u << (at & 12u), column = at & 3u;
    const bool second = (drops.one & quad) != 0;
    const uint32_t unserved0 = drops.unserved[0] | (second || column == static_cast<uint32_t>(e0) ? quad : 0u);
    const uint32_t unserved1 = drops.unserved[1] | (second || column == static_cast<uint32_t>(e1) ? quad : 0u);
    if (count < 4 && count_bits(unserved0) <= 2 && count_bits(unserved1) <= 2) {
      ++count;
      drops.features |= 1u << at;
      drops.two |= drops.one & quad;
      drops.one |= quad;
      drops.unserved[0] = unserved0;
      drops.unserved[1] = unserved1;
    }
  }
  return drops;
}

NM_ACT_INLINE WindowSlots assign_plus_two(const Drops& drops, int e0, int e1) {
  constexpr uint32_t kQuads = 0x1111u;
  const uint32_t whole = ~drops.one & kQuads;  // needs both windows
  const uint32_t lost_0 = drops.unserved[0] & ~drops.two, lost_1 = drops.unserved[1] & ~drops.two;
  const uint32_t either = drops.one & ~drops.two & ~lost_0 & ~lost_1;
  uint32_t served_0 = whole | lost_1;
  const int room = 2 - count_bits(served_0);
  const uint32_t first = either & (0u - either), rest = either ^ first;
  served_0 |= (room > 0 ? first : 0u) | (room > 1 ? rest & (0u - rest) : 0u);
  const uint32_t served_1 = whole | lost_0 | (either & ~served_0);
  const uint32_t in_quads = ~drops.features & ~(served_0 << e0) & ~(served_1 << e1);
  WindowSlots result;
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    result.held[quad] = result.slots[quad] = spread_nibble(in_quads >> 4 * quad & 15u);
  }
  result.held[4] = result.slots[4] = spread_fourths(served_0);
  result.held[5] = result.slots[5] = spread_fourths(served_1);
  return result;
}

NM_ACT_INLINE WindowSlots plus_two_16(const uint32_t (&word)[8], uint32_t nan_keys, int e0, int e1) {
  uint32_t key[8], place[8];
  NM_ACT_UNROLL
  for (int quad = 0; quad < 4; ++quad) {
    const uint32_t a = magnitude_keys(word[2 * quad], nan_keys), b = magnitude_keys(word[2 * quad + 1], nan_keys);
    const uint32_t selector = gather_selector(~byte_mask(winners_of(compare_keys(a, b))));
    const uint32_t keys = permute_bytes(a, b, selector), columns = permute_bytes(0x00010000u, 0x00030002u, selector);
    key[2 * quad] = keys & 0xFFFFu;
    key[2 * quad + 1] = keys >> 16;
    place[2 * quad] = 4 * quad + (columns & 0xFFFFu);
    place[2 * quad + 1] = 4 * quad + (columns >> 16);
  }
  return assign_plus_two(drop_four(key, place, e0, e1), e0, e1);
}

NM_ACT_INLINE WindowSlots plus_two_of_keys(const uint32_t (&key)[kUnit], int e0, int e1) {
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
  return assign_plus_two(drop_four(loser, place, e0, e1), e0, e1);
}

// Byte mask of the survivors of a quad under 2:4+1 or 2:4+2.
NM_ACT_INLINE uint32_t quad_survivors(const WindowSlots& windows, ExtraColumns extra, int quad) {
  uint32_t survivors = windows.held[quad];
  NM_ACT_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i < extra.count) survivors |= replicate_byte(windows.held[4 + i], quad) & 0xFFu << 8 * extra.column[i];
  }
  return survivors;
}

// ---- exact n:8 and 8:16: from the mask of a unit's survivors
// ---------------------------------------------------------- Nibble n of a packed table of sixteen.
NM_ACT_INLINE uint32_t look_up_nibble(uint64_t table, uint32_t n) {
  return static_cast<uint32_t>(table >> 4 * n) & 15u;
}

// A window's nibble with others added until it has two.
NM_ACT_INLINE uint32_t pad_nibble(uint32_t held) { return look_up_nibble(0x000C'0A99'0655'3333ull, held); }

NM_ACT_INLINE void set_window(WindowSlots& result, int window, uint32_t held) {
  result.held[window] = spread_nibble(held);
  result.slots[window] = spread_nibble(pad_nibble(held));
}

// At most six survivors in either eight.
NM_ACT_INLINE WindowSlots assign_of_8(uint32_t mask) {
  // By the nibble of a quad: what it gives the middle. The lower quad gives column 3 (of three survivors; 2 if 3 is
  // none) or 2 and 3 (of four), the upper one column 0 (else 1), or both.
  constexpr uint64_t kLowerGives = 0xC880'8000'4000'0000ull, kUpperGives = 0x3210'1000'1000'0000ull;
  WindowSlots result{};
  NM_ACT_UNROLL
  for (int eight = 0; eight < 2; ++eight) {
    const uint32_t lower = mask >> 8 * eight & 15u, upper = mask >> (8 * eight + 4) & 15u;
    const uint32_t from_lower = look_up_nibble(kLowerGives, lower), from_upper = look_up_nibble(kUpperGives, upper);
    set_window(result, 2 * eight, lower & ~from_lower);
    set_window(result, 2 * eight + 1, upper & ~from_upper);
    set_window(result, 4 + eight, from_lower >> 2 | (from_upper << 2 & 15u));
  }
  return result;
}

// Which of the features 12 to 15 (bits 0 to 3) go to windows 4 and 5, the others present going to 2 and 3: by the room
// (0 to 2) in windows 2, 3, 4, 5, two bits each, and the features present << 8.
struct CycleTable {
  uint8_t right[4096];
};

constexpr CycleTable make_cycle_table() {
  CycleTable table{};
  for (int at = 0; at < 4096; ++at) {
    const int room[4] = {at & 3, at >> 2 & 3, at >> 4 & 3, at >> 6 & 3}, present = at >> 8;
    if (room[0] == 3 || room[1] == 3 || room[2] == 3 || room[3] == 3) continue;
    for (int right = 0; right < 16; ++right) {
      const int left = present & ~right;
      if ((right & ~present) != 0) continue;
      const bool fits = (left & 1) + (left >> 1 & 1) <= room[0] && (left >> 2 & 1) + (left >> 3) <= room[1] &&
                        (right & 1) + (right >> 2 & 1) <= room[2] && (right >> 1 & 1) + (right >> 3) <= room[3];
      if (fits) {
        table.right[at] = static_cast<uint8_t>(right);
        break;
      }
    }
  }
  return table;
}

// Of the features `at` and `at` + 1 (bits 0 and 1 of `pair`), those that do not fit beside `others` (0 to 2) in their
// first window; of two for one place, the one whose second window is no fuller than the other's.
NM_ACT_INLINE uint32_t overflow(uint32_t pair, uint32_t others, bool first_goes) {
  return others == 0 ? 0u : others == 2 ? pair : pair == 3u ? (first_goes ? 1u : 2u) : 0u;
}

// Exactly eight survivors.
NM_ACT_INLINE WindowSlots assign_8_of_16(uint32_t mask, const uint8_t* cycle_table) {
  const auto bit = [mask](int i) { return mask >> i & 1u; };
  const uint32_t cycle = mask >> 12 & 15u, low = mask >> 8 & 3u, high = mask >> 10 & 3u;
  const bool to_2 = bit(4) + bit(12) + bit(13) <= bit(5) + bit(14) + bit(15);
  const bool to_4 = bit(6) + bit(12) + bit(14) <= bit(7) + bit(13) + bit(15);
  const uint32_t from_0 = overflow(low, bit(0) + bit(1), to_2), from_1 = overflow(high, bit(2) + bit(3), to_4);
  const uint32_t room = 0xAAu - (bit(4) + (from_0 & 1u)) - ((bit(5) + (from_0 >> 1)) << 2) -
                        ((bit(6) + (from_1 & 1u)) << 4) - ((bit(7) + (from_1 >> 1)) << 6);
  const uint32_t right = cycle_table[room | cycle << 8], left = cycle & ~right;
  WindowSlots result{};
  set_window(result, 0, (mask & 3u) | (low & ~from_0) << 2);
  set_window(result, 1, (mask >> 2 & 3u) | (high & ~from_1) << 2);
  set_window(result, 2, bit(4) | (from_0 & 1u) << 1 | (left & 3u) << 2);
  set_window(result, 3, bit(5) | (from_0 & 2u) | (left >> 2) << 2);
  set_window(result, 4, bit(6) | (from_1 & 1u) << 1 | (right & 1u) << 2 | (right & 4u) << 1);
  set_window(result, 5, bit(7) | (from_1 & 2u) | (right & 2u) << 1 | (right & 8u));
  return result;
}

}  // namespace nm_act
