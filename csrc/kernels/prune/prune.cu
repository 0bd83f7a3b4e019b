// prune: keeps the n features with the largest keys of every m and writes zeros for the others, as a dense tensor. m is
// one of {2, 4, 8, 16, 32}; any n < m.
//
// prune_steps_kernel serves unscaled 16-bit features in aligned rows. A warp reads 2048 consecutive bytes in four
// coalesced loads, all issued before the first is used, and stores them in the same order. Groups longer than a chunk
// are selected across lanes (group_select.cuh). Without shifts, contiguous rows are treated as one long row: no group
// straddles two. prune_kernel serves everything else. A thread takes one group (several if m < 8) of contiguous
// features with 32-bit keys; the n-th largest key decides (threshold.cuh). Neither uses shared memory. Limit:
// in_features % m == 0. 2:4+r is in prune_windows.cu.
#include "../launch.cuh"
#include "group_select.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;
constexpr int kStepWarps = kThreads / 32;
constexpr int kSteps = 4;
constexpr int kStepFeatures = 32 * kChunk;

template <class E, int kGroup>
__global__ void __launch_bounds__(kThreads)
    prune_steps_kernel(const __grid_constant__ PruneParams params, const int64_t row_features,
                       const unsigned blocks_a_row) {
  const int64_t token = blockIdx.x / blocks_a_row;
  const unsigned warp = blockIdx.x % blocks_a_row * kStepWarps + threadIdx.x / 32;
  const int64_t feature = int64_t{warp} * (kSteps * kStepFeatures) + threadIdx.x % 32 * kChunk;  // of step 0
  const auto* source = static_cast<const uint16_t*>(params.x) + token * params.x_stride + feature;
  auto* destination = static_cast<uint16_t*>(params.out) + token * row_features + feature;
  wait_for_previous_kernel();
  allow_next_kernel();
  Chunk<E> z[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    z[step] = feature + step * kStepFeatures < row_features ? load_chunk<E, true>(source + step * kStepFeatures, kChunk)
                                                            : zero_chunk<E>();
  }
  if (params.eta != nullptr) {
    const float eta = __ldg(params.eta + token);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) subtract(z[step], eta);
  }
  if (params.shift != nullptr) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t at = feature + step * kStepFeatures;
      if (at < row_features) subtract(z[step], load_channels<true>(params.shift + at, kChunk, 0.0f));
    }
  }
  const int n = params.pattern.keep;
  ChunkMask kept[kSteps];
  if constexpr (kGroup < kChunk) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) kept[step] = survivors_of_short<E>(z[step].word, {n, kGroup, {}});
  } else {
    uint32_t word[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) word[step][i] = z[step].word[i];
    }
    survivors_of_steps<E, kGroup>(word, n, kept);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    clear_pruned(z[step], kept[step]);
    if (feature + step * kStepFeatures < row_features) {
      store_chunk<E, true>(destination + step * kStepFeatures, z[step], kChunk);
    }
  }
}

template <class E, int kGroup, bool kVector>
__global__ void __launch_bounds__(kThreads) prune_kernel(const __grid_constant__ PruneParams params) {
  using Raw = typename E::Raw;
  constexpr int kFeatures = kGroup < kChunk ? kChunk : kGroup;
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
  uint32_t key[kFeatures];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = feature + i * kChunk;
    if (params.shift != nullptr && count[i] > 0)
      subtract(z[i], load_channels<kVector>(params.shift + at, count[i], 0.0f));
    ChannelChunk scale;
    if (params.channel_scale != nullptr && count[i] > 0) {
      scale = load_channels<kVector>(params.channel_scale + at, count[i], 1.0f);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) scale.value[j] = 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) key[i * kChunk + j] = scaled_key(z[i].get(j), scale.value[j]);
  }

  const int n = params.pattern.keep;
  uint32_t kept[kFeatures / 32 + 1] = {};  // one bit per feature
#pragma unroll
  for (int group = 0; group < kFeatures / kGroup; ++group) {
    uint32_t group_key[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group_key[i] = key[group * kGroup + i];
    kept[group * kGroup / 32] |= survivors_of_one<kGroup>(group_key, n) << group * kGroup % 32;
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
cudaError_t launch_steps(const PruneParams& params, cudaStream_t stream) {
  const bool flat = params.x_stride == params.in_features && params.eta == nullptr && params.shift == nullptr;
  const int64_t rows = flat ? 1 : params.tokens;
  const int64_t features = flat ? params.tokens * params.in_features : params.in_features;
  constexpr int kBlockFeatures = kStepWarps * kSteps * kStepFeatures;
  const int64_t blocks_a_row = (features + kBlockFeatures - 1) / kBlockFeatures;
  if (rows * blocks_a_row > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(prune_steps_kernel<E, kGroup>, static_cast<unsigned>(rows * blocks_a_row), kThreads, stream,
                       params, features, static_cast<unsigned>(blocks_a_row));
}

template <class E, int kGroup>
cudaError_t launch_group(const PruneParams& params, cudaStream_t stream) {
  const bool scaled = params.channel_scale != nullptr;
  const bool vector = rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) &&
                      is_aligned(params.out, 16) && is_aligned(params.channel_scale, 16) &&
                      is_aligned(params.shift, 16);
  if constexpr (E::k16Bit) {
    if (vector && !scaled) return launch_steps<E, kGroup>(params, stream);
  }
  constexpr int kFeatures = kGroup < kChunk ? kChunk : kGroup;
  const int64_t per_token = (params.in_features + kFeatures - 1) / kFeatures;
  const int64_t blocks = (params.tokens * per_token + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = vector ? prune_kernel<E, kGroup, true> : prune_kernel<E, kGroup, false>;
  return launch_kernel(kernel, static_cast<unsigned>(blocks), kThreads, stream, params);
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
