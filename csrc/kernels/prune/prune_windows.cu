// prune for 2:4+1 and 2:4+2, as a dense tensor with zeros. A thread takes a unit of sixteen features (windows.cuh);
// unscaled 16-bit features of 2:4+1 are compared as 16-bit keys, all others as 32-bit keys.
// Limit: in_features % 16 == 0.
#include "../launch.cuh"
#include "windows.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;

template <class E, int kExtras, bool kVector, bool kKeys>
__global__ void __launch_bounds__(kThreads) prune_windows_kernel(const __grid_constant__ PruneParams params) {
  using Raw = typename E::Raw;
  const unsigned units = static_cast<unsigned>(params.in_features) / kUnit;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t token = thread / units;
  const int feature = static_cast<int>(thread - token * units) * kUnit;
  const int e0 = params.pattern.extra.column[0], e1 = params.pattern.extra.column[1];
  wait_for_previous_kernel();
  allow_next_kernel();
  if (token >= params.tokens) return;

  const Raw* source = static_cast<const Raw*>(params.x) + token * params.x_stride + feature;
  Unit<E> unit;
  ChannelUnit scale;
#pragma unroll
  for (int i = 0; i < 2; ++i) unit.chunk[i] = load_chunk<E, kVector>(source + i * kChunk, kChunk);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = feature + i * kChunk;
    if (params.eta != nullptr) subtract(unit.chunk[i], __ldg(params.eta + token));
    if (params.shift != nullptr) subtract(unit.chunk[i], load_channels<kVector>(params.shift + at, kChunk, 0.0f));
    if (kKeys && params.channel_scale != nullptr) {
      scale.chunk[i] = load_channels<kVector>(params.channel_scale + at, kChunk, 1.0f);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) scale.chunk[i].value[j] = 1.0f;
    }
  }
  uint32_t survivors[4];  // byte masks of the quads
  if constexpr (kExtras == 1) {
    const WindowSlots windows = select_plus_one<E, kKeys>(unit, scale, e0, removal_of(e0));
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) survivors[quad] = quad_survivors(windows, e0, quad);
  } else {
    uint32_t key[kUnit];
    keys_of(unit, scale, key);
    const uint32_t mask = plus_two_of_keys(key, e0, e1);
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) survivors[quad] = spread_nibble(mask >> 4 * quad & 15u);
  }

  Raw* destination = static_cast<Raw*>(params.out) + token * params.in_features + feature;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Chunk<E>& chunk = unit.chunk[i];
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint32_t kept = survivors[2 * i + group];
      if constexpr (E::k16Bit) {
        chunk.word[2 * group] &= permute_bytes(kept, 0, 0x1100);
        chunk.word[2 * group + 1] &= permute_bytes(kept, 0, 0x3322);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) chunk.word[4 * group + j] &= replicate_byte(kept, j);
      }
    }
    store_chunk<E, kVector>(destination + i * kChunk, chunk, kChunk);
  }
}

template <class E, int kExtras>
cudaError_t launch_extras(const PruneParams& params, cudaStream_t stream) {
  const bool vector = rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) &&
                      is_aligned(params.out, 16) && is_aligned(params.channel_scale, 16) &&
                      is_aligned(params.shift, 16);
  const int64_t blocks = (params.tokens * (params.in_features / kUnit) + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto launch = [&](auto* kernel) {
    return launch_kernel(kernel, static_cast<unsigned>(blocks), kThreads, stream, params);
  };
  if (!vector) return launch(prune_windows_kernel<E, kExtras, false, true>);
  if constexpr (E::k16Bit && kExtras == 1) {
    if (params.channel_scale == nullptr) return launch(prune_windows_kernel<E, kExtras, true, false>);
  }
  return launch(prune_windows_kernel<E, kExtras, true, true>);
}

template <class E>
cudaError_t launch_typed(const PruneParams& params, cudaStream_t stream) {
  return params.pattern.extra.count == 1 ? launch_extras<E, 1>(params, stream) : launch_extras<E, 2>(params, stream);
}

}  // namespace

cudaError_t launch_prune_windows(const PruneParams& params, cudaStream_t stream) {
  if (!are_supported(params.pattern.extra)) return cudaErrorInvalidValue;
  return with_element(params.x_type, [&](auto element) { return launch_typed<decltype(element)>(params, stream); });
}

}  // namespace nm_act
