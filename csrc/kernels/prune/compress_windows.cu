// compress for 2:4+1: P(x - eta) as the lifted 2:4 operand (format/windows.h), from a row-major x.
//
// A thread takes units of sixteen features: it reads 32 bytes and writes 16 bytes of survivors of the first four
// windows, 4 bytes of survivors of the fifth, whose part of the row begins at in_features, and the metadata of both.
//
// Without a row statistic (e4m3 scale, variance) compress_windows_kernel streams as compress_kernel does: a block of 8
// warps takes 16 tokens by 512 features, a warp two tokens, a lane one unit of each. In the sm90 16-bit layout the
// metadata of 16 tokens by 64 features is a run of 128 bytes, which the block assembles in shared memory if both parts
// of the lifted row begin on such a tile. Otherwise, and in other layouts, the bytes are stored directly. With a
// statistic, a block holds one token, as in compress_row.cuh. A per-token shift is computed by a kernel of its own
// before this one. docs/kernels/windows.md gives the floor.
#include "compress_row.cuh"
#include "windows.cuh"

namespace nm_act {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockTokens = 2 * kWarps;
constexpr int kSpan = 32 * kUnit;
constexpr int kTile = 64;                                   // features of a run of staged metadata
constexpr int kRunVectors = kBlockTokens * kTile / 8 / 16;  // 16-byte vectors
constexpr int kSpanRuns = kSpan / kTile;                    // the fifth windows have a quarter as many
constexpr int kRuns = kSpanRuns + kSpanRuns / 4;

// Index of a 16-byte vector of the staged metadata, swizzled so that the bytes of a warp's lanes fall into different
// banks.
__device__ __forceinline__ int staged_vector(int vector) { return vector ^ (vector >> 3 & 7); }

__device__ __forceinline__ uint8_t* staged_at(uint4* staged, int token, int feature) {
  const int at =
      feature / kTile * kRunVectors * 16 +
      static_cast<int>(
          metadata_address(MetadataLayout::kSm90Bits16T64, kBlockTokens, kTile, token, feature % kTile / 4).byte);
  return reinterpret_cast<uint8_t*>(staged) + staged_vector(at / 16) * 16 + at % 16;
}

template <class E>
__device__ __forceinline__ Unit<E> load_unit(const typename E::Raw* source, bool real) {
  Unit<E> unit;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    unit.chunk[i] = real ? load_chunk<E, true>(source + i * kChunk, kChunk) : zero_chunk<E>();
  }
  return unit;
}

// Applies the shift; returns the channel scales, ones if there are none.
template <class E>
__device__ __forceinline__ ChannelUnit shift_and_scale(Unit<E>& unit, const CompressOutput& out, int64_t token,
                                                       int feature, bool real) {
  ChannelUnit scale;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = feature + i * kChunk;
    if (real && out.eta != nullptr) subtract(unit.chunk[i], __ldg(out.eta + token));
    if (real && out.shift != nullptr) subtract(unit.chunk[i], load_channels<true>(out.shift + at, kChunk, 0.0f));
    if (real && out.channel_scale != nullptr) {
      scale.chunk[i] = load_channels<true>(out.channel_scale + at, kChunk, 1.0f);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) scale.chunk[i].value[j] = 1.0f;
    }
  }
  return scale;
}

// Writes the padding of a row's last metadata tile, beyond the lifted features: at most 15 bytes.
__device__ __forceinline__ void pad_row(uint8_t* metadata, MetadataLayout layout, int64_t tokens, int lifted,
                                        int64_t token, int lane) {
  const int chunk = lifted / kChunk + lane;
  if (chunk * kChunk < metadata_padded_features(layout, lifted)) {
    metadata[metadata_address(layout, tokens, lifted, token, 2 * chunk).byte] = kPaddingByte;
  }
}

__device__ __forceinline__ void store_16_bit(uint8_t* row, int in_features, int feature, const Lifted& lifted) {
  *reinterpret_cast<uint4*>(row + feature) = make_uint4(lifted.word[0], lifted.word[1], lifted.word[2], lifted.word[3]);
  *reinterpret_cast<uint32_t*>(row + in_features + feature / 4) = lifted.word[4];
}

