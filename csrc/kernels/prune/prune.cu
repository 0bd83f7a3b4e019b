// prune: the n of every m features with the largest keys, dense output, zeros elsewhere. m in {2, 4, 8, 16, 32}, any n.
//
// The survivors follow from the n-th largest key (threshold.cuh). Bare 16-bit features are sorted two groups at once,
// so a thread takes two groups (more if m < 4); scaled or 32-bit features have 32-bit keys, one group at a time. A
// thread's features are contiguous: 128 bytes for m = 32, so its 16-byte loads meet in L1. No shared memory, no
// communication. Limit: in_features % m == 0. 2:4+r: prune_windows.cu.
#include "../launch.cuh"
#include "compress.cuh"
#include "threshold.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;

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
  if (!is_supported(params.pattern) || params.in_features % span_of(params.pattern) != 0) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  if (params.pattern.extra.count > 0) return launch_prune_windows(params, stream);
  return with_element(params.x_type, [&](auto element) { return launch_typed<decltype(element)>(params, stream); });
}

}  // namespace nm_act
