// Top-N-of-M selection: keys, the Nth largest of a group and the survivors' bit mask.
//
// As many groups as a vector has keys are selected together, one per lane: after a transpose, key[i] holds element i of
// all these groups. A sorting network finds the Nth largest key. Elements with larger keys survive, and of those with
// equal keys the ones of lowest index, until there are N survivors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa/simd.h"
#include "kernels/prune/window_select.h"

namespace nm_act::cpu::NM_ACT_ISA {

constexpr int kVectorBytes = kLanes * 4;
constexpr int kGroupLanes = kLanes;
// A number of groups that fills whole mask words, for every M, and whole vectors.
constexpr int kBlockGroups = 16;

// A vector of keys, one for each of kCount groups. Keys of 16 bits take half the instructions of 32.
template <class Key>
struct Groups {
  typedef Key Vec __attribute__((vector_size(kVectorBytes)));
  static constexpr int kCount = kVectorBytes / sizeof(Key);
};
typedef Groups<int32_t>::Vec GroupVec;

constexpr int32_t kInfKey = 0x7f800000;
constexpr int32_t kNanKey = 0x7fffffff;
constexpr int32_t kMaxFiniteKey = 0x7f7fffff;

// The integer key of the contract in nm_act/reference.py, ordered as the score; above it infinity, then NaN.
inline int32_t selection_key(float z, float scale) {
  const int32_t bits = bit_cast<int32_t>(z) & 0x7fffffff;
  const int32_t score = bit_cast<int32_t>(z * scale) & 0x7fffffff;
  const int32_t finite = score > kMaxFiniteKey ? kMaxFiniteKey : score;
  return bits < kInfKey ? finite : bits > kInfKey ? kNanKey : kInfKey;
}

// rank[i] = number of the M keys that beat key i.
template <int M>
inline void rank_keys(const GroupVec (&key)[M], GroupVec (&rank)[M]) {
  for (int i = 0; i < M; ++i) rank[i] = GroupVec{} + i;
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 32
    for (int j = i + 1; j < M; ++j) {
      const GroupVec later_wins = key[j] > key[i];  // -1 where true
      rank[i] -= later_wins;
      rank[j] += later_wins;
    }
  }
}

inline GroupVec choose(GroupVec condition, GroupVec a, GroupVec b) { return (a & condition) | (b & ~condition); }

// key[i][lane] = keys[lane * M + i]: elements of even and odd index are parted log2(M) times.
template <int M, class Key, class Vec>
[[gnu::always_inline]] inline void load_groups(const Key* keys, Vec (&key)[M]) {
  constexpr int kCount = Groups<Key>::kCount;
#if defined(__clang__)
  for (int i = 0; i < M; ++i)
    for (int lane = 0; lane < kCount; ++lane) key[i][lane] = keys[lane * M + i];
#else
  Vec even;
  for (int lane = 0; lane < kCount; ++lane) even[lane] = Key(2 * lane);
  std::memcpy(key, keys, sizeof(key));
  for (int step = 1; step < M; step *= 2) {
    Vec parted[M];
#pragma GCC unroll 16
    for (int i = 0; i < M / 2; ++i) {
      parted[i] = __builtin_shuffle(key[2 * i], key[2 * i + 1], even);
      parted[i + M / 2] = __builtin_shuffle(key[2 * i], key[2 * i + 1], even + 1);
    }
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) key[i] = parted[i];
  }
#endif
}

template <class Vec>
[[gnu::always_inline]] inline void order_keys(Vec& larger, Vec& smaller) {
  const Vec a = larger, b = smaller;
  larger = a > b ? a : b;
  smaller = a > b ? b : a;
}

