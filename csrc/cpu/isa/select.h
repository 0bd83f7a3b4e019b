// Top-N-of-M selection: keys, the Nth largest of a group and the survivors' bit mask.
//
// kGroupLanes groups are selected together, one per lane: after a transpose, key[i] holds element i of all these
// groups. A sorting network finds the Nth largest key. What is larger survives, and of those equal to it the ones of
// lowest index, until there are N.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa/simd.h"
#include "kernels/prune/window_select.h"

namespace nm_act::cpu::NM_ACT_ISA {

constexpr int kGroupLanes = kLanes;
// A number of groups that fills whole words of the mask, for every M, and whole vectors.
constexpr int kBlockGroups = 16;
typedef int32_t GroupVec __attribute__((vector_size(kGroupLanes * 4)));

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
template <int M>
[[gnu::always_inline]] inline void load_groups(const int32_t* keys, GroupVec (&key)[M]) {
#if defined(__clang__)
  for (int i = 0; i < M; ++i)
    for (int lane = 0; lane < kGroupLanes; ++lane) key[i][lane] = keys[lane * M + i];
#else
  GroupVec even;
  for (int lane = 0; lane < kGroupLanes; ++lane) even[lane] = 2 * lane;
  std::memcpy(key, keys, sizeof(key));
  for (int step = 1; step < M; step *= 2) {
    GroupVec parted[M];
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

inline void order_keys(GroupVec& larger, GroupVec& smaller) {
  const GroupVec a = larger, b = smaller;
  larger = a > b ? a : b;
  smaller = a > b ? b : a;
}

// Sorts key[First], key[First + Step], ... (Count of them), largest first: Batcher's odd-even merge sort.
template <int First, int Step, int Count, int M>
[[gnu::always_inline]] inline void merge_halves(GroupVec (&key)[M]) {
  if constexpr (Count == 2) {
    order_keys(key[First], key[First + Step]);
  } else {
    merge_halves<First, 2 * Step, Count / 2>(key);
    merge_halves<First + Step, 2 * Step, Count / 2>(key);
#pragma GCC unroll 16
    for (int i = 1; i + 1 < Count; i += 2) order_keys(key[First + i * Step], key[First + (i + 1) * Step]);
  }
}

template <int First, int Count, int M>
[[gnu::always_inline]] inline void sort_keys(GroupVec (&key)[M]) {
  if constexpr (Count > 1) {
    sort_keys<First, Count / 2>(key);
    sort_keys<First + Count / 2, Count / 2>(key);
    merge_halves<First, 1, Count>(key);
  }
}

template <int M>
inline void select_block(const int32_t* keys, int keep, uint32_t* bits) {
  GroupVec key[M], sorted[M];
  load_groups<M>(keys, key);
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) sorted[i] = key[i];
  sort_keys<0, M>(sorted);
  const GroupVec least = sorted[keep - 1], next = sorted[keep];
  GroupVec mask{};
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) mask |= (key[i] >= least) & int32_t(1u << i);
  const GroupVec tied = least == next;
  int64_t any[kGroupLanes / 2], some = 0;
  std::memcpy(any, &tied, sizeof(tied));
  for (const int64_t pair : any) some |= pair;
  if (some != 0) {  // more than N are as large as the Nth
    GroupVec room = GroupVec{} + keep;
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) room += key[i] > least;  // -1 where true
#pragma GCC unroll 32
    for (int i = 0; i < M; ++i) {
      const GroupVec equal = key[i] == least;
      mask &= ~((equal & (room <= 0)) & int32_t(1u << i));
      room += equal;
    }
  }
  std::memcpy(bits, &mask, sizeof(mask));
}

// 2:4+1 (kernels/prune/window_select.h has the rule): the two quads that gain most from the slot of column e get it.
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
    constexpr int kPerWord = 32 / M;
    uint32_t* words = mask + g / kPerWord;
    for (int w = 0; w < kBlockGroups / kPerWord; ++w) {
      uint32_t word = 0;
      for (int i = 0; i < kPerWord; ++i) word |= bits[w * kPerWord + i] << (i * M);
      words[w] = word;
    }
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
