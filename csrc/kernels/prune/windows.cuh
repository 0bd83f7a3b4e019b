// A unit of sixteen features in registers: its selection under 2:4+1 and its lifted survivors.
#pragma once

#include "compress.cuh"
#include "window_select.h"

namespace nm_act {

template <class E>
struct Unit {
  Chunk<E> chunk[2];
};

struct ChannelUnit {
  ChannelChunk chunk[2];
};

template <class E>
__device__ __forceinline__ void words_of(const Unit<E>& unit, uint32_t (&word)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i] = unit.chunk[i / 4].word[i % 4];
}

template <class E>
__device__ __forceinline__ void keys_of(const Unit<E>& unit, const ChannelUnit& scale, uint32_t (&key)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    key[i] = scaled_key(unit.chunk[i / kChunk].get(i % kChunk), scale.chunk[i / kChunk].value[i % kChunk]);
  }
}

// Selects by 2:4+1, given its removal_of(e). kKeys: with 32-bit keys, |z| * scale.
template <class E, bool kKeys>
__device__ __forceinline__ WindowSlots select_plus_one(const Unit<E>& unit, const ChannelUnit& scale, int e,
                                                       const Removal& removal) {
  if constexpr (kKeys) {
    uint32_t key[kUnit];
    keys_of(unit, scale, key);
    return plus_one_of_keys(key, e);
  } else {
    uint32_t word[8];
    words_of(unit, word);
    return plus_one_16(word, E::kNanKeys, removal);
  }
}

// The survivors of a unit, window by window, and their metadata.
struct Lifted {
  uint32_t word[kWindows];  // two survivors per window
  uint32_t base;            // the two metadata bytes of the first four windows
  uint32_t extra;           // the nibble of the fifth
};

template <class E>
__device__ __forceinline__ Lifted lift(const Unit<E>& unit, const WindowSlots& windows, int e) {
  uint32_t word[8];
  words_of(unit, word);
  Lifted lifted;
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    lifted.word[quad] = gather_16(word[2 * quad], word[2 * quad + 1], windows.held[quad]);
  }
  const uint32_t halves = e & 1 ? 0x7632u : 0x5410u;
  const bool high = e >= 2;
  lifted.word[4] =
      gather_16(permute_bytes(high ? word[1] : word[0], high ? word[3] : word[2], halves),
                permute_bytes(high ? word[5] : word[4], high ? word[7] : word[6], halves), windows.held[4]);
  lifted.base = metadata_byte(windows.held[0], windows.held[1]) | metadata_byte(windows.held[2], windows.held[3]) << 8;
  lifted.extra = metadata_byte(windows.held[4], 0xFFFFu) & 0xFu;
  return lifted;
}

// The metadata byte of two units' fifth windows, which two lanes share; the even lane stores it. The whole warp must
// call. Units that are not `real` contribute the padding nibble.
__device__ __forceinline__ uint8_t extra_byte(const Lifted& lifted, bool real) {
  const uint32_t own = real ? lifted.extra : kPaddingNibble;
  return static_cast<uint8_t>(own | __shfl_down_sync(kAllLanes, own, 1) << 4);
}

}  // namespace nm_act
