// A head's RMSNorm and the rotary embedding of a piece: eight features of the first half of a head and their partners
// in the second. They round where Transformers' own modules do.
#pragma once

#include "../prune/activations.cuh"

namespace nm_act {

inline bool fits(const HeadNorms& norms, int dim) {
  constexpr auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return (norms.q == nullptr && norms.k == nullptr) ||
         (head_norms_support(dim) && aligned(norms.q) && aligned(norms.k));
}

template <class E>
struct Piece {
  Chunk<E> first, second;
};

template <class E>
__device__ __forceinline__ Piece<E> load_piece(const void* base, int64_t at, int half) {
  const auto* source = static_cast<const uint16_t*>(base) + at;
  return {load_chunk<E, true>(source, kChunk), load_chunk<E, true>(source + half, kChunk)};
}

template <class E>
__device__ __forceinline__ void store_piece(void* base, int64_t at, int half, const Piece<E>& piece) {
  auto* target = static_cast<uint16_t*>(base) + at;
  store_chunk<E, true>(target, piece.first, kChunk);
  store_chunk<E, true>(target + half, piece.second, kChunk);
}

// norm(head, weight) of the head whose `pieces` pieces are in consecutive lanes, a power of two that divides a warp's
// 32; all lanes of the head call it.
template <class E>
__device__ __forceinline__ void normalise_head(Piece<E>& piece, const void* weight, int feature, int pieces,
                                               const HeadNorms& norms) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t lanes = (0xFFFFFFFFu >> (32 - pieces)) << (lane & ~(pieces - 1));
  float squares = add_squares(piece.second, add_squares(piece.first, 0.0f));
  for (int offset = pieces / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(lanes, squares, offset);
  const int half = pieces * kChunk;
  const float inverse = inverse_rms(squares, 2 * half, norms.epsilon);
  const auto* by = static_cast<const uint16_t*>(weight) + feature;
  normalise(piece.first, inverse, __ldg(reinterpret_cast<const uint4*>(by)), norms.unit_offset);
  normalise(piece.second, inverse, __ldg(reinterpret_cast<const uint4*>(by + half)), norms.unit_offset);
}

// round(round(x * cos) + round(y * sin)) of two features.
template <class E>
__device__ __forceinline__ uint32_t rotate_pair(uint32_t x, uint32_t y, uint32_t cosine, uint32_t sine) {
  const uint32_t a = E::pack(E::low(x) * E::low(cosine), E::high(x) * E::high(cosine));
  const uint32_t b = E::pack(E::low(y) * E::low(sine), E::high(y) * E::high(sine));
  return E::pack(E::low(a) + E::low(b), E::high(a) + E::high(b));
}

template <class E>
__device__ __forceinline__ Piece<E> rotate(const Piece<E>& x, const Piece<E>& cosine, const Piece<E>& sine) {
  Piece<E> rotated;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t negated = x.second.word[i] ^ 0x80008000u;
    rotated.first.word[i] = rotate_pair<E>(x.first.word[i], negated, cosine.first.word[i], sine.first.word[i]);
    rotated.second.word[i] =
        rotate_pair<E>(x.second.word[i], x.first.word[i], cosine.second.word[i], sine.second.word[i]);
  }
  return rotated;
}

}  // namespace nm_act
