// prune: the n of every m features with the largest keys, dense output, zeros elsewhere. m in {2, 4, 8, 16, 32}, any n.
//
// The n-th largest key t of a group comes from a sorting network in registers (Batcher's odd-even merge sort: 3.75
// compare steps a feature for m = 16); everything above t survives, and of the keys equal to t the first ones, as many
// as are left. Bare 16-bit features sort two groups at once, one in each half of a word: a thread takes two groups
// (more if m < 4). Scaled or 32-bit features have 32-bit keys, one group at a time. A thread's features are contiguous:
// 128 bytes for m = 32, so its 16-byte loads meet in L1. No shared memory, no communication. Limit: in_features % m ==
// 0.
#include "../launch.cuh"
#include "compress.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;

// Two keys at a time in the halves of a word, or one 32-bit key.
struct Halves {
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return min_halves(a, b); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_halves(a, b); }
};
struct Whole {
  static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return ::min(a, b); }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return ::max(a, b); }
};

// Batcher's network by template recursion, so that every index is a constant and the keys stay in registers: sorts
// kCount keys from kFirst on, descending. merge() joins two sorted halves, looking at every kStride-th key.
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
  // The maximum of what follows key[n - 2]: a choice by index would put the keys into local memory.
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) result = Order::max(result, i >= n - 1 ? key[i] : 0u);
  return result;
}

// Drops the highest-indexed ties until n bits are left.
__device__ __forceinline__ uint32_t drop_ties(uint32_t at_least, uint32_t above, int n) {
  uint32_t ties = at_least & ~above;
  for (int excess = __popc(at_least) - n; excess > 0; --excess) {
    const uint32_t last = 0x80000000u >> __clz(static_cast<int>(ties));
    ties ^= last;
    at_least ^= last;
  }
  return at_least;
}

// Masks of the survivors of two groups of 16-bit features given as words of two features.
template <class E, int kGroup>
__device__ __forceinline__ void survivors_of_two(const uint32_t* first, const uint32_t* second, int n, uint32_t& mask0,
                                                 uint32_t& mask1) {
  uint32_t key[kGroup], sorted[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const uint32_t a = magnitude_keys(first[i], E::kNanKeys), b = magnitude_keys(second[i], E::kNanKeys);
    key[2 * i] = permute_bytes(a, b, 0x5410);
    key[2 * i + 1] = permute_bytes(a, b, 0x7632);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sorted[i] = key[i];
  const uint32_t threshold = nth_largest<Halves>(sorted, n);
  uint32_t at_least0 = 0, at_least1 = 0, above0 = 0, above1 = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t not_below = key[i] - threshold + 0x80008000u, beyond = key[i] - threshold + 0x7FFF7FFFu;
    at_least0 |= (not_below >> 15 & 1u) << i;
    at_least1 |= (not_below >> 31) << i;
    above0 |= (beyond >> 15 & 1u) << i;
    above1 |= (beyond >> 31) << i;
  }
  mask0 = drop_ties(at_least0, above0, n);
  mask1 = drop_ties(at_least1, above1, n);
}

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