// Sorts key[First], key[First + Step], ... (Count of them), largest first: Batcher's odd-even merge sort.
template <int First, int Step, int Count, class Vec, int M>
[[gnu::always_inline]] inline void merge_halves(Vec (&key)[M]) {
  if constexpr (Count == 2) {
    order_keys(key[First], key[First + Step]);
  } else {
    merge_halves<First, 2 * Step, Count / 2>(key);
    merge_halves<First + Step, 2 * Step, Count / 2>(key);
#pragma GCC unroll 16
    for (int i = 1; i + 1 < Count; i += 2) order_keys(key[First + i * Step], key[First + (i + 1) * Step]);
  }
}

template <int First, int Count, class Vec, int M>
[[gnu::always_inline]] inline void sort_keys(Vec (&key)[M]) {
  if constexpr (Count > 1) {
    sort_keys<First, Count / 2>(key);
    sort_keys<First + Count / 2, Count / 2>(key);
    merge_halves<First, 1, Count>(key);
  }
}

// The survivors of Groups<Key>::kCount groups, one bit an element; M is at most the bits of a key.
template <class Key, class Vec, int M>
[[gnu::always_inline]] inline Vec survivors(const Vec (&key)[M], int keep) {
  Vec sorted[M];
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) sorted[i] = key[i];
  sort_keys<0, M>(sorted);
  const Vec least = sorted[keep - 1], next = sorted[keep];
  Vec mask{};
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) mask |= (key[i] >= least) & Key(1u << i);
  const Vec tied = least == next;
  int64_t any[kVectorBytes / 8], some = 0;
  std::memcpy(any, &tied, sizeof(tied));
  for (const int64_t part : any) some |= part;
  if (some != 0) {  // more than N are as large as the Nth
    Vec room = Vec{} + Key(keep);
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) room += key[i] > least;  // -1 where true
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      const Vec equal = key[i] == least;
      mask &= ~((equal & (room <= 0)) & Key(1u << i));
      room += equal;
    }
  }
  return mask;
}

template <int M>
inline void select_block(const int32_t* keys, int keep, uint32_t* bits) {
  GroupVec key[M];
  load_groups<M>(keys, key);
  const GroupVec mask = survivors<int32_t>(key, keep);
  std::memcpy(bits, &mask, sizeof(mask));
}

// The words of a mask, bit k % 32 of words[k / 32] for element k, from `groups` masks of M bits.
template <int M, class Bits>
[[gnu::always_inline]] inline void join_bits(const Bits* bits, int groups, uint32_t* words) {
  constexpr int kPerWord = 32 / M;
  for (int g = 0; g < groups; g += kPerWord) {
    uint32_t word = 0;
    for (int i = 0; i < std::min(kPerWord, groups - g); ++i) word |= uint32_t(bits[g + i]) << (i * M);
    words[g / kPerWord] = word;
  }
}

// The same for M of 2 to 16 and 16-bit elements without a scale: magnitudes sort as integers, and all NaNs are equal.
template <int M>
inline void select_magnitudes(const int16_t* x, int16_t infinity, int keep, uint32_t* words) {
  using Vec = Groups<int16_t>::Vec;
  constexpr int kCount = Groups<int16_t>::kCount;
  Vec key[M];
  load_groups<M>(x, key);
  const Vec nan = Vec{} + int16_t(infinity + 1);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const Vec bits = key[i] & int16_t(0x7fff);
    key[i] = bits < nan ? bits : nan;
  }
  const Vec mask = survivors<int16_t>(key, keep);
  if constexpr (M == 16) {
    std::memcpy(words, &mask, sizeof(mask));
  } else {
    uint16_t bits[kCount];
    std::memcpy(bits, &mask, sizeof(mask));
    join_bits<M>(bits, kCount, words);
  }
}

