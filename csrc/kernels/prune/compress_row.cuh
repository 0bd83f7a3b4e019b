// Compression that needs a statistic of the whole token, or is fused with the operator before it. One block per token;
// the token's features stay in registers from the producer (a load, RMSNorm, SiLU * up) to the stores, so x is read
// once:
//
//   z = producer(token)   [- eta: a per-token mean or median, or a per-channel shift]
//   P = 2 of 4 of z by |z| * channel_scale
//   e4m3:      scale = max(amax |P| * (1 / 448), 2^-126)
//              values = e4m3(P * (1 / scale)), to nearest even, saturating
//   variance:  nu = sqrt(Var(z) / Var(P)), 1 where Var(P) is 0
//   row_scale = nu * scale
//
// Mapping: a warp holds 32 * kChunks consecutive chunks of 8 features, 32 at a time across its lanes, so loads and
// stores coalesce. For e4m3, a chunk's survivors wait in two registers for the amax. Each thread stores its metadata a
// byte at a time: the bytes of 16 consecutive chunks are consecutive in the 8-bit layout, those of 2 in the 16-bit
// ones. Blocks beyond `tokens` write the padding of the metadata. Limit: kMaxRowFeatures features. An e4m3 token that
// contains a NaN or an infinity gets a NaN scale or NaN values, so its whole output is NaN, as under a dense per-token
// quantisation. Tried and dropped: persistent blocks that load the next token while they select this one; the registers
// cost more in resident warps than the overlap gains (e4m3 at 16384 x 4096 on an H200: 55.8 us against 49.9).
#pragma once

#include "../launch.cuh"
#include "row_stats.cuh"

namespace nm_act {

inline constexpr float kE4M3Max = 448.0f;
inline constexpr int kMaxRowThreads = 512;  // leaves 128 registers per thread: the general kernels spill at 64

// The cases that a row kernel is compiled for. kPlain: no channel scale, shift, token shift or variance, exactly
// kChunks chunks per thread without padding, and 8-bit metadata for e4m3 values, so that no run-time test is left.
// kVector: every option, rows of whole aligned chunks. kScalar: every option, any row.
enum class RowKind { kPlain, kVector, kScalar };

// Blocks of kMaxRowThreads that a multiprocessor must hold; 0 leaves it to the compiler. The compiler would take 80
// registers for the general kernel, which leaves room for only one block of a long row, with nothing to run while that
// block waits for its loads and at its barriers.
template <class E, RowKind kKind, int kChunks>
__host__ __device__ constexpr int row_blocks() {
  return E::k16Bit && kKind == RowKind::kVector && kChunks <= 4 ? 2 : 0;
}

template <RowKind kKind>
__device__ __forceinline__ int row_chunk_count(int in_features, int chunk) {
  if constexpr (kKind == RowKind::kPlain) return kChunk;
  return chunk_count<kKind == RowKind::kVector>(in_features, chunk);
}

// This thread's chunks of a row; zeros beyond its end.
template <class E, RowKind kKind, int kChunks>
__device__ __forceinline__ void load_row(Chunk<E> (&chunks)[kChunks], const typename E::Raw* row, int in_features) {
  const typename E::Raw* source = row + row_chunk<kChunks>(0) * kChunk;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int count = row_chunk_count<kKind>(in_features, row_chunk<kChunks>(i));
    chunks[i] = count > 0 ? load_chunk<E, kKind != RowKind::kScalar>(source + i * 32 * kChunk, count) : zero_chunk<E>();
  }
}

// The producer of unfused compression: loads the token.
template <class E>
struct RowLoad {
  using Element = E;
  static constexpr bool kFused = false;
  const typename E::Raw* x;
  int64_t stride;

  template <RowKind kKind, int kChunks>
  __device__ __forceinline__ void produce(Chunk<E> (&z)[kChunks], int64_t token, int in_features, RowReducer&) const {
    load_row<E, kKind>(z, x + token * stride, in_features);
  }
};

// Scales two survivors and converts them to e4m3. By definition they are multiplied by the rounded reciprocal, not
// divided.
template <class E>
__device__ __forceinline__ uint32_t pair_to_e4m3(uint32_t pair, float inverse_scale) {
  const float2 scaled = make_float2(E::low(pair) * inverse_scale, E::high(pair) * inverse_scale);
  return static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3));
}

template <class E>
__device__ __forceinline__ uint32_t to_e4m3(const Kept<E>& kept, float inverse_scale) {
  return pair_to_e4m3<E>(kept.word[0], inverse_scale) | pair_to_e4m3<E>(kept.word[1], inverse_scale) << 16;
}

