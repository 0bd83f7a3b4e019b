// Selects the n largest of every m unscaled 16-bit features, m = 8 to 32, in a warp that loaded them coalesced: step s
// of lane l holds chunk 32 * s + l. A group of 16 or 32 features is spread over two or four lanes, so the lanes first
// exchange two or four steps, after which each lane has a whole group of one step. The n-th largest key of that group
// goes back to the group's lanes, and each lane compares its own features with it in place.
//
// The threshold does not depend on the order of the keys, so the two keys of a word stay together. A sorting network
// over words sorts the low and the high keys of a group as two lists at once; the larger of the i-th key of one list
// and the i-th last of the other, over all i, make up the upper half of the group. That takes (31 + 5) / 32 two-key
// operations per feature fewer than a network over all m keys. For the same reason, the exchanges may permute the keys.
#pragma once

#include "compress.cuh"
#include "threshold.cuh"

namespace nm_act {

__device__ __forceinline__ uint32_t swap_halves(uint32_t word) { return permute_bytes(word, word, 0x1032); }

// Sorts the bitonic sequence of kCount keys from kFirst on in descending order.
template <class Order, int kFirst, int kCount, int kSize>
__device__ __forceinline__ void merge_bitonic(uint32_t (&key)[kSize]) {
  if constexpr (kCount > 1) {
#pragma unroll
    for (int i = kFirst; i < kFirst + kCount / 2; ++i) {
      const uint32_t a = key[i], b = key[i + kCount / 2];
      key[i] = Order::max(a, b);
      key[i + kCount / 2] = Order::min(a, b);
    }
    merge_bitonic<Order, kFirst, kCount / 2>(key);
    merge_bitonic<Order, kFirst + kCount / 2, kCount / 2>(key);
  }
}

// The n-th largest of a group's 2 * kWords keys, in both halves of the result. n must be the same for all threads.
template <int kWords>
__device__ __forceinline__ uint32_t nth_largest_of_words(uint32_t (&key)[kWords], int n) {
  sort_descending<Halves, 0, kWords>(key);
  uint32_t threshold = 0xFFFFFFFFu;
  if (n == kWords) {
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      threshold = Halves::min(threshold, Halves::max(key[i], swap_halves(key[kWords - 1 - i])));
    }
    threshold = Halves::min(threshold, swap_halves(threshold));
  } else {
    // The low halves of the words get the larger half of the keys, the high halves the smaller: two bitonic sequences.
    uint32_t both[kWords];
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
      const uint32_t other = swap_halves(key[kWords - 1 - i]);
      const uint32_t upper = Halves::max(key[i], other), lower = Halves::min(key[i], other);
      both[i] = permute_bytes(upper, lower, 0x5410);
      both[kWords - 1 - i] = permute_bytes(upper, lower, 0x7632);
    }
    merge_bitonic<Halves, 0, kWords>(both);
    const int at = n > kWords ? n - kWords - 1 : n - 1;
#pragma unroll
    for (int i = 0; i < kWords; ++i) threshold = i == at ? both[i] : threshold;
    threshold = permute_bytes(threshold, threshold, n > kWords ? 0x3232 : 0x1010);
  }
  return threshold;
}

// Byte mask over the eight features of a chunk, four per word.
struct ChunkMask {
  uint32_t word[2];
  __device__ __forceinline__ uint32_t count() const {
    return subtract_masked(word[0], 0xFFFFFFFFu, subtract_masked(word[1], 0xFFFFFFFFu, 0));
  }
  // Clears the last `excess` features that are set in `ties`.
  __device__ __forceinline__ void drop(ChunkMask ties, int excess) {
    for (; excess > 0; --excess) {
      const int last = ties.word[1] != 0 ? 1 : 0;
      const uint32_t byte = 0xFF000000u >> (__clz(static_cast<int>(last ? ties.word[1] : ties.word[0])) & 24);
      const uint32_t low = last ? 0 : byte, high = last ? byte : 0;
      ties.word[0] &= ~low, word[0] &= ~low;
      ties.word[1] &= ~high, word[1] &= ~high;
    }
  }
};

// The features whose key + bias has its top bit (15 or 31) set.
__device__ __forceinline__ ChunkMask compare_chunk(const uint32_t (&key)[4], uint32_t bias) {
  return {{permute_bytes(key[0] + bias, key[1] + bias, 0xFDB9), permute_bytes(key[2] + bias, key[3] + bias, 0xFDB9)}};
}