// 2:4+1 (rule: kernels/prune/window_select.h): the two quads that gain most from a slot of column e get one.
inline void plus_one_block(const int32_t* keys, int e, uint32_t* bits) {
  GroupVec gain[4], alone[4], served[4];
  for (int quad = 0; quad < 4; ++quad) {
    GroupVec key[4], rank[4];
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < kGroupLanes; ++lane) key[i][lane] = keys[lane * kUnit + 4 * quad + i];
    }
    rank_keys(key, rank);
    GroupVec top{}, third{}, third_key{};
    for (int i = 0; i < 4; ++i) {
      top |= (rank[i] < 2) & (1 << i);
      third |= (rank[i] == 2) & (1 << i);
      third_key |= (rank[i] == 2) & key[i];
    }
    const GroupVec has_e = rank[e] < 2;
    gain[quad] = choose(has_e, third_key, key[e]);
    alone[quad] = top << 4 * quad;
    served[quad] = (top | choose(has_e, third, GroupVec{} + (1 << e))) << 4 * quad;
  }
  GroupVec rank[4], mask{};
  rank_keys(gain, rank);
  for (int quad = 0; quad < 4; ++quad) mask |= choose(rank[quad] < 2, served[quad], alone[quad]);
  std::memcpy(bits, &mask, sizeof(mask));
}

// 2:4+2, one unit: all but four of the lower two of each quad.
inline uint32_t plus_two_unit(const int32_t* keys, ExtraColumns extra) {
  uint32_t loser[8], place[8];
  for (int quad = 0; quad < 4; ++quad) {
    const int32_t* key = keys + 4 * quad;
    int found = 0;
    for (int i = 0; i < 4; ++i) {
      int rank = 0;
      for (int j = 0; j < 4; ++j) rank += j < i ? key[j] >= key[i] : key[j] > key[i];
      if (rank < 2) continue;
      loser[2 * quad + found] = uint32_t(key[i]);
      place[2 * quad + found++] = uint32_t(4 * quad + i);
    }
  }
  return ~drop_four(loser, place, extra.column[0], extra.column[1]) & 0xffff;
}

// Sets bit k % 32 of mask[k / 32] if element k of the row survives. keys must be readable, and mask writable, up to the
// next multiple of kBlockGroups groups. select writes the masks of kGroupLanes groups.
template <int M, class Select>
void select_blocks(const int32_t* keys, int64_t in_features, uint32_t* mask, const Select& select) {
  const int64_t groups = in_features / M;
  for (int64_t g = 0; g < groups; g += kBlockGroups) {
    uint32_t bits[kBlockGroups];
    for (int b = 0; b < kBlockGroups; b += kGroupLanes) select(keys + (g + b) * M, bits + b);
    join_bits<M>(bits, kBlockGroups, mask + g * M / 32);
  }
}

template <int M>
void select_row(const int32_t* keys, int64_t in_features, int keep, uint32_t* mask) {
  select_blocks<M>(keys, in_features, mask,
                   [keep](const int32_t* block, uint32_t* bits) { select_block<M>(block, keep, bits); });
}

inline void select_row(const int32_t* keys, int64_t in_features, const Pattern& pattern, uint32_t* mask) {
  const ExtraColumns extra = pattern.extra;
  if (extra.count == 1) {
    return select_blocks<kUnit>(keys, in_features, mask, [extra](const int32_t* block, uint32_t* bits) {
      plus_one_block(block, extra.column[0], bits);
    });
  }
  if (extra.count == 2) {
    return select_blocks<kUnit>(keys, in_features, mask, [extra](const int32_t* block, uint32_t* bits) {
      for (int unit = 0; unit < kGroupLanes; ++unit) bits[unit] = plus_two_unit(block + unit * kUnit, extra);
    });
  }
  switch (pattern.group) {
    case 2: return select_row<2>(keys, in_features, pattern.keep, mask);
    case 4: return select_row<4>(keys, in_features, pattern.keep, mask);
    case 8: return select_row<8>(keys, in_features, pattern.keep, mask);
    case 16: return select_row<16>(keys, in_features, pattern.keep, mask);
    default: return select_row<32>(keys, in_features, pattern.keep, mask);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
