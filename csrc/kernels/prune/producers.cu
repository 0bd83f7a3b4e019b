// The operators that feed a sparse linear layer, fused with its compression: the dense activation never reaches global
// memory.
//
//   RMSNorm     h = x (+ residual, rounded and written back)
//               x' = round(round(h * rsqrt(mean(h^2) + epsilon)) * weight)
//   SiLU * up   x' = round(round(gate / (1 + exp(-gate))) * up)
//
// They round to bf16 or fp16 where the unfused modules do, so the selection sees the same values. Each is a producer
// for compress_row_kernel: one block per token, the token's features in registers. RMSNorm adds one block reduction
// (float32, fixed order).
#include "compress_row.cuh"

namespace nm_act {
namespace {

template <class E, bool kResidual>
struct RmsNorm {
  using Element = E;
  using Raw = typename E::Raw;
  static constexpr bool kFused = true;
  const Raw* x;
  const Raw* residual;
  Raw* residual_out;
  const Raw* weight;
  float epsilon;

  template <RowKind kKind, int kChunks>
  __device__ __forceinline__ void produce(Chunk<E> (&h)[kChunks], int64_t token, int in_features,
                                          RowReducer& reducer) const {
    Chunk<E> addend[kChunks];
    load_row<E, kKind>(h, x + token * in_features, in_features);
    if constexpr (kResidual) load_row<E, kKind>(addend, residual + token * in_features, in_features);
    const int64_t first = token * in_features + row_chunk<kChunks>(0) * kChunk;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if constexpr (kResidual) {
#pragma unroll
        for (int j = 0; j < kChunk / 2; ++j) {
          h[i].set_pair(j, h[i].get(2 * j) + addend[i].get(2 * j), h[i].get(2 * j + 1) + addend[i].get(2 * j + 1));
        }
        if (row_chunk_count<kKind>(in_features, row_chunk<kChunks>(i)) > 0) {
          store_chunk<E, true>(residual_out + first + i * 32 * kChunk, h[i], kChunk);
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j) squares = fmaf(h[i].get(j), h[i].get(j), squares);
    }
    const float mean = reducer.sum(squares) / static_cast<float>(in_features);
    const float inverse = 1.0f / sqrtf(mean + epsilon);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = row_chunk<kChunks>(i);
      if (row_chunk_count<kKind>(in_features, chunk) == 0) continue;
      const uint4 scale = __ldg(reinterpret_cast<const uint4*>(weight) + chunk);
      const uint32_t word[4] = {scale.x, scale.y, scale.z, scale.w};
#pragma unroll
      for (int j = 0; j < kChunk / 2; ++j) {
        const uint32_t normed = E::pack(h[i].get(2 * j) * inverse, h[i].get(2 * j + 1) * inverse);
        h[i].set_pair(j, E::low(normed) * E::low(word[j]), E::high(normed) * E::high(word[j]));
      }
    }
  }
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <class E>
struct SiluMul {
  using Element = E;
  using Raw = typename E::Raw;
  static constexpr bool kFused = true;
  const Raw* gate;
  const Raw* up;
  int64_t stride;

  template <RowKind kKind, int kChunks>
  __device__ __forceinline__ void produce(Chunk<E> (&z)[kChunks], int64_t token, int in_features, RowReducer&) const {
    Chunk<E> factor[kChunks];
    load_row<E, kKind>(z, gate + token * stride, in_features);
    load_row<E, kKind>(factor, up + token * stride, in_features);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kChunk / 2; ++j) {
        const uint32_t activated = E::pack(silu(z[i].get(2 * j)), silu(z[i].get(2 * j + 1)));
        z[i].set_pair(j, E::low(activated) * factor[i].get(2 * j), E::high(activated) * factor[i].get(2 * j + 1));
      }
    }
  }
};

template <class E>
cudaError_t launch_typed(const RmsNormCompressParams& params, cudaStream_t stream) {
  using Raw = typename E::Raw;
  const auto launch = [&](auto has_residual) {
    const RmsNorm<E, decltype(has_residual)::value> producer{
        static_cast<const Raw*>(params.x), static_cast<const Raw*>(params.residual),
        static_cast<Raw*>(params.residual_out), static_cast<const Raw*>(params.weight), params.epsilon};
    return launch_compress_row(producer, params.out, params.tokens, params.in_features, true, stream);
  };
  return params.residual != nullptr ? launch(std::true_type{}) : launch(std::false_type{});
}

template <class E>
cudaError_t launch_typed(const SiluMulCompressParams& params, cudaStream_t stream) {
  using Raw = typename E::Raw;
  const SiluMul<E> producer{static_cast<const Raw*>(params.gate), static_cast<const Raw*>(params.up), params.stride};
  return launch_compress_row(producer, params.out, params.tokens, params.in_features, true, stream);
}

template <class Params>
cudaError_t launch(const Params& params, bool aligned, cudaStream_t stream) {
  if (!aligned || params.in_features % kChunk != 0 || !channels_vectorise(params.out) ||
      !layout_fits(params.x_type, params.out, params.in_features)) {
    return cudaErrorInvalidValue;
  }
  if (params.tokens == 0) return cudaSuccess;
  switch (params.x_type) {
    case ElementType::kBFloat16: return launch_typed<BFloat16>(params, stream);
    case ElementType::kFloat16: return launch_typed<Float16>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_rmsnorm_compress(const RmsNormCompressParams& params, cudaStream_t stream) {
  const bool aligned = is_aligned(params.x, 16) && is_aligned(params.residual, 16) &&
                       is_aligned(params.residual_out, 16) && is_aligned(params.weight, 16);
  return launch(params, aligned, stream);
}

cudaError_t launch_silu_mul_compress(const SiluMulCompressParams& params, cudaStream_t stream) {
  const bool aligned = is_aligned(params.gate, 16) && is_aligned(params.up, 16) && params.stride % kChunk == 0;
  return launch(params, aligned, stream);
}

}  // namespace nm_act
