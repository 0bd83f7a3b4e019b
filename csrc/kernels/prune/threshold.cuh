// The n of m features with the largest keys, as a bit mask.
//
// A sorting network in registers (Batcher's odd-even merge sort: 3.75 compare steps per feature for m = 16) yields the
// n-th largest key t of a group. All keys above t survive, and of those equal to t as many of the first ones as are
// still needed. For unscaled 16-bit features, two groups are sorted at once, one in each half of a word.
#pragma once

#include "select.h"

namespace nm_act {

// A word as two 16-bit keys (Halves) or one 32-bit key (Whole).
struct Halves {
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return min_halves(a, b); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_halves(a, b); }
};
struct Whole {
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return ::min(a, b); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ::max(a, b); }
};

// Batcher's network, which sorts kCount keys from kFirst on in descending order. Template recursion makes every index a
// constant, so the keys stay in registers. merge() merges two sorted halves of every kStride-th key.
template <class Order, int kFirst, int kCount, int kStride, int kSize>
__device__ __forceinline__ void merge(uint32_t (&key)[kSize]) {
  const auto exchange = [&key](int high, int low) {
    const uint32_t a = key[high], b = key[low];
    key[high] = Order::max(a, b);
    key[low] = Order::min(a, b);
  };
  if constexpr (2 * kStride < kCount) {
    merge<Order, kFirst, kCount, 2 * kStride>(key);
    merge<Order, kFirst + kStride, kCount, 2 * kStride>(key);
#pragma unroll
    for (int i = kFirst + kStride; i + kStride < kFirst + kCount; i += 2 * kStride) exchange(i, i + kStride);
  } else {
    exchange(kFirst, kFirst + kStride);
  }
}

template <class Order, int kFirst, int kCount, int kSize>
__device__ __forceinline__ void sort_descending(uint32_t (&key)[kSize]) {
  if constexpr (kCount > 1) {
    sort_descending<Order, kFirst, kCount / 2>(key);
    sort_descending<Order, kFirst + kCount / 2, kCount / 2>(key);
    merge<Order, kFirst, kCount, 1>(key);
  }
}

template <class Order, int kSize>
__device__ __forceinline__ uint32_t nth_largest(uint32_t (&key)[kSize], int n) {
  sort_descending<Order, 0, kSize>(key);
  // key[n - 1] as the maximum of the keys from there on: an index known only at run time would move the keys to local
  // memory.
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) result = Order::max(result, i >= n - 1 ? key[i] : 0u);
  return result;
}

// Clears the ties with the highest indices until n bits are set.
__device__ __forceinline__ uint32_t drop_ties(uint32_t at_least, uint32_t above, int n) {
  uint32_t ties = at_least & ~above;
  for (int excess = __popc(at_least) - n; excess > 0; --excess) {
    const uint32_t last = 0x80000000u >> __clz(static_cast<int>(ties));
    ties ^= last;
    at_least ^= last;
  }
  return at_least;
}

// Mask of the survivors of a group.
template <int kGroup>
__device__ __forceinline__ uint32_t survivors_of_one(const uint32_t (&key)[kGroup], int n) {
  uint32_t sorted[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sorted[i] = key[i];
  const uint32_t threshold = nth_largest<Whole>(sorted, n);
  uint32_t at_least = 0, above = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    at_least |= (key[i] >= threshold ? 1u : 0u) << i;
    above |= (key[i] > threshold ? 1u : 0u) << i;
  }
  return drop_ties(at_least, above, n);
}

}  // namespace nm_act