// The scale of a token; `largest` holds this thread's largest magnitudes, as the bits of two 16-bit features.
template <class E>
__device__ __forceinline__ float e4m3_scale(uint32_t largest, RowReducer& reducer) {
  const float scale = E::low(reducer.max(max(largest & 0xFFFFu, largest >> 16))) * (1.0f / kE4M3Max);
  return scale < FLT_MIN ? FLT_MIN : scale;  // keeps the reciprocal finite, even for a token of zeros
}

// Selects, scales and stores one token, given its features.
template <class E, bool kE4M3, RowKind kKind, int kChunks>
__device__ __forceinline__ void compress_token(Chunk<E> (&z)[kChunks], const CompressOutput& out, MetadataLayout layout,
                                               int64_t tokens, int64_t token, int in_features, RowReducer& reducer) {
  constexpr bool kGeneral = kKind != RowKind::kPlain, kVector = kKind != RowKind::kScalar;
  const bool has_scale = kGeneral && out.channel_scale != nullptr;
  const auto count_of = [in_features](int i) { return row_chunk_count<kKind>(in_features, row_chunk<kChunks>(i)); };
  if constexpr (kGeneral) {
    if (out.token_shift != TokenShift::kNone) {
      const float eta = out.token_shift == TokenShift::kMean ? row_mean(z, in_features, reducer)
                                                             : row_median(z, in_features, count_of);
      if (threadIdx.x == 0) out.eta[token] = eta;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        subtract(z[i], eta);
        // Features beyond the end of the row must stay zero: they enter the amax and the variance.
        clear_from<kVector>(z[i], count_of(i));
      }
    }
  }

  // A nibble's offset is the sum of a term in the token and one in the group. 32 chunks are whole metadata tiles, so a
  // thread's bytes are a constant distance apart.
  uint8_t* metadata = out.metadata + metadata_address(layout, tokens, in_features, token, 0).byte +
                      metadata_address(layout, tokens, in_features, 0, 2 * row_chunk<kChunks>(0)).byte;
  const int64_t metadata_stride = metadata_address(layout, tokens, in_features, 0, 2 * 32).byte;
  const int stored_chunks = static_cast<int>(metadata_padded_features(layout, in_features) / kChunk);
  Kept<E> kept[kChunks];
  VarianceSums sums{};
  uint32_t largest = 0;  // magnitudes of survivors, one in each half
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = row_chunk<kChunks>(i);
    const int count = count_of(i);
    if (kGeneral && out.shift != nullptr && count > 0) {
      subtract(z[i], load_channels<kVector>(out.shift + chunk * kChunk, count, 0.0f));
    }
    uint32_t mask[2];
    if (has_scale && count > 0) {
      const ChannelChunk scale = load_channels<kVector>(out.channel_scale + chunk * kChunk, count, 1.0f);
      chunk_survivors<E, true>(z[i], scale, mask);
    } else {
      chunk_survivors<E, false>(z[i], {}, mask);
    }
    kept[i] = keep_survivors(z[i], mask[0], mask[1]);
    if (!kGeneral || chunk < stored_chunks) {
      metadata[i * metadata_stride] = stored_byte<kVector>(kept[i].metadata, count);
    }
    if constexpr (kE4M3 && kGeneral) {
#pragma unroll
      for (int j = 0; j < 2; ++j) largest = max_halves(largest, kept[i].word[j] & 0x7FFF7FFFu);
    } else if constexpr (kE4M3) {
      // Without a channel scale a group's largest feature always survives, and its key is already computed.
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = max_halves(largest, magnitude_keys(z[i].word[j], E::kNanKeys));
    }
    if constexpr (kGeneral) {
      if (out.variance_correction) {
        if (i == 0) sums.start_at(z[0].get(0));
        sums.add_dense(z[i], count);
        sums.add_kept(kept[i]);
      }
    }
    if constexpr (!kE4M3) {
      typename E::Raw* values = static_cast<typename E::Raw*>(out.values) + token * (in_features / 2);
      if (count > 0) store_values<E, kVector>(values + chunk * (kChunk / 2), kept[i], count);
    }
  }

  float row_scale = 1.0f;
  if constexpr (kE4M3) {
    row_scale = e4m3_scale<E>(largest, reducer);
    const float inverse_scale = 1.0f / row_scale;
    uint32_t* values = static_cast<uint32_t*>(out.values) + token * (in_features / kChunk) + row_chunk<kChunks>(0);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!kGeneral || row_chunk<kChunks>(i) < in_features / kChunk) {
        values[i * 32] = to_e4m3<E>(kept[i], inverse_scale);
      }
    }
  }
  if constexpr (kGeneral) {
    if (out.variance_correction) row_scale *= sums.ratio(in_features);
  }
  if (out.row_scale != nullptr && threadIdx.x == 0) out.row_scale[token] = row_scale;
}