template <class E, int kGroup, bool kVector, bool kScaled>
__global__ void __launch_bounds__(kThreads) prune_kernel(const __grid_constant__ PruneParams params) {
  using Raw = typename E::Raw;
  constexpr bool kHalves = E::k16Bit && !kScaled;
  constexpr int kFeatures = kHalves ? (2 * kGroup < kChunk ? kChunk : 2 * kGroup) : (kGroup < kChunk ? kChunk : kGroup);
  constexpr int kChunks = kFeatures / kChunk;
  const int in_features = params.in_features;
  const unsigned threads_per_token = static_cast<unsigned>(in_features + kFeatures - 1) / kFeatures;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t token = thread / threads_per_token;
  const int feature = static_cast<int>(thread - token * threads_per_token) * kFeatures;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (token >= params.tokens) return;

  const Raw* source = static_cast<const Raw*>(params.x) + token * params.x_stride + feature;
  Chunk<E> z[kChunks];
  int count[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    count[i] = chunk_count<kVector>(in_features, feature / kChunk + i);
    z[i] = count[i] > 0 ? load_chunk<E, kVector>(source + i * kChunk, count[i]) : zero_chunk<E>();
  }
  if (params.eta != nullptr) {
    const float eta = __ldg(params.eta + token);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) subtract(z[i], eta);
  }
  uint32_t key[kHalves ? 1 : kFeatures];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = feature + i * kChunk;
    if (params.shift != nullptr && count[i] > 0)
      subtract(z[i], load_channels<kVector>(params.shift + at, count[i], 0.0f));
    if constexpr (!kHalves) {
      ChannelChunk scale;
      if (kScaled && params.channel_scale != nullptr && count[i] > 0) {
        scale = load_channels<kVector>(params.channel_scale + at, count[i], 1.0f);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) scale.value[j] = 1.0f;
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) key[i * kChunk + j] = scaled_key(z[i].get(j), scale.value[j]);
    }
  }

  const int n = params.pattern.keep;
  uint32_t kept[kFeatures / 32 + 1] = {};  // a bit a feature
  if constexpr (kHalves) {
#pragma unroll
    for (int group = 0; group < kFeatures / kGroup; group += 2) {
      constexpr int kWords = kGroup / 2;
      uint32_t words[2 * kWords];
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) words[i] = z[(group * kWords + i) / 4].word[(group * kWords + i) % 4];
      uint32_t mask[2];
      survivors_of_two<E, kGroup>(words, words + kWords, n, mask[0], mask[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) kept[(group + i) * kGroup / 32] |= mask[i] << (group + i) * kGroup % 32;
    }
  } else {
#pragma unroll
    for (int group = 0; group < kFeatures / kGroup; ++group) {
      uint32_t group_key[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) group_key[i] = key[group * kGroup + i];
      kept[group * kGroup / 32] |= survivors_of_one<kGroup>(group_key, n) << group * kGroup % 32;
    }
  }

  Raw* destination = static_cast<Raw*>(params.out) + token * in_features + feature;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint32_t bits = kept[i * kChunk / 32] >> i * kChunk % 32;
    Chunk<E> out = z[i];
#pragma unroll
    for (int j = 0; j < Chunk<E>::kWords; ++j) {
      if constexpr (E::k16Bit) {
        out.word[j] &= (bits >> 2 * j & 1u ? 0xFFFFu : 0u) | (bits >> 2 * j & 2u ? 0xFFFF0000u : 0u);
      } else {
        out.word[j] = bits >> j & 1u ? out.word[j] : 0u;
      }
    }
    store_chunk<E, kVector>(destination + i * kChunk, out, count[i]);
  }
}

template <class E, int kGroup>
cudaError_t launch_group(const PruneParams& params, cudaStream_t stream) {
  const bool scaled = params.channel_scale != nullptr;
  const bool vector = rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) &&
                      is_aligned(params.out, 16) && is_aligned(params.channel_scale, 16) &&
                      is_aligned(params.shift, 16);
  const auto launch = [&](auto* kernel, int features) {
    const int64_t per_token = (params.in_features + features - 1) / features;
    const int64_t blocks = (params.tokens * per_token + kThreads - 1) / kThreads;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    return launch_kernel(kernel, static_cast<unsigned>(blocks), kThreads, stream, params);
  };
  constexpr int kOne = kGroup < kChunk ? kChunk : kGroup, kTwo = 2 * kGroup < kChunk ? kChunk : 2 * kGroup;
  if (!vector) return launch(prune_kernel<E, kGroup, false, true>, kOne);
  if (scaled || !E::k16Bit) return launch(prune_kernel<E, kGroup, true, true>, kOne);
  if constexpr (E::k16Bit) return launch(prune_kernel<E, kGroup, true, false>, kTwo);
  return cudaErrorInvalidValue;
}

template <class E>
cudaError_t launch_typed(const PruneParams& params, cudaStream_t stream) {
  switch (params.pattern.group) {
    case 2: return launch_group<E, 2>(params, stream);
    case 4: return launch_group<E, 4>(params, stream);
    case 8: return launch_group<E, 8>(params, stream);
    case 16: return launch_group<E, 16>(params, stream);
    default: return launch_group<E, 32>(params, stream);
  }
}

}  // namespace

cudaError_t launch_prune(const PruneParams& params, cudaStream_t stream) {
  if (!is_supported(params.pattern) || params.in_features % params.pattern.group != 0) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  switch (params.x_type) {
    case ElementType::kBFloat16: return launch_typed<BFloat16>(params, stream);
    case ElementType::kFloat16: return launch_typed<Float16>(params, stream);
    case ElementType::kFloat32: return launch_typed<Float32>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