// Two lanes share one metadata byte for their fifth windows.
__device__ __forceinline__ bool stores_extra_byte() { return threadIdx.x % 2 == 0; }

// Addresses of a unit's metadata in the layout: two bytes for the first four windows, and the byte with the fifth's.
struct UnitMetadata {
  uint8_t *base, *extra;
  __device__ __forceinline__ UnitMetadata(uint8_t* metadata, MetadataLayout layout, int64_t tokens, int in_features,
                                          int lifted, int64_t token, int feature)
      : base(metadata + metadata_address(layout, tokens, lifted, token, feature / 4).byte),
        extra(metadata + metadata_address(layout, tokens, lifted, token, (in_features + feature / 4) / 4).byte) {}
};

template <class E, bool kStaged, bool kScaled>
__global__ void __launch_bounds__(kThreads)
    compress_windows_kernel(const __grid_constant__ CompressParams params, const int e) {
  __shared__ uint4 staged[kStaged ? kRuns * kRunVectors : 1];
  const CompressOutput& out = params.out;
  const MetadataLayout layout = kStaged ? MetadataLayout::kSm90Bits16T64 : out.layout;
  const int64_t tokens = params.tokens;
  const int in_features = params.in_features, lifted_row = in_features + in_features / 4;
  const unsigned spans = static_cast<unsigned>(in_features + kSpan - 1) / kSpan;
  const int64_t first_token = blockIdx.x / spans * int64_t{kBlockTokens};
  const int span = static_cast<int>(blockIdx.x % spans);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int feature = span * kSpan + lane * kUnit;
  const Removal removal = removal_of(e);

  wait_for_previous_kernel();
  allow_next_kernel();
  Unit<E> unit[2];
  int64_t token[2];
  bool real[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    token[half] = first_token + warp + half * kWarps;
    real[half] = token[half] < tokens && feature < in_features;
    unit[half] = load_unit<E>(static_cast<const typename E::Raw*>(params.x) + token[half] * params.x_stride + feature,
                              real[half]);
  }
  ChannelUnit scale[2];
  if constexpr (kScaled) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = shift_and_scale(unit[half], out, token[half], feature, real[half]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Lifted lifted = lift(unit[half], select_plus_one<E, kScaled>(unit[half], scale[half], e, removal), e);
    if (real[half]) {
      store_16_bit(static_cast<uint8_t*>(out.values) + token[half] * lifted_row, in_features, feature, lifted);
    }
    const auto base = static_cast<uint16_t>(real[half] ? lifted.base : kPaddingByte * 0x101u);
    const uint8_t extra = extra_byte(lifted, real[half]);
    if constexpr (kStaged) {
      const int row = warp + half * kWarps;
      *reinterpret_cast<uint16_t*>(staged_at(staged, row, lane * kUnit)) = base;
      if (stores_extra_byte()) *staged_at(staged, row, kSpan + lane * 4) = extra;
    } else if (token[half] < metadata_padded_tokens(layout, tokens)) {
      const UnitMetadata at(out.metadata, layout, tokens, in_features, lifted_row, token[half], feature);
      if (feature < in_features) *reinterpret_cast<uint16_t*>(at.base) = base;
      if (feature < in_features && stores_extra_byte()) *at.extra = extra;
      if (span == 0) pad_row(out.metadata, layout, tokens, lifted_row, token[half], lane);
    }
  }

  if constexpr (kStaged) {
    __syncthreads();
    const int run = threadIdx.x / kRunVectors;
    if (run >= kRuns) return;
    const int extra_run = span * (kSpanRuns / 4) + run - kSpanRuns;
    const int tile_feature = run < kSpanRuns ? span * kSpan + run * kTile : in_features + extra_run * kTile;
    if (tile_feature >= (run < kSpanRuns ? in_features : lifted_row)) return;
    uint8_t* target = out.metadata + metadata_address(layout, tokens, lifted_row, first_token, tile_feature / 4).byte;
    reinterpret_cast<uint4*>(target)[threadIdx.x % kRunVectors] = staged[staged_vector(threadIdx.x)];
  }
}