template <class Producer, bool kE4M3, RowKind kKind, int kChunks>
__global__ void __launch_bounds__(kMaxRowThreads, row_blocks<typename Producer::Element, kKind, kChunks>())
    compress_row_kernel(const __grid_constant__ Producer producer, const __grid_constant__ CompressOutput out,
                        const int64_t tokens, const int in_features) {
  using E = typename Producer::Element;
  __shared__ RowReducer::Slots slots;
  RowReducer reducer(slots);
  const MetadataLayout layout = kE4M3 && kKind == RowKind::kPlain ? MetadataLayout::kSm90Bits8 : out.layout;
  const int64_t token = blockIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (token >= tokens) {
    const int stored_chunks = static_cast<int>(metadata_padded_features(layout, in_features) / kChunk);
    for (int chunk = threadIdx.x; chunk < stored_chunks; chunk += blockDim.x) {
      out.metadata[metadata_address(layout, tokens, in_features, token, 2 * chunk).byte] = kPaddingByte;
    }
    return;
  }
  Chunk<E> z[kChunks];
  producer.template produce<kKind, kChunks>(z, token, in_features, reducer);
  compress_token<E, kE4M3, kKind, kChunks>(z, out, layout, tokens, token, in_features, reducer);
}

struct RowShape {
  RowKind kind;
  int chunks;   // kChunks
  int threads;  // a multiple of 32
};

// With four chunks per thread the plain kernel takes 40 registers, which leaves a multiprocessor three quarters of its
// warps; rows of more than 512 x 4 chunks take eight.
inline RowShape select_row_shape(const CompressOutput& out, int in_features, bool vector) {
  const bool extras = out.channel_scale != nullptr || out.shift != nullptr || out.token_shift != TokenShift::kNone ||
                      out.variance_correction ||
                      (out.value_type == ElementType::kE4M3 && out.layout != MetadataLayout::kSm90Bits8);
  for (int chunks : {4, 8}) {
    const int warp_features = chunks * 32 * kChunk;
    const bool fits = in_features % warp_features == 0 && in_features / warp_features <= kMaxRowThreads / 32;
    if (vector && !extras && fits) return {RowKind::kPlain, chunks, in_features / (chunks * kChunk)};
  }
  const int total = static_cast<int>(metadata_padded_features(out.layout, in_features)) / kChunk;
  const int chunks = total <= 4 * kMaxRowThreads ? 4 : 8;
  const int threads = static_cast<int>(round_up((total + chunks - 1) / chunks, 32));
  return {vector ? RowKind::kVector : RowKind::kScalar, chunks, threads};
}

template <class Producer, bool kE4M3>
cudaError_t launch_compress_row(const Producer& producer, const CompressOutput& out, int64_t tokens, int in_features,
                                bool vector, cudaStream_t stream) {
  if (in_features > kMaxRowFeatures || tokens > kMaxTokens) return cudaErrorInvalidValue;
  const RowShape shape = select_row_shape(out, in_features, vector);
  const auto launch = [&](auto kind) {
    constexpr RowKind kKind = decltype(kind)::value;
    const auto kernel = shape.chunks == 4 ? compress_row_kernel<Producer, kE4M3, kKind, 4>
                                          : compress_row_kernel<Producer, kE4M3, kKind, 8>;
    const auto blocks = static_cast<unsigned>(metadata_padded_tokens(out.layout, tokens));
    return launch_kernel(kernel, blocks, shape.threads, stream, producer, out, tokens, in_features);
  };
  switch (shape.kind) {
    case RowKind::kPlain:
      if constexpr (kE4M3 || Producer::kFused) return launch(std::integral_constant<RowKind, RowKind::kPlain>{});
      [[fallthrough]];
    case RowKind::kVector: return launch(std::integral_constant<RowKind, RowKind::kVector>{});
    default:
      if constexpr (!Producer::kFused) return launch(std::integral_constant<RowKind, RowKind::kScalar>{});
      return cudaErrorInvalidValue;
  }
}

// Values of e4m3 or of the producer's type.
template <class Producer>
cudaError_t launch_compress_row(const Producer& producer, const CompressOutput& out, int64_t tokens, int in_features,
                                bool vector, cudaStream_t stream) {
  if constexpr (Producer::Element::k16Bit) {
    if (out.value_type == ElementType::kE4M3) {
      return launch_compress_row<Producer, true>(producer, out, tokens, in_features, vector, stream);
    }
  }
  return launch_compress_row<Producer, false>(producer, out, tokens, in_features, vector, stream);
}

}  // namespace nm_act
