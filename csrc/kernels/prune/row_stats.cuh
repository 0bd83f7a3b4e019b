// Statistics of one token, computed by one thread block that holds the token's chunks in registers. Every reduction has
// a fixed order, so results do not change from run to run.
#pragma once

#include "compress.cuh"

namespace nm_act {

inline constexpr int kMaxWarps = 32;

// Index of the i-th of this thread's kChunks chunks. A warp's chunks are consecutive and a thread's are 32 chunks
// apart, so a thread's loads and stores share one address register.
template <int kChunks>
__device__ __forceinline__ int row_chunk(int i) {
  return (static_cast<int>(threadIdx.x) / 32 * kChunks + i) * 32 + static_cast<int>(threadIdx.x) % 32;
}

// Reductions over the block; every thread gets the result. Two slots of shared memory are used alternately, so one
// barrier per reduction suffices: before a slot is written again, all threads have passed the barrier of the other
// slot's reduction.
class RowReducer {
 public:
  using Slots = double[2][kMaxWarps];
  __device__ __forceinline__ explicit RowReducer(Slots& slots) : slots_(slots) {}

  template <class T>
  __device__ __forceinline__ T sum(T value) {
    return reduce(value, T{0}, [](T v) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
      return v;
    });
  }
  __device__ __forceinline__ uint32_t count(uint32_t value) {
    return reduce(value, 0u, [](uint32_t v) { return __reduce_add_sync(kAllLanes, v); });
  }
  __device__ __forceinline__ uint32_t max(uint32_t value) {
    return reduce(value, 0u, [](uint32_t v) { return __reduce_max_sync(kAllLanes, v); });
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

// Mean of the token, summed in float64 and rounded once. Chunks beyond the end of the row must hold zeros.
template <class E, int kChunks>
__device__ __forceinline__ float row_mean(const Chunk<E> (&x)[kChunks], int in_features, RowReducer& reducer) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum += static_cast<double>(x[i].get(j));
  }
  // + 0.0f turns a mean of -0.0 into 0.0.
  return static_cast<float>(reducer.sum(sum) / in_features) + 0.0f;
}

// Exact lower median by radix selection. A feature's key is its bit pattern, mapped so that keys order as the features
// do. A histogram of the keys' upper byte, in shared memory, gives the median's upper byte; a histogram of the next
// byte over the keys that share it gives the next byte, and so on. The atomic add combines a warp's equal bins in
// hardware.
template <class E>
struct MedianKeys {
  static constexpr int kBytes = E::k16Bit ? 2 : 4;
  static constexpr uint32_t kTop = E::k16Bit ? 0x8000u : 0x80000000u;
  static constexpr uint32_t kSigns = E::k16Bit ? 0x80008000u : 0x80000000u;

  // The keys of the features in a word; a larger feature has a larger key.
  static __device__ __forceinline__ uint32_t of_word(uint32_t word) {
    return word ^ (permute_bytes(word, word, E::k16Bit ? 0xBB99 : 0xBBBB) | kSigns);
  }
  static __device__ __forceinline__ float feature_of(uint32_t key) {
    const uint32_t bits = key & kTop ? key ^ kTop : key ^ (2 * kTop - 1);
    if constexpr (E::k16Bit) return E::low(bits);
    return __uint_as_float(bits);
  }
  // Whether the chunk contains a NaN.
  static __device__ __forceinline__ bool has_nan(const Chunk<E>& x) {
    uint32_t largest = 0;
    if constexpr (E::k16Bit) {
#pragma unroll
      for (int i = 0; i < Chunk<E>::kWords; ++i) largest = max_halves(largest, x.word[i] & 0x7FFF7FFFu);
      return max(largest & 0xFFFFu, largest >> 16) >= (E::kNanKeys & 0xFFFFu);
    } else {
#pragma unroll
      for (int i = 0; i < Chunk<E>::kWords; ++i) largest = max(largest, x.word[i] & 0x7FFFFFFFu);
      return largest >= kNanKey;
    }
  }
};

inline constexpr int kBins = 256;

// The bin that holds the feature of rank `rank`, which becomes the rank within that bin. Each warp computes it
// redundantly.
__device__ __forceinline__ uint32_t bin_of_rank(const uint32_t (&bins)[kBins], uint32_t& rank) {
  constexpr int kPerLane = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t count[kPerLane], own = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    count[i] = bins[lane * kPerLane + i];
    own += count[i];
  }
  uint32_t up_to = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  const uint32_t before = up_to - own;
  const uint32_t mask = __ballot_sync(kAllLanes, rank >= before && rank < up_to);
  uint32_t bin = static_cast<uint32_t>(lane * kPerLane), left = rank - before;
  bool beyond = true;
#pragma unroll
  for (int i = 0; i < kPerLane - 1; ++i) {
    beyond = beyond && left >= count[i];
    bin += beyond ? 1u : 0u;
    left -= beyond ? count[i] : 0u;
  }
  const int source = 31 - __clz(static_cast<int>(mask));
  rank = __shfl_sync(kAllLanes, left, source);
  return __shfl_sync(kAllLanes, bin, source);
}

