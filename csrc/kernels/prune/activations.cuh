// RMSNorm and a gated activation of eight features, rounded to the element type where the unfused modules round.
#pragma once

#include "element.cuh"

namespace nm_act {

// x / (1 + exp2(exponent)) in three instructions and two sums, without the handling of denormal numbers in __expf and
// __fdividef, which 1 + exp2 does not need.
__device__ __forceinline__ float x_over_one_plus_exp2(float x, float exponent) {
#if defined(__CUDA_ARCH__)
  float exponential, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(exponent));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + exponential));
  return x * reciprocal;
#else
  return __fdividef(x, 1.0f + exp2f(exponent));
#endif
}

// SiLU, x / (1 + exp(-x)), or GELU with the tanh approximation, x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x +
// 0.044715 x^3), computed as x / (1 + exp(-2 u)), where no sum cancels if x is far below zero. One choice per feature
// instead of a branch around eight makes the library smaller.
__device__ __forceinline__ float activate(float x, Activation activation) {
  constexpr float kExponent = -1.4426950408889634f, kGelu = 2.0f * 0.79788456080286536f * kExponent;
  return x_over_one_plus_exp2(
      x, activation == Activation::kGeluTanh ? kGelu * fmaf(0.044715f * x * x, x, x) : kExponent * x);
}

// activation(gate) * up of two features.
template <class E>
__device__ __forceinline__ uint32_t activated_times(uint32_t gate, uint32_t up, Activation activation) {
  return E::multiply(E::pack(activate(E::low(gate), activation), activate(E::high(gate), activation)), up);
}

// gate = activation(gate) * up.
template <class E>
__device__ __forceinline__ void multiply_by_activated(Chunk<E>& gate, const Chunk<E>& up, Activation activation) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) gate.word[i] = activated_times<E>(gate.word[i], up.word[i], activation);
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

// h = round(round(h * inverse) * weight), or with unit_offset round(h * inverse * (1 + weight)), as Gemma's module
// rounds; `weight` holds eight values of the element type.
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
