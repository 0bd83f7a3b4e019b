// compress: P(x - shift) for 2:4, as values and metadata, from a row-major x.
//
// Without a row statistic (e4m3 scale, token shift, variance) compress_kernel streams. A block of 8 warps takes 16
// tokens x kSteps * 256 features. Warp w reads tokens w and w + 8 of the 16, one chunk of 8 features per lane, so each
// load of a warp covers 512 contiguous bytes and both tokens share the per-channel parameters. A thread issues all of
// its 2 * kSteps loads before it uses the first. In the sm90 layouts the metadata of 16 tokens x T features is a run of
// 2 T bytes: the block assembles it in shared memory and writes it with 16-byte stores, because byte stores touch 15 %
// more sectors. In the other layouts the bytes are stored directly. Padding tokens and features get kPaddingByte.
//
// With a row statistic: compress_row.cuh. docs/kernels/compress.md gives the floor and the instruction counts.
#include "compress_row.cuh"

namespace nm_act {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockTokens = 2 * kWarps;
constexpr int kStepFeatures = 32 * kChunk;

// Index of a 16-byte vector of the staged metadata, swizzled so that the bytes of a warp's lanes fall into different
// banks.
__device__ __forceinline__ int staged_vector(int vector) { return vector ^ (vector >> 3 & 3); }

template <class E, MetadataLayout kLayout, bool kVector, bool kScaled, int kSteps>
__global__ void __launch_bounds__(kThreads) compress_kernel(const __grid_constant__ CompressParams params) {
  using Raw = typename E::Raw;
  constexpr int kSpan = kSteps * kStepFeatures;
  constexpr int kTile = metadata_tile_features(kLayout);
  constexpr bool kStaged = kLayout == MetadataLayout::kSm90Bits16T64;
  __shared__ uint4 staged[kStaged ? kBlockTokens * kSpan / 128 : 1];
  const CompressOutput& out = params.out;
  const int64_t tokens = params.tokens;
  const int in_features = params.in_features;
  const int padded_features = static_cast<int>(metadata_padded_features(kLayout, in_features));
  const unsigned spans = static_cast<unsigned>(padded_features + kSpan - 1) / kSpan;
  const int64_t first_token = blockIdx.x / spans * int64_t{kBlockTokens};
  const int first_feature = static_cast<int>(blockIdx.x % spans) * kSpan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int thread_feature = first_feature + lane * kChunk;  // of step 0
  const int64_t token[2] = {first_token + warp, first_token + warp + kWarps};

  wait_for_previous_kernel();
  allow_next_kernel();
  Chunk<E> x[kSteps][2];
  const Raw* source[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    source[half] = static_cast<const Raw*>(params.x) + token[half] * params.x_stride + thread_feature;
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int count = chunk_count<kVector>(in_features, thread_feature / kChunk + step * 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      x[step][half] = token[half] < tokens && count > 0
                          ? load_chunk<E, kVector>(source[half] + step * kStepFeatures, count)
                          : zero_chunk<E>();
    }
  }

  // Destinations of this thread's survivors and metadata bytes of step 0; those of later steps are at constant
  // distances.
  Raw* values[2];
  uint8_t* bytes[2];
  int64_t byte_stride;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    values[half] = static_cast<Raw*>(out.values) + token[half] * (in_features / 2) + thread_feature / 2;
    if constexpr (kStaged) {
      // Within a run, bytes lie as in a problem of kBlockTokens tokens and one tile of features.
      const int at =
          lane * kChunk / kTile * 2 * kTile +
          static_cast<int>(
              metadata_address(kLayout, kBlockTokens, kTile, warp + half * kWarps, lane * kChunk % kTile / 4).byte);
      bytes[half] = reinterpret_cast<uint8_t*>(staged) + staged_vector(at / 16) * 16 + at % 16;
      byte_stride = kStepFeatures * kBlockTokens / 8;
    } else {
      bytes[half] = out.metadata + metadata_address(kLayout, tokens, in_features, token[half], thread_feature / 4).byte;
      byte_stride = metadata_address(kLayout, tokens, in_features, 0, kStepFeatures / 4).byte;
    }
  }

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int feature = thread_feature + step * kStepFeatures;
    const int count = chunk_count<kVector>(in_features, feature / kChunk);
    ChannelChunk scale;
    if constexpr (kScaled) {
      if (out.shift != nullptr && count > 0) {
        const ChannelChunk shift = load_channels<kVector>(out.shift + feature, count, 0.0f);
        subtract(x[step][0], shift);
        subtract(x[step][1], shift);
      }
      if (out.channel_scale != nullptr && count > 0) {
        scale = load_channels<kVector>(out.channel_scale + feature, count, 1.0f);
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) scale.value[i] = 1.0f;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Chunk<E>& z = x[step][half];
      uint32_t mask[2];
      chunk_survivors<E, kScaled>(z, scale, mask);
      const Kept<E> kept = keep_survivors(z, mask[0], mask[1]);
      const bool real = token[half] < tokens && count > 0;
      if (real) store_values<E, kVector>(values[half] + step * (kStepFeatures / 2), kept, count);
      // With a shift or scale, the survivors of a padding token need not be the first two.
      const uint8_t byte = kScaled && !real ? kPaddingByte : stored_byte<kVector>(kept.metadata, count);
      if (kStaged || (feature < padded_features && token[half] < metadata_padded_tokens(kLayout, tokens))) {
        bytes[half][step * byte_stride] = byte;
      }
    }
  }

  if constexpr (kStaged) {
    __syncthreads();
    constexpr int kRunVectors = 2 * kTile / 16;
    for (int vector = threadIdx.x; vector < kBlockTokens * kSpan / 128; vector += kThreads) {
      const int feature = first_feature + vector / kRunVectors * kTile;
      if (feature >= padded_features) break;
      uint8_t* run = out.metadata + metadata_address(kLayout, tokens, in_features, first_token, feature / 4).byte;
      reinterpret_cast<uint4*>(run)[vector % kRunVectors] = staged[staged_vector(vector)];
    }
  }
}

