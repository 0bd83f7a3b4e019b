// The operators whose result a sparse linear layer reads, fused with the layer's selection: the dense activation never
// reaches global memory.
//
//   RMSNorm     h = x or norm(x, x_weight) (+ residual, rounded and written back)
//               x' = norm(h, weight)
//   gate * up   x' = round(round(activation(gate)) * up)
//
// They round to bf16 or fp16 where the unfused modules do, so the selection sees the same values. Each is a producer
// for a kernel with one block per token and the token's features in registers: compress_row_kernel or prune_row_kernel.
// RMSNorm adds a block reduction for each norm (float32, fixed order). Options are tested once per row or chunk at run
// time: an instance for each would make the library larger and the kernels, which wait for memory, no faster.
#pragma once

#include "activations.cuh"
#include "compress_row.cuh"

namespace nm_act {

// kResidual: there may be a residual.
template <class E, bool kResidual>
struct RmsNorm {
  using Element = E;
  using Raw = typename E::Raw;
  static constexpr bool kFused = true;
  const Raw* x;
  const Raw* residual;
  Raw* residual_out;
  const Raw* weight;
  const Raw* x_weight;
  float epsilon;
  bool unit_offset;

  template <RowKind kKind, int kChunks>
  __device__ __forceinline__ void produce(Chunk<E> (&h)[kChunks], int64_t token, int in_features,
                                          RowReducer& reducer) const {
    Chunk<E> addend[kChunks];
    load_row<E, kKind>(h, x + token * in_features, in_features);
    const bool adds = kResidual && residual != nullptr;
    if (adds) load_row<E, kKind>(addend, residual + token * in_features, in_features);
    const int64_t first = token * in_features + row_chunk<kChunks>(0) * kChunk;
    // Loaded before the reduction; otherwise the loads would wait for its result.
    constexpr bool kEarly = kKind == RowKind::kPlain && kChunks <= 4 && !kResidual;  // else registers cost more
    uint4 scales[kEarly ? kChunks : 1];
    if constexpr (kEarly) {
      const uint4* const scale = reinterpret_cast<const uint4*>(weight) + row_chunk<kChunks>(0);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) scales[i] = __ldg(scale + i * 32);
    }
    // The norm of x, if there is one, then that of h. A loop, because two copies of it made the library 1 MB larger.
#pragma unroll 1
    for (bool last = !adds || x_weight == nullptr;; last = true) {
      const Raw* by = last ? weight : x_weight;
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (adds && last) {
          add(h[i], addend[i]);
          if (row_chunk_count<kKind>(in_features, row_chunk<kChunks>(i)) > 0) {
            store_chunk<E, true>(residual_out + first + i * 32 * kChunk, h[i], kChunk);
          }
        }
        squares = add_squares(h[i], squares);
      }
      const float inverse = inverse_rms(reducer.sum(squares), in_features, epsilon);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = row_chunk<kChunks>(i);
        if (row_chunk_count<kKind>(in_features, chunk) == 0) continue;
        if constexpr (kEarly) {
          normalise(h[i], inverse, scales[i], unit_offset);
        } else {
          normalise(h[i], inverse, __ldg(reinterpret_cast<const uint4*>(by) + chunk), unit_offset);
        }
      }
      if (!kResidual || last) return;
    }
  }
};

template <class E>
struct SiluMul {
  using Element = E;
  using Raw = typename E::Raw;
  static constexpr bool kFused = true;
  const Raw* gate;
  const Raw* up;
  int64_t stride;
  Activation activation;

  template <RowKind kKind, int kChunks>
  __device__ __forceinline__ void produce(Chunk<E> (&z)[kChunks], int64_t token, int in_features, RowReducer&) const {
    Chunk<E> factor[kChunks];
    load_row<E, kKind>(z, gate + token * stride, in_features);
    load_row<E, kKind>(factor, up + token * stride, in_features);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) multiply_by_activated(z[i], factor[i], activation);
  }
};

inline bool rows_vectorise(const RmsNormInput& input) {
  return is_aligned(input.x, 16) && is_aligned(input.residual, 16) && is_aligned(input.residual_out, 16) &&
         is_aligned(input.weight, 16) && is_aligned(input.x_weight, 16);
}

inline bool rows_vectorise(const SiluMulInput& input) {
  return is_aligned(input.gate, 16) && is_aligned(input.up, 16) && input.stride % kChunk == 0;
}

inline bool rows_vectorise(const RowsInput& input) { return is_aligned(input.x, 16) && input.x_stride % kChunk == 0; }

template <bool kResidual, class E>
RmsNorm<E, kResidual> producer_of(const RmsNormInput& input, E) {
  using Raw = typename E::Raw;
  return {static_cast<const Raw*>(input.x),
          static_cast<const Raw*>(input.residual),
          static_cast<Raw*>(input.residual_out),
          static_cast<const Raw*>(input.weight),
          static_cast<const Raw*>(input.x_weight),
          input.epsilon,
          input.unit_offset};
}

template <class E>
SiluMul<E> producer_of(const SiluMulInput& input, E) {
  using Raw = typename E::Raw;
  return {static_cast<const Raw*>(input.gate), static_cast<const Raw*>(input.up), input.stride, input.activation};
}

template <class E>
RowLoad<E> producer_of(const RowsInput& input, E) {
  return {static_cast<const typename E::Raw*>(input.x), input.x_stride};
}

// Calls launch with the element type of `input`, whose rows must be whole aligned chunks.
template <class Input, class Launch>
cudaError_t launch_produced(const Input& input, const Launch& launch) {
  if (!rows_vectorise(input) || input.in_features % kChunk != 0) return cudaErrorInvalidValue;
  if (input.tokens == 0) return cudaSuccess;
  switch (input.x_type) {
    case ElementType::kBFloat16: return launch(BFloat16{});
    case ElementType::kFloat16: return launch(Float16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
