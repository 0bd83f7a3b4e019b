// Statistics of one token by one thread block that holds the token's chunks in registers. All reductions have a fixed
// order, so results do not change from run to run.
#pragma once

#include "compress.cuh"

namespace nm_act {

inline constexpr int kMaxWarps = 32;

// The i-th chunk of this thread's kChunks: a warp's chunks are consecutive, so a thread's lie at constant distances and
// their loads and stores share one address.
template <int kChunks>
__device__ __forceinline__ int row_chunk(int i) {
  return (static_cast<int>(threadIdx.x) / 32 * kChunks + i) * 32 + static_cast<int>(threadIdx.x) % 32;
}

// Reductions over the block; every thread gets the result. Two slots of shared memory are used in turn, so that one
// barrier a reduction is enough: whoever writes a slot again has passed the barrier of the reduction between.
class RowReducer {
 public:
  using Slots = double[2][kMaxWarps];
  __device__ __forceinline__ explicit RowReducer(Slots& slots) : slots_(slots) {}

  template <class T>
  __device__ __forceinline__ T sum(T value) {
    return reduce(value, T{0}, [](T v) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
      return v;
    });
  }
  __device__ __forceinline__ uint32_t count(uint32_t value) {
    return reduce(value, 0u, [](uint32_t v) { return __reduce_add_sync(0xFFFFFFFFu, v); });
  }
  __device__ __forceinline__ uint32_t max(uint32_t value) {
    return reduce(value, 0u, [](uint32_t v) { return __reduce_max_sync(0xFFFFFFFFu, v); });
  }

 private:
  template <class T, class WarpReduce>
  __device__ __forceinline__ T reduce(T value, T identity, WarpReduce warp_reduce) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    T* slot = reinterpret_cast<T*>(slots_[turn_]);
    turn_ ^= 1;
    value = warp_reduce(value);
    if (lane == 0) slot[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_reduce(lane < warps ? slot[lane] : identity);
  }

  Slots& slots_;
  int turn_ = 0;
};

// Mean of the token, summed in float64 and rounded once. Chunks beyond the row hold zeros.
template <class E, int kChunks>
__device__ __forceinline__ float row_mean(const Chunk<E> (&x)[kChunks], int in_features, RowReducer& reducer) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum += static_cast<double>(x[i].get(j));
  }
  // + 0.0f: a mean of -0.0 reads 0.0.
  return static_cast<float>(reducer.sum(sum) / in_features) + 0.0f;
}

// Exact lower median, by binary search over the bits of the keys: 15 (31 for float32) counting passes over registers,
// no histogram, so no contention when the features share a few exponents. First the sign is settled by counting the
// negatives; then keys of the side that holds the median are searched: key < t is counted as in survivors_16, two
// 15-bit keys a word.
template <class E>
struct MedianKeys {
  static constexpr int kBits = E::k16Bit ? 15 : 31;
  static constexpr uint32_t kTop = E::k16Bit ? 0x7FFFu : 0x7FFFFFFFu;  // beyond every key searched for
  uint32_t word[Chunk<E>::kWords];

  MedianKeys() = default;

  __device__ __forceinline__ static uint32_t bits_of(const Chunk<E>& x, int i) {
    if constexpr (E::k16Bit) return x.word[i / 2] >> 16 * (i % 2) & 0xFFFFu;
    return x.word[i];
  }
  __device__ __forceinline__ static bool is_negative(uint32_t bits) { return bits > kTop + 1; }  // -0.0 is not
  __device__ __forceinline__ static bool is_nan(uint32_t bits) {
    return (bits & kTop) >= (E::k16Bit ? infinity_bits() + 1 : 0x7F800001u);
  }
  __device__ __forceinline__ static uint32_t infinity_bits() {
    if constexpr (E::k16Bit) return (E::kNanKeys & 0xFFFFu) - 1;
    return 0x7F800000u;
  }

  // Keys of the negative side grow with the value too; the other side's features are below (negatives) or beyond all
  // keys.
  __device__ __forceinline__ MedianKeys(const Chunk<E>& x, int count, bool negative) {
#pragma unroll
    for (int i = 0; i < Chunk<E>::kWords; ++i) word[i] = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t bits = bits_of(x, i), magnitude = bits & kTop;
      const uint32_t on_negative_side = is_negative(bits) ? kTop - magnitude : kTop;
      const uint32_t on_positive_side = is_negative(bits) ? 0 : magnitude;
      const uint32_t key = i >= count ? kTop : negative ? on_negative_side : on_positive_side;
      if constexpr (E::k16Bit) {
        word[i / 2] |= (key | 0x8000u) << 16 * (i % 2);
      } else {
        word[i] = key;
      }
    }
  }

  // sum + the number of keys >= t
  __device__ __forceinline__ uint32_t count_at_least(uint32_t t, uint32_t sum) const {
    if constexpr (E::k16Bit) {
      const uint32_t both = t * 0x10001u;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t mask = permute_bytes(word[i] - both, word[i + 1] - both, 0xFDB9);
        sum = subtract_masked(mask, 0xFFFFFFFFu, sum);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += word[i] >= t ? 1u : 0u;
    }
    return sum;
  }
};

template <class E, int kChunks>
__device__ __forceinline__ float row_median(const Chunk<E> (&x)[kChunks], int in_features, RowReducer& reducer) {
  using Keys = MedianKeys<E>;
  uint32_t negatives = 0, nans = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int count = chunk_count<false>(in_features, row_chunk<kChunks>(i));
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const uint32_t bits = Keys::bits_of(x[i], j);
      negatives += j < count && Keys::is_negative(bits) ? 1u : 0u;
      nans |= j < count && Keys::is_nan(bits) ? 1u : 0u;
    }
  }
  negatives = reducer.count(negatives);
  nans = reducer.max(nans);
  const uint32_t rank = static_cast<uint32_t>(in_features - 1) / 2;
  const bool negative = rank < negatives;

  Keys keys[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    keys[i] = Keys(x[i], chunk_count<false>(in_features, row_chunk<kChunks>(i)), negative);
  }
  const uint32_t slots = kChunks * kChunk * blockDim.x;
  uint32_t prefix = 0;
#pragma unroll 1
  for (int bit = Keys::kBits - 1; bit >= 0; --bit) {
    const uint32_t candidate = prefix | 1u << bit;
    uint32_t at_least = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) at_least = keys[i].count_at_least(candidate, at_least);
    // Slots beyond the row count as at least anything.
    if (slots - reducer.count(at_least) <= rank) prefix = candidate;
  }
  if (nans != 0) return __uint_as_float(0x7FC00000u);
  const uint32_t magnitude = negative ? Keys::kTop - prefix : prefix;
  const uint32_t bits = magnitude | (negative ? Keys::kTop + 1 : 0u);
  if constexpr (E::k16Bit) return E::low(bits);
  return __uint_as_float(bits);
}

}  // namespace nm_act
