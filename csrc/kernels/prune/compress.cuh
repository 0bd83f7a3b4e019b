// 2:4 compression of one chunk of eight features (two groups) and its stores, used by every kernel that compresses.
#pragma once

#include "../nm_act.h"
#include "element.cuh"

namespace nm_act {

inline constexpr uint8_t kPaddingByte = kPaddingNibble | kPaddingNibble << 4;

// The four survivors of a chunk, in order, and the chunk's metadata byte.
template <class E>
struct Kept {
  static constexpr int kWords = Chunk<E>::kWords / 2;
  uint32_t word[kWords];
  uint32_t metadata;
};

// The survivors of a chunk's two groups, as byte masks. kScaled: the keys are |z| * scale.
template <class E, bool kScaled>
__device__ __forceinline__ void chunk_survivors(const Chunk<E>& z, const ChannelChunk& scale, uint32_t (&mask)[2]) {
  if constexpr (E::k16Bit && !kScaled) {
    mask[0] = survivors_16(z.word[0], z.word[1], E::kNanKeys);
    mask[1] = survivors_16(z.word[2], z.word[3], E::kNanKeys);
  } else {
    uint32_t key[kChunk];
    if constexpr (kScaled) {
      // A finite product is its own key; the rare others take the complete rule.
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        key[i] = float_bits(fabsf(z.get(i)) * fabsf(scale.value[i])) & 0x7FFFFFFFu;
        largest = max(largest, key[i]);
      }
      if (largest >= kInfinityKey) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) key[i] = scaled_key(z.get(i), scale.value[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) key[i] = magnitude_key(z.get(i));
    }
    mask[0] = survivors_key(key[0], key[1], key[2], key[3]);
    mask[1] = survivors_key(key[4], key[5], key[6], key[7]);
  }
}

template <class E>
__device__ __forceinline__ Kept<E> keep_survivors(const Chunk<E>& z, uint32_t mask0, uint32_t mask1) {
  Kept<E> kept;
  kept.metadata = metadata_byte(mask0, mask1);
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    const uint32_t mask = group == 0 ? mask0 : mask1;
    if constexpr (E::k16Bit) {
      kept.word[group] = gather_16(z.word[2 * group], z.word[2 * group + 1], mask);
    } else {
      const uint32_t* word = z.word + 4 * group;
      kept.word[2 * group] = mask & 0xFFu ? word[0] : mask & 0xFF00u ? word[1] : word[2];
      kept.word[2 * group + 1] = mask & 0xFF000000u ? word[3] : mask & 0xFF0000u ? word[2] : word[1];
    }
  }
  return kept;
}

// z = x - eta, rounded to the element type.
template <class E>
__device__ __forceinline__ void subtract(Chunk<E>& x, float eta) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) x.set_pair(i, x.get(2 * i) - eta, x.get(2 * i + 1) - eta);
}

template <class E>
__device__ __forceinline__ void subtract(Chunk<E>& x, const ChannelChunk& eta) {
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    x.set_pair(i, x.get(2 * i) - eta.value[2 * i], x.get(2 * i + 1) - eta.value[2 * i + 1]);
  }
}

// Features [count, 8) become 0. kVector: count is 0 or 8.
template <bool kVector, class E>
__device__ __forceinline__ void clear_from(Chunk<E>& x, int count) {
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < Chunk<E>::kWords; ++i) x.word[i] = count > 0 ? x.word[i] : 0;
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      x.set_pair(i, 2 * i < count ? x.get(2 * i) : 0.0f, 2 * i + 1 < count ? x.get(2 * i + 1) : 0.0f);
    }
  }
}

// Stores the survivors of a chunk of `count` features to `values` (of the element type). kVector: count is 8 and values
// is aligned for one vector store.
template <class E, bool kVector>
__device__ __forceinline__ void store_values(typename E::Raw* values, const Kept<E>& kept, int count) {
  if constexpr (kVector && E::k16Bit) {
    *reinterpret_cast<uint2*>(values) = make_uint2(kept.word[0], kept.word[1]);
  } else if constexpr (kVector) {
    *reinterpret_cast<uint4*>(values) = make_uint4(kept.word[0], kept.word[1], kept.word[2], kept.word[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      if (i >= count / 2) break;
      if constexpr (E::k16Bit) {
        values[i] = static_cast<uint16_t>(kept.word[i / 2] >> 16 * (i % 2));
      } else {
        values[i] = kept.word[i];
      }
    }
  }
}

// A chunk's metadata byte as stored: if a row ends in a single group, its upper nibble is 0. Padding chunks hold zeros,
// whose survivors are the first two, so their byte is kPaddingByte without special treatment.
template <bool kVector>
__device__ __forceinline__ uint8_t stored_byte(uint32_t metadata, int count) {
  return static_cast<uint8_t>(!kVector && count == kChunk / 2 ? metadata & 0xFu : metadata);
}

// Number of the row's features in chunk `chunk`: 8; 4 in a row's last half chunk (never if kVector); 0 beyond the row.
template <bool kVector>
__device__ __forceinline__ int chunk_count(int in_features, int chunk) {
  if constexpr (kVector) return chunk * kChunk < in_features ? kChunk : 0;
  return max(0, min(kChunk, in_features - chunk * kChunk));
}

inline bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline int element_bytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : type == ElementType::kE4M3 ? 1 : 2;
}

// Whether rows of this input can be read, and their survivors stored, in whole chunks.
inline bool rows_vectorise(const void* x, int64_t x_stride, int in_features, ElementType type) {
  return is_aligned(x, 16) && x_stride * element_bytes(type) % 16 == 0 && in_features % kChunk == 0;
}

inline bool channels_vectorise(const CompressOutput& out) {
  return is_aligned(out.channel_scale, 16) && is_aligned(out.shift, 16);
}

// Whether a GEMM (or nm_act::decompress) reads such values in this layout.
inline bool layout_fits(ElementType x_type, const CompressOutput& out, int in_features) {
  switch (out.layout) {
    case MetadataLayout::kNeutral:
      return in_features % 4 == 0 && (out.value_type != ElementType::kE4M3 || in_features % 8 == 0);
    case MetadataLayout::kSm90Bits8: return out.value_type == ElementType::kE4M3 && in_features % 32 == 0;
    default: return element_bytes(x_type) == 2 && out.value_type == x_type && in_features % 16 == 0;
  }
}

}  // namespace nm_act
