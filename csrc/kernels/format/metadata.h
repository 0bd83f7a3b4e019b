// Where the 2:4 metadata of a group of four features is stored, for every layout that this library's kernels read or
// write.
//
// A group's metadata is a nibble, idx0 | idx1 << 2 with idx0 < idx1: the positions of its two survivors.
// metadata_address() maps (token, group) to the byte that holds the nibble and to the nibble's shift in that byte (0 or
// 4); the low nibble of a byte always belongs to the lower group. T is the K extent of a metadata tile.
//
//   kNeutral          uint8 [tokens, ceil(in / 8)], row-major: the device-neutral format of nm_act::compress
//   kSm80Bits16       uint16 words of 16 features, [tokens, in / 16], in the order that ldmatrix must find for mma.sp:
//                     32 tokens are interleaved 8 by 8, 2x2 blocks of words are transposed, and words lie column-major
//                     in pairs of columns (CUTLASS 2.x: reorder_meta into ColumnMajorInterleaved<2>)
//   kSm90Bits16T64, kSm90Bits8
//                     tiles of 64 tokens by T features, tokens fastest (CUTLASS 3.x: Sm90GemmSparseConfig). T is
//                     min(TileK, 128): 64 for 16-bit values, whose tiles are 64 features deep, and 128 for 8-bit ones
//
// A nibble's offset is the sum of a term in the token and a term in the group, so kernels compute the token's term
// once. Buffers are allocated for padded tokens and features. Padding nibbles are kPaddingNibble (positions 0 and 1),
// because wgmma.sp and mma.sp are undefined for equal or descending positions. tests/native/metadata_layout.cpp
// compares every offset with CUTLASS.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nm_act {

enum class MetadataLayout : int { kNeutral = 0, kSm80Bits16 = 1, kSm90Bits16T64 = 2, kSm90Bits8 = 3 };

inline constexpr int kMetadataLayouts = 4;
inline constexpr uint8_t kPaddingNibble = 0x4;

// As nm_act.METADATA_LAYOUTS names them.
constexpr const char* layout_text(MetadataLayout layout) {
  switch (layout) {
    case MetadataLayout::kNeutral: return "neutral";
    case MetadataLayout::kSm80Bits16: return "sm80_16bit";
    case MetadataLayout::kSm90Bits16T64: return "sm90_16bit_t64";
    default: return "sm90_8bit";
  }
}

struct NibbleAddress {
  int64_t byte;
  int shift;
};

// Tokens and features of one metadata tile; a buffer holds whole tiles. A row of the neutral layout ends on a whole
// byte.
NM_ACT_HOST_DEVICE constexpr uint32_t metadata_tile_tokens(MetadataLayout layout) {
  return layout == MetadataLayout::kNeutral ? 1 : layout == MetadataLayout::kSm80Bits16 ? 32 : 64;
}

NM_ACT_HOST_DEVICE constexpr uint32_t metadata_tile_features(MetadataLayout layout) {
  switch (layout) {
    case MetadataLayout::kNeutral: return 8;
    case MetadataLayout::kSm80Bits16: return 32;
    case MetadataLayout::kSm90Bits16T64: return 64;
    default: return 128;
  }
}

// Byte offset, in a 64-token by T-feature tile of an sm90 layout, of the 32-bit metadata word that this thread of the
// warp group passes to the tile's wgmma.sp number `step` (which covers 32 features of 16 bits, or 64 of 8 bits).
NM_ACT_HOST_DEVICE constexpr int wgmma_metadata_byte(MetadataLayout layout, int thread, int step) {
  const int row = thread / 4 % 8, half = thread % 2, quarter = thread / 32;
  if (layout == MetadataLayout::kSm90Bits8) {
    return 16 * (row + 8 * half + 16 * quarter) + 4 * (thread / 2 % 2) + 8 * step;
  }
  const int steps = static_cast<int>(metadata_tile_features(layout)) / 32;
  return 4 * (steps * (row + 8 * half + 16 * quarter) + step);
}

NM_ACT_HOST_DEVICE constexpr int64_t round_up(int64_t value, uint32_t multiple) {
  return static_cast<int64_t>((static_cast<uint64_t>(value) + multiple - 1) / multiple * multiple);
}

