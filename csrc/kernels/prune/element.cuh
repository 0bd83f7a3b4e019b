// Element types of the pruning kernels; a chunk of eight consecutive features of one token, its loads, stores and
// rounding.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../nm_act.h"
#include "select.h"

namespace nm_act {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
inline constexpr int kChunk = 8;  // features per thread and step: one 16-byte load of 16-bit elements

struct BFloat16 {
  using Raw = uint16_t;
  static constexpr bool k16Bit = true;
  static constexpr uint32_t kNanKeys = 0x7F817F81u;
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  // The products of two pairs, rounded once.
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    const __nv_bfloat162 product =
        __hmul2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
#else
    return pack(low(a) * low(b), high(a) * high(b));
#endif
  }
};

struct Float16 {
  using Raw = uint16_t;
  static constexpr bool k16Bit = true;
  static constexpr uint32_t kNanKeys = 0x7C017C01u;
  static __device__ __forceinline__ float low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  // The products of two pairs, rounded once.
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    const __half2 product = __hmul2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(product);
#else
    return pack(low(a) * low(b), high(a) * high(b));
#endif
  }
};

struct Float32 {
  using Raw = uint32_t;
  static constexpr bool k16Bit = false;
};

// Calls launch with the element type that corresponds to `type`.
template <class Launch>
cudaError_t with_element(ElementType type, const Launch& launch) {
  switch (type) {
    case ElementType::kBFloat16: return launch(BFloat16{});
    case ElementType::kFloat16: return launch(Float16{});
    case ElementType::kFloat32: return launch(Float32{});
    default: return cudaErrorInvalidValue;
  }
}

// Eight features: two per word in four words, or one per word in eight.
template <class E>
struct Chunk {
  static constexpr int kWords = E::k16Bit ? 4 : 8;
  uint32_t word[kWords];

  __device__ __forceinline__ float get(int i) const {
    if constexpr (E::k16Bit) {
      return i % 2 ? E::high(word[i / 2]) : E::low(word[i / 2]);
    } else {
      return __uint_as_float(word[i]);
    }
  }
  // Features 2 * i and 2 * i + 1, rounded to the element type.
  __device__ __forceinline__ void set_pair(int i, float low, float high) {
    if constexpr (E::k16Bit) {
      word[i] = E::pack(low, high);
    } else {
      word[2 * i] = __float_as_uint(low);
      word[2 * i + 1] = __float_as_uint(high);
    }
  }
};

// Features [0, count) of the chunk at `source`; the rest are 0. kVector: source is 16-byte aligned and count is 8. The
// loads are streaming: x is read once and should not evict from L2 what the GEMM reads next.
template <class E, bool kVector>
__device__ __forceinline__ Chunk<E> load_chunk(const typename E::Raw* source, int count) {
  Chunk<E> chunk;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < Chunk<E>::kWords / 4; ++i) {
      const uint4 vector = __ldcs(reinterpret_cast<const uint4*>(source) + i);
      chunk.word[4 * i] = vector.x;
      chunk.word[4 * i + 1] = vector.y;
      chunk.word[4 * i + 2] = vector.z;
      chunk.word[4 * i + 3] = vector.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Chunk<E>::kWords; ++i) chunk.word[i] = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const uint32_t bits = i < count ? static_cast<uint32_t>(source[i]) : 0u;
      if constexpr (E::k16Bit) {
        chunk.word[i / 2] |= bits << 16 * (i % 2);
      } else {
        chunk.word[i] = bits;
      }
    }
  }
  return chunk;
}

// Stores features [0, count) of a chunk. kVector: as in load_chunk, but count may also be 0.
template <class E, bool kVector>
__device__ __forceinline__ void store_chunk(typename E::Raw* destination, const Chunk<E>& chunk, int count) {
  if constexpr (kVector) {
    if (count == 0) return;
#pragma unroll
    for (int i = 0; i < Chunk<E>::kWords / 4; ++i) {
      reinterpret_cast<uint4*>(destination)[i] =
          make_uint4(chunk.word[4 * i], chunk.word[4 * i + 1], chunk.word[4 * i + 2], chunk.word[4 * i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i >= count) break;
      if constexpr (E::k16Bit) {
        destination[i] = static_cast<uint16_t>(chunk.word[i / 2] >> 16 * (i % 2));
      } else {
        destination[i] = chunk.word[i];
      }
    }
  }
}

template <class E>
__device__ __forceinline__ Chunk<E> zero_chunk() {
  Chunk<E> chunk;
#pragma unroll
  for (int i = 0; i < Chunk<E>::kWords; ++i) chunk.word[i] = 0;
  return chunk;
}

// Eight consecutive per-channel parameters, loaded through the cache because every token reads them.
struct ChannelChunk {
  float value[kChunk];
};

template <bool kVector>
__device__ __forceinline__ ChannelChunk load_channels(const float* source, int count, float otherwise) {
  ChannelChunk channels;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 vector = __ldg(reinterpret_cast<const float4*>(source) + i);
      channels.value[4 * i] = vector.x;
      channels.value[4 * i + 1] = vector.y;
      channels.value[4 * i + 2] = vector.z;
      channels.value[4 * i + 3] = vector.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) channels.value[i] = i < count ? __ldg(source + i) : otherwise;
  }
  return channels;
}

}  // namespace nm_act
