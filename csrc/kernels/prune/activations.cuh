// RMSNorm and SiLU * up of eight features, rounded to the element type where the unfused modules round.
#pragma once

#include "element.cuh"

namespace nm_act {

// x / (1 + exp(-x)) in five instructions: without the care for denormal numbers that __expf and __fdividef take, and
// that 1 + exp(-x) does not need.
__device__ __forceinline__ float silu(float x) {
#if defined(__CUDA_ARCH__)
  float exponential, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + exponential));
  return x * reciprocal;
#else
  return __fdividef(x, 1.0f + __expf(-x));
#endif
}

// SiLU(gate) * up of two features.
template <class E>
__device__ __forceinline__ uint32_t silu_times(uint32_t gate, uint32_t up) {
  return E::multiply(E::pack(silu(E::low(gate)), silu(E::high(gate))), up);
}

// gate = SiLU(gate) * up.
template <class E>
__device__ __forceinline__ void multiply_by_silu(Chunk<E>& gate, const Chunk<E>& up) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) gate.word[i] = silu_times<E>(gate.word[i], up.word[i]);
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

// h = round(round(h * inverse) * weight); `weight` holds eight values of the element type.
template <class E>
__device__ __forceinline__ void normalise(Chunk<E>& h, float inverse, uint4 weight) {
  const uint32_t word[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const uint32_t normed = E::pack(h.get(2 * i) * inverse, h.get(2 * i + 1) * inverse);
    h.set_pair(i, E::low(normed) * E::low(word[i]), E::high(normed) * E::high(word[i]));
  }
}

}  // namespace nm_act
