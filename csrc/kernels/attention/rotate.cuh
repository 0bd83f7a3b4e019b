// The rotary embedding of a piece: eight features of the first half of a head and their partners in the second. It
// rounds where Transformers' own modules do.
#pragma once

#include "../prune/element.cuh"

namespace nm_act {

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
