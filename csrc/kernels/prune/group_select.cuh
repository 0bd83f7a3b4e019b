// The n of every m bare 16-bit features with the largest keys, m = 4 to 32, for a warp that holds rows of chunks: step
// s of lane l is chunk 32 * s + l, as coalesced loads give them. A group of 16 or 32 is in two or four lanes, so as
// many steps as lanes are exchanged first and each lane gets a whole group of one of them. The n-th largest key of a
// group goes back to its lanes, and each compares its own features with it where they are.
//
// A threshold does not depend on the order of the keys. Hence the two keys of a word stay together: a sorting network
// over the words sorts the low and the high keys of the group at once, and the larger of the i-th of one list and the
// i-th last of the other are the group's upper half: (31 + 5) / 32 operations of two keys each a feature less than a
// network over all m. Exchanges need no order either.
#pragma once

#include "compress.cuh"
#include "threshold.cuh"

namespace nm_act {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ uint32_t swap_halves(uint32_t word) { return permute_bytes(word, word, 0x1032); }

// Sorts a bitonic sequence of kCount keys from kFirst on, descending.
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

// The n-th largest of the 2 * kWords keys of a group, in both halves of the result; n is the same for all threads.
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
    // The upper half of the group in the low halves, the lower half in the high ones, each a bitonic sequence.
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

// Byte masks over the eight features of a chunk: four a word.
struct ChunkMask {
  uint32_t word[2];
  __device__ __forceinline__ uint32_t count() const {
    return subtract_masked(word[0], 0xFFFFFFFFu, subtract_masked(word[1], 0xFFFFFFFFu, 0));
  }
  // Clears the last `excess` of the features in `ties`.
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

// The features whose bit 15 or 31 of key + bias is set.
__device__ __forceinline__ ChunkMask compare_chunk(const uint32_t (&key)[4], uint32_t bias) {
  return {{permute_bytes(key[0] + bias, key[1] + bias, 0xFDB9), permute_bytes(key[2] + bias, key[3] + bias, 0xFDB9)}};
}

// The thresholds of this lane's chunks. key[s]: the keys of step s.
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
      // Of two steps an even lane keeps the first and gets its neighbour's part of it, an odd lane the second.
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

// Sum over the lanes of a group, of which `lower` gets those before this one. Four bytes at a time.
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

// Which features of four steps survive; the whole warp calls. z[s]: two features a word.
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
  uint32_t counts = 0;  // of each step, a byte
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    kept[step] = compare_chunk(key[step], 0x80008000u - threshold[step]);
    counts += kept[step].count() << 8 * step;
  }
  uint32_t lower;
  const uint32_t excess = sum_of_lanes<kLanes>(counts, lower) - 0x01010101u * static_cast<uint32_t>(n);
  if (__ballot_sync(kAllLanes, excess != 0) == 0) return;

  // Keys equal to the threshold are too many: the last of them go.
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

}  // namespace nm_act
