// The 2:4 selection contract of nm_act/reference.py, for host and device: which two of four features survive, as a byte
// mask, and what is derived from that mask: the metadata nibble and the byte selector that gathers the survivors.
//
// Two implementations of the same contract:
//   survivors_16   Unscaled 16-bit features, two per word. The key is |bits|; every NaN has the same key, just above
//                  infinity's. The six comparisons of a group take five 32-bit subtractions, each of which subtracts
//                  two pairs of 15-bit keys: bit 15 of a - b + 0x8000 is set if a >= b, and bit 15 of a - b + 0x7FFF
//                  if a > b. A feature survives if it beats at least two of the other three, which is a bitwise
//                  majority. About 20 integer instructions per group in all.
//   survivors_key  32-bit keys (the bits of non-negative floats), for channel scales and 32-bit features. About twice
//                  the work.
// Of two equal keys the lower index wins, so exactly two features survive.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../format/host_device.h"

#if defined(__CUDACC__)
#define NM_ACT_INLINE __host__ __device__ __forceinline__
#else
#define NM_ACT_INLINE inline
#endif

namespace nm_act {

inline constexpr uint32_t kInfinityKey = 0x7F800000u;
inline constexpr uint32_t kNanKey = 0x7F800001u;  // shared by all NaNs

// Byte i of the result is the byte of {high, low} that nibble i of the selector numbers; if bit 3 of the nibble is set,
// it is that byte's sign bit, replicated.
NM_ACT_INLINE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;  // __byte_perm clears the sign replication bits of the selector
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 0xF;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xFF;
    if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << 8 * i;
  }
  return result;
#endif
}

// bias minus the sum of those weights (signed bytes) whose mask byte is 0xFF.
NM_ACT_INLINE uint32_t subtract_masked(uint32_t mask, uint32_t weights, uint32_t bias) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__dp4a(static_cast<int>(mask), static_cast<int>(weights), static_cast<int>(bias)));
#else
  int32_t sum = static_cast<int32_t>(bias);
  for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(mask >> 8 * i) * static_cast<int8_t>(weights >> 8 * i);
  return static_cast<uint32_t>(sum);
#endif
}

NM_ACT_INLINE uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Minimum of each 16-bit half, unsigned.
NM_ACT_INLINE uint32_t min_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vminu2(a, b);
#else
  const uint32_t low = (a & 0xFFFF) < (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF;
  const uint32_t high = a >> 16 < b >> 16 ? a >> 16 : b >> 16;
  return high << 16 | low;
#endif
}

// Maximum of each 16-bit half, unsigned.
NM_ACT_INLINE uint32_t max_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  return ~min_halves(~a, ~b);
#endif
}

// Keys of two 16-bit features: their magnitudes, with every NaN replaced by nan_keys (in both halves, the bit pattern
// that follows infinity's).
NM_ACT_INLINE uint32_t magnitude_keys(uint32_t features, uint32_t nan_keys) {
  return min_halves(features & 0x7FFF7FFFu, nan_keys);
}

NM_ACT_INLINE uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (c & (a | b)); }

// The six comparisons of a group's 16-bit keys, as bits 15 and 31 of each word.
struct Comparisons {
  uint32_t straight;  // 15: k0 >= k2   31: k1 >= k3
  uint32_t crossed;   // 15: k0 >= k3   31: k1 >= k2
  uint32_t within_a;  // 15: k0 >= k1   31: k1 > k0
  uint32_t from_b;    // 15: k2 > k1    31: k3 > k0
  uint32_t within_b;  // 15: k2 >= k3   31: k3 > k2
};

// a = k0 | k1 << 16, b = k2 | k3 << 16; all keys are below 2^15.
NM_ACT_INLINE Comparisons compare_keys(uint32_t a, uint32_t b) {
  const uint32_t a_swapped = permute_bytes(a, a, 0x1032);
  const uint32_t b_swapped = permute_bytes(b, b, 0x1032);
  return {a - b + 0x80008000u, a - b_swapped + 0x80008000u, a - a_swapped + 0x7FFF8000u, b - a_swapped + 0x7FFF7FFFu,
          b - b_swapped + 0x7FFF8000u};
}

