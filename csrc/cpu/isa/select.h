// Top-N-of-M selection: keys, ranks and the survivors' bit mask.
//
// kGroupLanes groups are ranked together, one a lane: after a transpose, key[i] holds element i of all these groups,
// and each of the M(M-1)/2 pairs costs one vector compare. Element j beats an earlier element i only if its key is
// strictly greater, which is the lowest-index rule for ties; an element survives if fewer than N others beat it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa/simd.h"

namespace nm_act::cpu::NM_ACT_ISA {

constexpr int kGroupLanes = kLanes;
// Groups that fill whole words of the mask for every M, and whole vectors.
constexpr int kBlockGroups = 16;
typedef int32_t GroupVec __attribute__((vector_size(kGroupLanes * 4)));

constexpr int32_t kInfKey = 0x7f800000;
constexpr int32_t kNanKey = 0x7fffffff;
constexpr int32_t kMaxFiniteKey = 0x7f7fffff;

// The order-preserving integer key of the contract in nm_act/reference.py: score bits, then infinity, then NaN.
inline int32_t selection_key(float z, float scale) {
  const int32_t bits = bit_cast<int32_t>(z) & 0x7fffffff;
  const int32_t score = bit_cast<int32_t>(z * scale) & 0x7fffffff;
  const int32_t finite = score > kMaxFiniteKey ? kMaxFiniteKey : score;
  return bits < kInfKey ? finite : bits > kInfKey ? kNanKey : kInfKey;
}

template <int M>
inline void rank_block(const int32_t* keys, int keep, uint32_t* bits) {
  GroupVec key[M], rank[M];
  for (int i = 0; i < M; ++i) {
    for (int lane = 0; lane < kGroupLanes; ++lane) key[i][lane] = keys[lane * M + i];
    rank[i] = GroupVec{} + i;
  }
#pragma GCC unroll 32
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 32
    for (int j = i + 1; j < M; ++j) {
      const GroupVec later_wins = key[j] > key[i];  // -1 where true
      rank[i] -= later_wins;
      rank[j] += later_wins;
    }
  }
  GroupVec mask{};
  for (int i = 0; i < M; ++i) mask |= (rank[i] < keep) & int32_t(1u << i);
  std::memcpy(bits, &mask, sizeof(mask));
}

// Bit k of the mask (bit k % 32 of word k / 32) says whether element k of the row survives. keys must be readable, and
// mask writable, up to the next multiple of kBlockGroups groups.
template <int M>
void select_row(const int32_t* keys, int64_t in_features, int keep, uint32_t* mask) {
  const int64_t groups = in_features / M;
  for (int64_t g = 0; g < groups; g += kBlockGroups) {
    uint32_t bits[kBlockGroups];
    for (int b = 0; b < kBlockGroups; b += kGroupLanes) rank_block<M>(keys + (g + b) * M, keep, bits + b);
    constexpr int kPerWord = 32 / M;
    uint32_t* words = mask + g / kPerWord;
    for (int w = 0; w < kBlockGroups / kPerWord; ++w) {
      uint32_t word = 0;
      for (int i = 0; i < kPerWord; ++i) word |= bits[w * kPerWord + i] << (i * M);
      words[w] = word;
    }
  }
}

inline void select_row(const int32_t* keys, int64_t in_features, int keep, int group, uint32_t* mask) {
  switch (group) {
    case 2: return select_row<2>(keys, in_features, keep, mask);
    case 4: return select_row<4>(keys, in_features, keep, mask);
    case 8: return select_row<8>(keys, in_features, keep, mask);
    case 16: return select_row<16>(keys, in_features, keep, mask);
    default: return select_row<32>(keys, in_features, keep, mask);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