template <class E>
__device__ __forceinline__ void add_lifted(VarianceSums& sums, const Lifted& lifted) {
#pragma unroll
  for (int i = 0; i < kWindows; i += 2) {
    Kept<E> kept;
    kept.word[0] = lifted.word[i];
    kept.word[1] = i + 1 < kWindows ? lifted.word[i + 1] : 0;
    sums.add_kept(kept);
  }
}

template <class E, bool kE4M3, int kUnits>
__global__ void __launch_bounds__(kMaxRowThreads)
    compress_windows_row_kernel(const __grid_constant__ CompressParams params, const int e) {
  __shared__ RowReducer::Slots slots;
  RowReducer reducer(slots);
  const CompressOutput& out = params.out;
  const MetadataLayout layout = kE4M3 ? MetadataLayout::kSm90Bits8 : out.layout;
  const int64_t tokens = params.tokens, token = blockIdx.x;
  const int in_features = params.in_features, lifted_row = in_features + in_features / 4;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (token >= tokens) {
    const int chunks = static_cast<int>(metadata_padded_features(layout, lifted_row)) / kChunk;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
      out.metadata[metadata_address(layout, tokens, lifted_row, token, 2 * chunk).byte] = kPaddingByte;
    }
    return;
  }
  const Removal removal = removal_of(e);
  const bool has_scale = out.channel_scale != nullptr;
  const auto* row = static_cast<const typename E::Raw*>(params.x) + token * params.x_stride;
  const auto feature_of = [](int i) { return row_chunk<kUnits>(i) * kUnit; };
  Unit<E> unit[kUnits];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) unit[i] = load_unit<E>(row + feature_of(i), feature_of(i) < in_features);

  Lifted lifted[kUnits];
  VarianceSums sums{};
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int feature = feature_of(i);
    const ChannelUnit scale = shift_and_scale(unit[i], out, token, feature, feature < in_features);
    const WindowSlots windows = has_scale ? select_plus_one<E, true>(unit[i], scale, e, removal)
                                          : select_plus_one<E, false>(unit[i], scale, e, removal);
    lifted[i] = lift(unit[i], windows, e);
    if constexpr (kE4M3) {
#pragma unroll
      for (uint32_t word : lifted[i].word) largest = max_halves(largest, word & 0x7FFF7FFFu);
    }
    if (out.variance_correction) {
      if (i == 0) sums.start_at(unit[0].chunk[0].get(0));
      const int count = feature < in_features ? kChunk : 0;
      sums.add_dense(unit[i].chunk[0], count);
      sums.add_dense(unit[i].chunk[1], count);
      add_lifted<E>(sums, lifted[i]);
    }
  }

  float row_scale = 1.0f;
  if constexpr (kE4M3) row_scale = e4m3_scale<E>(largest, reducer);
  const float inverse_scale = 1.0f / row_scale;
  uint8_t* values = static_cast<uint8_t*>(out.values) + token * lifted_row / (kE4M3 ? 2 : 1);
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int feature = feature_of(i);
    const bool real = feature < in_features;
    const uint8_t extra = extra_byte(lifted[i], real);
    if (!real) continue;
    const UnitMetadata at(out.metadata, layout, tokens, in_features, lifted_row, token, feature);
    *reinterpret_cast<uint16_t*>(at.base) = static_cast<uint16_t>(lifted[i].base);
    if (stores_extra_byte()) *at.extra = extra;
    if constexpr (kE4M3) {
      uint32_t pair[kWindows];
#pragma unroll
      for (int w = 0; w < kWindows; ++w) pair[w] = pair_to_e4m3<E>(lifted[i].word[w], inverse_scale);
      *reinterpret_cast<uint2*>(values + feature / 2) = make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
      *reinterpret_cast<uint16_t*>(values + in_features / 2 + feature / 8) = static_cast<uint16_t>(pair[4]);
    } else {
      store_16_bit(values, in_features, feature, lifted[i]);
    }
  }
  if (threadIdx.x < 32) pad_row(out.metadata, layout, tokens, lifted_row, token, threadIdx.x);
  if (out.variance_correction) row_scale *= sums.ratio(in_features);
  if (out.row_scale != nullptr && threadIdx.x == 0) out.row_scale[token] = row_scale;
}