// Long spans keep more loads in flight; short spans fill the device when there is little work. The limit of 512 blocks
// is an estimate: about four per multiprocessor of an H200.
template <class E, MetadataLayout kLayout, bool kVector, bool kScaled>
cudaError_t launch_streaming(const CompressParams& params, cudaStream_t stream) {
  constexpr int kManySteps = !kVector ? 1 : E::k16Bit ? 4 : 2;
  const int64_t slabs = (metadata_padded_tokens(kLayout, params.tokens) + kBlockTokens - 1) / kBlockTokens;
  const int64_t padded_features = metadata_padded_features(kLayout, params.in_features);
  const auto blocks = [&](int steps) {
    return slabs * ((padded_features + steps * kStepFeatures - 1) / (steps * kStepFeatures));
  };
  const bool many = blocks(kManySteps) >= 512;
  const int64_t grid = blocks(many ? kManySteps : 1);
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = many ? compress_kernel<E, kLayout, kVector, kScaled, kManySteps>
                           : compress_kernel<E, kLayout, kVector, kScaled, 1>;
  return launch_kernel(kernel, static_cast<unsigned>(grid), kThreads, stream, params);
}

template <class E, MetadataLayout kLayout>
cudaError_t launch_streaming(const CompressParams& params, bool vector, cudaStream_t stream) {
  const bool scaled = params.out.channel_scale != nullptr || params.out.shift != nullptr;
  if (!vector) return launch_streaming<E, kLayout, false, true>(params, stream);
  return scaled ? launch_streaming<E, kLayout, true, true>(params, stream)
                : launch_streaming<E, kLayout, true, false>(params, stream);
}

template <class E>
cudaError_t launch_streaming(const CompressParams& params, bool vector, cudaStream_t stream) {
  if constexpr (E::k16Bit) {
    switch (params.out.layout) {
      case MetadataLayout::kSm80Bits16: return launch_streaming<E, MetadataLayout::kSm80Bits16>(params, vector, stream);
      case MetadataLayout::kSm90Bits16T64:
        return launch_streaming<E, MetadataLayout::kSm90Bits16T64>(params, vector, stream);
      default: break;
    }
  }
  return launch_streaming<E, MetadataLayout::kNeutral>(params, vector, stream);
}

template <class E>
cudaError_t launch_typed(const CompressParams& params, cudaStream_t stream) {
  const bool vector =
      rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) && channels_vectorise(params.out);
  const bool needs_row = params.out.value_type == ElementType::kE4M3 || params.out.token_shift != TokenShift::kNone ||
                         params.out.variance_correction;
  if (!needs_row) return launch_streaming<E>(params, vector, stream);
  const RowLoad<E> load{static_cast<const typename E::Raw*>(params.x), params.x_stride};
  return launch_compress_row(load, params.out, params.tokens, params.in_features, vector, stream);
}

}  // namespace

cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream) {
  if (!layout_fits(params.x_type, params.out, params.in_features)) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  return with_element(params.x_type, [&](auto element) { return launch_typed<decltype(element)>(params, stream); });
}

}  // namespace nm_act
