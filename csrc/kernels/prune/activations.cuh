// RMSNorm and a gated activation of eight features, rounded to the element type where the unfused modules round.
#pragma once

#include "element.cuh"

namespace nm_act {

// SiLU, x / (1 + exp(-x)), or GELU with the tanh approximation, x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715
// x^3), as x / (1 + exp(-2 u)): without the sum's cancellation where x is far below zero. One choice per feature instead of
// a branch around eight makes the library smaller.
__device__ __forceinline__ float activate(float x, Activation activation) {
  constexpr float kTwice = 2.0f * 0.79788456080286536f;
  const float u = activation == Activation::kGeluTanh ? kTwice * fmaf(0.044715f * x * x, x, x) : x;
  return __fdividef(x, 1.0f + __expf(-u));
}

// gate = activation(gate) * up.
template <class E>
__device__ __forceinline__ void multiply_by_activated(Chunk<E>& gate, const Chunk<E>& up, Activation activation) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const uint32_t activated =
        E::pack(activate(gate.get(2 * i), activation), activate(gate.get(2 * i + 1), activation));
    gate.set_pair(i, E::low(activated) * up.get(2 * i), E::high(activated) * up.get(2 * i + 1));
  }
}

template <class E>
__device__ __forceinline__ void add(Chunk<E>& x, const Chunk<E>& addend) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    x.set_pair(i, x.get(2 * i) + addend.get(2 * i), x.get(2 * i + 1) + addend.get(2 * i + 1));
  }
}

template <class E>
__device__ __forceinline__ float add_squares(const Chunk<E>& x, float squares) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) squares = fmaf(x.get(i), x.get(i), squares);
  return squares;
}

__device__ __forceinline__ float inverse_rms(float squares, int in_features, float epsilon) {
  return 1.0f / sqrtf(squares / static_cast<float>(in_features) + epsilon);
}

// h = round(round(h * inverse) * weight), or with unit_offset round(h * inverse * (1 + weight)), as Gemma's module rounds;
// `weight` holds eight values of the element type.
template <class E>
__device__ __forceinline__ void normalise(Chunk<E>& h, float inverse, uint4 weight, bool unit_offset) {
  const uint32_t word[4] = {weight.x, weight.y, weight.z, weight.w};
  if (unit_offset) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      h.set_pair(i, h.get(2 * i) * inverse * (1.0f + E::low(word[i])),
                 h.get(2 * i + 1) * inverse * (1.0f + E::high(word[i])));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const uint32_t normed = E::pack(h.get(2 * i) * inverse, h.get(2 * i + 1) * inverse);
    h.set_pair(i, E::low(normed) * E::low(word[i]), E::high(normed) * E::high(word[i]));
  }
}

}  // namespace nm_act