// The first count_of(i) features of chunk i belong to the row.
template <class E, int kChunks, class CountOf>
__device__ __forceinline__ float row_median(const Chunk<E> (&x)[kChunks], int in_features, const CountOf& count_of) {
  using Keys = MedianKeys<E>;
  constexpr int kWordFeatures = E::k16Bit ? 2 : 1, kBits = 8 * Keys::kBytes;
  __shared__ __align__(16) uint32_t bins[Keys::kBytes][kBins];
  __shared__ uint32_t nans;
  for (int i = threadIdx.x; i < Keys::kBytes * kBins; i += blockDim.x) bins[i / kBins][i % kBins] = 0;
  if (threadIdx.x == 0) nans = 0;
  __syncthreads();
  uint32_t rank = static_cast<uint32_t>(in_features - 1) / 2, prefix = 0;
#pragma unroll
  for (int byte = 0; byte < Keys::kBytes; ++byte) {
    const int shift = kBits - 8 * (byte + 1);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int count = count_of(i);
      if (count == 0) continue;
      if (byte == 0 && Keys::has_nan(x[i])) atomicAdd(&nans, 1u);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const uint32_t word = Keys::of_word(x[i].word[j / kWordFeatures]);
        const uint32_t key = E::k16Bit ? (j % 2 ? word >> 16 : word & 0xFFFFu) : word;
        const bool counts = j < count && (byte == 0 || key >> (shift + 8) % kBits == prefix);
        if (counts) atomicAdd(&bins[byte][key >> shift & 0xFFu], 1u);
      }
    }
    __syncthreads();
    prefix = prefix << 8 | bin_of_rank(bins[byte], rank);
  }
  // + 0.0f turns -0.0 into 0.0.
  return nans != 0 ? __uint_as_float(0x7FC00000u) : Keys::feature_of(prefix) + 0.0f;
}

// Sums over a token for the variances before and after the selection, in float64, where no square of a 16-bit or
// float32 feature overflows. Sums of the dense features are taken about an origin: a thread's first feature, then the
// first thread's in its warp, and so on. With one of the n features as the origin, cancellation costs at most log2(n)
// of the 53 bits, however far the mean is from zero. The survivors need no origin: the pruned token contains
// zeros, so its variance is at least its mean square / in_features.
struct VarianceSums {
  float origin;
  int features;
  double z, z_squared, p, p_squared;

  // Sets the origin: the first feature that this thread adds.
  __device__ __forceinline__ void start_at(float first) { origin = first; }

  template <class E>
  __device__ __forceinline__ void add_dense(const Chunk<E>& chunk, int count) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) break;
      const double difference = static_cast<double>(chunk.get(i)) - static_cast<double>(origin);
      z += difference;
      z_squared = fma(difference, difference, z_squared);
    }
    features += count;
  }
  // The survivors, with or without the zeros between them.
  template <class E>
  __device__ __forceinline__ void add_kept(const Chunk<E>& chunk, int count = kChunk) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) break;
      const double value = chunk.get(i);
      p += value;
      p_squared = fma(value, value, p_squared);
    }
  }
  template <class E>
  __device__ __forceinline__ void add_kept(const Kept<E>& kept) {
    Chunk<E> survivors;
#pragma unroll
    for (int i = 0; i < Kept<E>::kWords; ++i) survivors.word[i] = kept.word[i];
    add_kept(survivors, kChunk / 2);
  }

  // sqrt(Var(z) / Var(p)), or 1 if Var(p) is 0. The whole block must call; only warp 0 gets the result.
  __device__ __forceinline__ float ratio(int in_features) {
    __shared__ VarianceSums of_warp[kMaxWarps];
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    combine_lanes();
    if (lane == 0) of_warp[threadIdx.x / 32] = *this;
    __syncthreads();
    if (threadIdx.x >= 32) return 1.0f;
    *this = lane < warps ? of_warp[lane] : VarianceSums{};
    combine_lanes();
    const double n = in_features;
    const double variance_z = z_squared / n - z / n * (z / n), variance_p = p_squared / n - p / n * (p / n);
    if (variance_p == 0) return 1.0f;
    return static_cast<float>(sqrt((variance_z < 0 ? 0 : variance_z) / variance_p));
  }

 private:
  __device__ __forceinline__ void combine_lanes() {
    const float first = __shfl_sync(kAllLanes, origin, 0);
    const double moved = static_cast<double>(origin) - static_cast<double>(first);
    z_squared += moved * (2 * z + features * moved);
    z += features * moved;
    origin = first;
    features = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<uint32_t>(features)));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      z += __shfl_xor_sync(kAllLanes, z, offset);
      z_squared += __shfl_xor_sync(kAllLanes, z_squared, offset);
      p += __shfl_xor_sync(kAllLanes, p, offset);
      p_squared += __shfl_xor_sync(kAllLanes, p_squared, offset);
    }
  }
};

}  // namespace nm_act