// The features that beat at least two of the other three: bits 15 and 31 of `a` stand for features 0 and 1, those of
// `b` for 2 and 3.
struct Winners {
  uint32_t a, b;
};

NM_ACT_INLINE Winners winners_of(const Comparisons& c) {
  return {majority(c.straight, c.crossed, c.within_a), majority(~c.straight, c.from_b, c.within_b)};
}

NM_ACT_INLINE uint32_t byte_mask(Winners winners) { return permute_bytes(winners.a, winners.b, 0xFDB9); }

// Byte i of the result is 0xFF if feature i survives, else 0. `low` holds features 0 and 1, `high` 2 and 3.
NM_ACT_INLINE uint32_t survivors_16(uint32_t low, uint32_t high, uint32_t nan_keys) {
  return byte_mask(winners_of(compare_keys(magnitude_keys(low, nan_keys), magnitude_keys(high, nan_keys))));
}

// Key of an unscaled 32-bit feature.
NM_ACT_INLINE uint32_t magnitude_key(float z) {
  const uint32_t magnitude = float_bits(z) & 0x7FFFFFFFu;
  return magnitude < kNanKey ? magnitude : kNanKey;
}

// Key of a feature with a channel scale. If z is finite: the bits of min(|z * scale|, FLT_MAX), where a NaN product
// counts as FLT_MAX. Otherwise the key without a scale.
NM_ACT_INLINE uint32_t scaled_key(float z, float scale) {
  const uint32_t magnitude = float_bits(z) & 0x7FFFFFFFu;
  const float score = fminf(fabsf(z * scale), FLT_MAX);
  const uint32_t key = magnitude < kInfinityKey ? float_bits(score) : magnitude;
  return key < kNanKey ? key : kNanKey;
}

// survivors_16 for four keys below 2^31: the sign of a difference tells which key is larger.
NM_ACT_INLINE uint32_t survivors_key(uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  // The sign bit of l<i><j> is set if feature i, the lower index, loses to feature j.
  const uint32_t l01 = k0 - k1, l02 = k0 - k2, l03 = k0 - k3, l12 = k1 - k2, l13 = k1 - k3, l23 = k2 - k3;
  const uint32_t s0 = majority(~l01, ~l02, ~l03);
  const uint32_t s1 = majority(l01, ~l12, ~l13);
  const uint32_t s2 = majority(l02, l12, ~l23);
  const uint32_t s3 = majority(l03, l13, l23);
  return permute_bytes(permute_bytes(s0, s1, 0xFBFB), permute_bytes(s2, s3, 0xFBFB), 0x5410);
}

// The two metadata nibbles of two groups, as one byte (the upper bits of the result are clear). 4 * (s1 + 2 * s2 + 4 *
// s3) is a different one of 4, 8, ..., 24 for each of the six masks: the shift that looks the nibble up in a constant
// word.
NM_ACT_INLINE uint32_t metadata_byte(uint32_t mask0, uint32_t mask1) {
  const uint32_t shift0 = subtract_masked(mask0, 0xF0F8FC00u, 0);
  const uint32_t shift1 = subtract_masked(mask1, 0xF0F8FC00u, 0);
  return (0x0EDC9840u >> shift0 & 0x0Fu) | (0xEDC98400u >> shift1 & 0xF0u);
}

// Byte selector that gathers the two surviving 16-bit features of {high, low} into one word, in order (its upper 16
// bits are not used). s0 and s1 determine the first survivor, s2 and s3 the second: two tables of four entries, looked
// up by one byte permutation.
NM_ACT_INLINE uint32_t gather_selector(uint32_t mask) {
  // First:  s0 s1 = none -> 2, s0 -> 0, s1 -> 1, both -> 0.  Second: s2 s3 = none -> 1, s2 -> 2, s3 -> 3, both -> 3.
  const uint32_t index = subtract_masked(mask, 0xE0F0FEFFu, 0x40);  // s0 + 2 s1 | (4 + s2 + 2 s3) << 4
  return permute_bytes(0x10321054u, 0x76765432u, index);
}

NM_ACT_INLINE uint32_t gather_16(uint32_t low, uint32_t high, uint32_t mask) {
  return permute_bytes(low, high, gather_selector(mask));
}

}  // namespace nm_act