NM_ACT_HOST_DEVICE constexpr int64_t metadata_padded_tokens(MetadataLayout layout, int64_t tokens) {
  return round_up(tokens, metadata_tile_tokens(layout));
}

NM_ACT_HOST_DEVICE constexpr int64_t metadata_padded_features(MetadataLayout layout, int64_t in_features) {
  return round_up(in_features, metadata_tile_features(layout));
}

NM_ACT_HOST_DEVICE constexpr int64_t metadata_bytes(MetadataLayout layout, int64_t tokens, int64_t in_features) {
  return metadata_padded_tokens(layout, tokens) * metadata_padded_features(layout, in_features) / 8;
}

namespace detail {

// Unsigned and as narrow as possible, because kernels evaluate these: divisions by powers of two become shifts.
NM_ACT_HOST_DEVICE constexpr uint64_t neutral_byte(uint32_t in_features, uint32_t token, uint32_t group) {
  return uint64_t{token} * ((in_features + 7) / 8) + group / 2;
}

NM_ACT_HOST_DEVICE constexpr uint64_t sm80_byte(uint64_t padded_tokens, uint32_t token, uint32_t group) {
  const uint32_t column = group / 4;  // index of the word along in_features
  const uint32_t row = token / 32 * 32 + token % 8 * 4 + token % 32 / 8;
  // The 2x2 transpose exchanges the parities of row and column.
  const uint64_t word = column / 2 * padded_tokens * 2 + (row / 2 * 2 + column % 2) * uint64_t{2} + row % 2;
  return word * 2 + group % 4 / 2;
}

// Offsets are counted in features: a kept feature has two bits of metadata, so a byte describes eight features.
NM_ACT_HOST_DEVICE constexpr uint64_t sm90_bits16_byte(uint64_t padded_tokens, uint32_t token, uint32_t group) {
  constexpr uint32_t kTile = 64, kBlocks = kTile / 32;  // a 16-token by 32-feature block is what one wgmma.sp reads
  const uint32_t k = group * 4;
  const uint64_t slab = uint64_t{token / 64} * (64 * kTile) + k / kTile * padded_tokens * kTile;
  const uint32_t in_slab = token % 64 / 16 * 512 * kBlocks + token % 8 * 32 * kBlocks + token / 8 % 2 * 16 +
                           k / 16 % 2 * 256 * kBlocks + k % kTile / 32 * 32 + k % 16;
  return slab / 8 + in_slab / 8;
}

NM_ACT_HOST_DEVICE constexpr uint64_t sm90_bits8_byte(uint64_t padded_tokens, uint32_t token, uint32_t group) {
  constexpr uint32_t kTile = 128;
  const uint32_t k = group * 4;
  return (k / kTile * padded_tokens + token) * (kTile / 8) + k % kTile / 8;
}

}  // namespace detail

// Address of the nibble for features 4 * group ... 4 * group + 3 of `token`, in a buffer for tokens x in_features.
// token < 2^32, group < 2^30.
NM_ACT_HOST_DEVICE constexpr NibbleAddress metadata_address(MetadataLayout layout, int64_t tokens, int64_t in_features,
                                                            int64_t token, int64_t group) {
  const uint64_t padded_tokens = static_cast<uint64_t>(metadata_padded_tokens(layout, tokens));
  const uint32_t t = static_cast<uint32_t>(token), g = static_cast<uint32_t>(group);
  const int shift = static_cast<int>(g % 2) * 4;
  uint64_t byte = 0;
  switch (layout) {
    case MetadataLayout::kNeutral: byte = detail::neutral_byte(static_cast<uint32_t>(in_features), t, g); break;
    case MetadataLayout::kSm80Bits16: byte = detail::sm80_byte(padded_tokens, t, g); break;
    case MetadataLayout::kSm90Bits16T64: byte = detail::sm90_bits16_byte(padded_tokens, t, g); break;
    case MetadataLayout::kSm90Bits8: byte = detail::sm90_bits8_byte(padded_tokens, t, g); break;
  }
  return {static_cast<int64_t>(byte), shift};
}

}  // namespace nm_act