// The thresholds of this lane's chunks; key[s] holds the keys of step s.
template <int kGroup, int kSteps>
__device__ __forceinline__ void thresholds_of(const uint32_t (&key)[kSteps][4], int n, uint32_t (&threshold)[kSteps]) {
  constexpr int kLanes = kGroup / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int first = 0; first < kSteps; first += kLanes) {
    uint32_t group[4 * kLanes];
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) group[i] = key[first][i];
    } else {
      // Of each two steps, an even lane collects the first from itself and its neighbour, an odd lane the second.
      const bool odd = lane & 1;
      uint32_t part[kLanes / 2][8];
#pragma unroll
      for (int pair = 0; pair < kLanes / 2; ++pair) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t even_step = key[first + 2 * pair][i], odd_step = key[first + 2 * pair + 1][i];
          part[pair][i] = odd ? odd_step : even_step;
          part[pair][4 + i] = __shfl_xor_sync(kAllLanes, odd ? even_step : odd_step, 1);
        }
      }
      if constexpr (kLanes == 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) group[i] = part[0][i];
      } else {
        const bool upper = lane & 2;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          group[i] = upper ? part[1][i] : part[0][i];
          group[8 + i] = __shfl_xor_sync(kAllLanes, upper ? part[0][i] : part[1][i], 2);
        }
      }
    }
    const uint32_t own = nth_largest_of_words(group, n);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      threshold[first + i] = kLanes == 1 ? own : __shfl_sync(kAllLanes, own, (lane & ~(kLanes - 1)) | i);
    }
  }
}

// Sum over the lanes of a group, four bytes at a time; `lower` gets the sum over the lanes before this one.
template <int kLanes>
__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t value, uint32_t& lower) {
  lower = 0;
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, bit);
    if (threadIdx.x & bit) lower += other;
    value += other;
  }
  return value;
}

// The survivors of four steps; z[s] holds two features per word. The whole warp must call.
template <class E, int kGroup>
__device__ __forceinline__ void survivors_of_steps(const uint32_t (&z)[4][4], int n, ChunkMask (&kept)[4]) {
  constexpr int kLanes = kGroup / kChunk;
  uint32_t key[4][4], threshold[4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) key[step][i] = magnitude_keys(z[step][i], E::kNanKeys);
  }
  thresholds_of<kGroup>(key, n, threshold);
  uint32_t counts = 0;  // one byte per step
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    kept[step] = compare_chunk(key[step], 0x80008000u - threshold[step]);
    counts += kept[step].count() << 8 * step;
  }
  uint32_t lower;
  const uint32_t excess = sum_of_lanes<kLanes>(counts, lower) - 0x01010101u * static_cast<uint32_t>(n);
  if (__ballot_sync(kAllLanes, excess != 0) == 0) return;

  // Too many keys equal the threshold in some group: the last of them are dropped.
  ChunkMask ties[4];
  counts = 0;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const ChunkMask above = compare_chunk(key[step], 0x7FFF7FFFu - threshold[step]);
    ties[step] = {{kept[step].word[0] & ~above.word[0], kept[step].word[1] & ~above.word[1]}};
    counts += ties[step].count() << 8 * step;
  }
  const uint32_t later = sum_of_lanes<kLanes>(counts, lower) - lower - counts;  // ties in the lanes after this one
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int own = counts >> 8 * step & 0xFF, left = int(excess >> 8 * step & 0xFF) - int(later >> 8 * step & 0xFF);
    kept[step].drop(ties[step], min(own, left));
  }
}

// Byte mask of the features that beat enough others to be among the n largest of their pair or group of four.
template <class E>
__device__ __forceinline__ uint32_t survivors_of_pairs(uint32_t low, uint32_t high) {
  const uint32_t a = magnitude_keys(low, E::kNanKeys), b = magnitude_keys(high, E::kNanKeys);
  return byte_mask({a - swap_halves(a) + 0x7FFF8000u, b - swap_halves(b) + 0x7FFF8000u});
}

template <class E>
__device__ __forceinline__ uint32_t survivors_of_four(uint32_t low, uint32_t high, int n) {
  const Comparisons c = compare_keys(magnitude_keys(low, E::kNanKeys), magnitude_keys(high, E::kNanKeys));
  if (n == 2) return byte_mask(winners_of(c));
  const uint32_t not_straight = ~c.straight;
  if (n == 1) return byte_mask({c.straight & c.crossed & c.within_a, not_straight & c.from_b & c.within_b});
  return byte_mask({c.straight | c.crossed | c.within_a, not_straight | c.from_b | c.within_b});
}

// The survivors of a chunk's pairs or groups of four.
template <class E>
__device__ __forceinline__ ChunkMask survivors_of_short(const uint32_t (&word)[4], Pattern pattern) {
  ChunkMask kept;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t low = word[2 * i], high = word[2 * i + 1];
    kept.word[i] =
        pattern.group == 2 ? survivors_of_pairs<E>(low, high) : survivors_of_four<E>(low, high, pattern.keep);
  }
  return kept;
}

template <class E>
__device__ __forceinline__ void clear_pruned(Chunk<E>& z, ChunkMask kept) {
#pragma unroll
  for (int i = 0; i < 4; ++i) z.word[i] &= permute_bytes(kept.word[i / 2], 0, i % 2 ? 0x3322 : 0x1100);
}

}  // namespace nm_act