template <class E>
cudaError_t launch_streaming(const CompressParams& params, int e, cudaStream_t stream) {
  const CompressOutput& out = params.out;
  const int64_t slabs = (metadata_padded_tokens(out.layout, params.tokens) + kBlockTokens - 1) / kBlockTokens;
  const int64_t grid = slabs * ((params.in_features + kSpan - 1) / kSpan);
  if (grid > INT32_MAX) return cudaErrorInvalidValue;
  const bool staged = out.layout == MetadataLayout::kSm90Bits16T64 && params.in_features % kTile == 0;
  const bool scaled = out.channel_scale != nullptr || out.shift != nullptr || out.eta != nullptr;
  const auto kernel =
      staged ? (scaled ? compress_windows_kernel<E, true, true> : compress_windows_kernel<E, true, false>)
             : (scaled ? compress_windows_kernel<E, false, true> : compress_windows_kernel<E, false, false>);
  return launch_kernel(kernel, static_cast<unsigned>(grid), kThreads, stream, params, e);
}

template <class E>
cudaError_t launch_typed(const CompressParams& params, int e, cudaStream_t stream) {
  const bool e4m3 = params.out.value_type == ElementType::kE4M3;
  if (!e4m3 && !params.out.variance_correction) return launch_streaming<E>(params, e, stream);
  if (params.in_features > kMaxRowFeatures || params.tokens > kMaxTokens) return cudaErrorInvalidValue;
  const int units = params.in_features / kUnit, a_thread = units <= 2 * kMaxRowThreads ? 2 : 4;
  const int threads = static_cast<int>(round_up((units + a_thread - 1) / a_thread, 32));
  const auto kernel =
      e4m3 ? (a_thread == 2 ? compress_windows_row_kernel<E, true, 2> : compress_windows_row_kernel<E, true, 4>)
           : (a_thread == 2 ? compress_windows_row_kernel<E, false, 2> : compress_windows_row_kernel<E, false, 4>);
  const auto blocks = static_cast<unsigned>(metadata_padded_tokens(params.out.layout, params.tokens));
  return launch_kernel(kernel, blocks, threads, stream, params, e);
}

bool is_served(const CompressParams& params, const Pattern& pattern) {
  if (!is_lifted(pattern) || params.in_features % kUnit != 0 || !are_supported(pattern.extra)) return false;
  const CompressOutput& out = params.out;
  const bool e4m3 = out.value_type == ElementType::kE4M3;
  const int64_t lifted = lifted_features(params.in_features);
  const bool fits = e4m3 == (out.layout == MetadataLayout::kSm90Bits8) && out.layout != MetadataLayout::kNeutral &&
                    (e4m3 || out.value_type == params.x_type) && lifted % (e4m3 ? 32 : 16) == 0;
  return fits && rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) &&
         channels_vectorise(out);
}

}  // namespace

cudaError_t launch_compress_windows(const CompressParams& params, const Pattern& pattern, cudaStream_t stream) {
  if (!is_served(params, pattern)) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  if (params.out.token_shift != TokenShift::kNone) {
    const TokenStatisticsParams statistics{params.x, params.x_stride, params.tokens, params.in_features, params.x_type};
    const cudaError_t status = launch_token_shift(statistics, params.out.token_shift, params.out.eta, stream);
    if (status != cudaSuccess) return status;
  }
  switch (params.x_type) {
    case ElementType::kBFloat16: return launch_typed<BFloat16>(params, pattern.extra.column[0], stream);
    case ElementType::kFloat16: return launch_typed<Float16>(params, pattern.extra.column[0], stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
