// The tiles of the sm_90a GEMMs, one per line: name, value type (Bits16: bf16 and fp16, with both weight storages;
// E4M3: [out, in] weights, bf16 and fp16 outputs), tile (tokens, out_features, in_features), cluster (tokens, outputs),
// schedule (Cooperative: two warp groups share a tile; PingPong: each has its own; Split: cooperative, with several
// blocks sharing a tile along its features, split_scheduler.cuh), consumer loop (Plain: CUTLASS's; Overlapped:
// overlapped_mainloop.cuh). Tiles of 128 tokens come without a cluster too, for odd numbers of rows.
//
// CMakeLists.txt parses these lines and generates one source for each tile, type and storage; this file,
// sparse_sm90.cuh and sparse_gemm.cpp expand them into enumerators and facts, CUTLASS shapes, and the table of
// instances. To try a tile, add a line here and any cost in config.h; benchmarks/tune.py then times every tile in this
// list.
#pragma once

#include "../nm_act.h"

namespace nm_act {

// clang-format off
#define NM_ACT_TILES(X) \
  X(k128x256x64, Bits16, 128, 256, 64, 2, 1, Cooperative, Overlapped) \
  X(k128x256x64NoCluster, Bits16, 128, 256, 64, 1, 1, Cooperative, Overlapped) \
  X(k256x192x64, Bits16, 256, 192, 64, 2, 1, Cooperative, Plain) \
  X(k256x160x64, Bits16, 256, 160, 64, 1, 2, Cooperative, Overlapped) \
  X(k128x128x64, Bits16, 128, 128, 64, 2, 1, PingPong, Overlapped) \
  X(k128x128x64NoCluster, Bits16, 128, 128, 64, 1, 1, PingPong, Overlapped) \
  X(k128x256x64Split, Bits16, 128, 256, 64, 2, 1, Split, Overlapped) \
  X(k128x256x128E4M3, E4M3, 128, 256, 128, 2, 1, Cooperative, Overlapped) \
  X(k128x256x128E4M3NoCluster, E4M3, 128, 256, 128, 1, 1, Cooperative, Overlapped) \
  X(k256x192x128E4M3, E4M3, 256, 192, 128, 1, 2, Cooperative, Plain) \
  X(k256x160x128E4M3, E4M3, 256, 160, 128, 1, 2, Cooperative, Overlapped) \
  X(k128x256x128E4M3Split, E4M3, 128, 256, 128, 2, 1, Split, Overlapped) \
  X(k128x128x256E4M3, E4M3, 128, 128, 256, 2, 1, PingPong, Overlapped) \
  X(k128x128x256E4M3NoCluster, E4M3, 128, 128, 256, 1, 1, PingPong, Overlapped) \
  X(k64x128x256E4M3, E4M3, 64, 128, 256, 1, 1, PingPong, Overlapped) \
  X(k64x64x256E4M3, E4M3, 64, 64, 256, 1, 1, PingPong, Overlapped)
// clang-format on

// Tiles, named by tokens x out_features x in_features of a block.
enum class GemmTile : int {
#define NM_ACT_TILE(name, ...) name,
  NM_ACT_TILES(NM_ACT_TILE)
#undef NM_ACT_TILE
};

enum class GemmRaster : int { kHeuristic = 0, kAlongTokens = 1, kAlongOutputs = 2 };

struct GemmConfig {
  GemmTile tile;
  GemmRaster raster;
  int swizzle;      // width of a band of the raster, in tiles: 1, 2, 4 or 8
  int splits;       // blocks that share a tile along its features, or kStreamed; 1 but for tiles of the split schedule
  bool overlapped;  // programmatic dependent launch: starts while the previous kernel ends
  bool paced;       // its blocks are kept in step (paced_mainloop.cuh); only where can_pace
};

// Instead of a number of splits: the features of the tiles in the last, partly empty wave and in the one before it are
// divided evenly among all multiprocessors (stream-K).
inline constexpr int kStreamed = 0;

struct TileFacts {
  GemmTile tile;
  int tokens;
  int out_features;
  int in_features;
  int cluster_tokens;   // tiles along the tokens that share a weight tile
  int cluster_outputs;  // tiles along the outputs that share a values tile
  bool bits8;
  bool split;
  const char* name;
};

inline constexpr bool kIsBits16 = false, kIsE4M3 = true;
inline constexpr bool kIsCooperative = false, kIsPingPong = false, kIsSplit = true;
inline constexpr TileFacts kTiles[] = {
#define NM_ACT_FACTS(name, value, tokens, outputs, features, token_tiles, output_tiles, schedule, loop) \
  {GemmTile::name, tokens, outputs, features, token_tiles, output_tiles, kIs##value, kIs##schedule, #name},
    NM_ACT_TILES(NM_ACT_FACTS)
#undef NM_ACT_FACTS
};

// The tile of full grids; products with another epilogue than a plain layer's are compiled for it alone.
constexpr GemmTile wide_tile(ElementType value_type) {
  return value_type == ElementType::kE4M3 ? GemmTile::k128x256x128E4M3 : GemmTile::k128x256x64;
}

// Whether its kernels can keep their blocks in step. On an H100, other tiles gained nothing
// (docs/kernels/sparse_gemm.md).
constexpr bool can_pace(GemmTile tile) {
  return tile == wide_tile(ElementType::kBFloat16) || tile == wide_tile(ElementType::kE4M3);
}

// Whether the kernel with a residual is compiled for it: in the storages of optimized models, for that tile alone.
constexpr bool compiles_residual(ElementType value_type, ElementType y_type, bool weight_in_out, GemmTile tile) {
  return tile == wide_tile(value_type) &&
         (value_type == ElementType::kE4M3 ? y_type == ElementType::kBFloat16 : weight_in_out);
}

// Whether the epilogue needs only the vectors of ordinary inference: the bias for 16-bit values; row scale, column
// scale and bias for e4m3.
constexpr bool has_plain_epilogue(ElementType value_type, bool shifted, bool scaled) {
  return !shifted && (!scaled || value_type == ElementType::kE4M3);
}

constexpr bool is_clustered(const TileFacts& tile) { return tile.cluster_tokens * tile.cluster_outputs > 1; }

constexpr const TileFacts& facts_of(GemmTile tile) { return kTiles[static_cast<int>(tile)]; }

inline bool is_tile_of(const TileFacts& tile, ElementType value_type) {
  return tile.bits8 == (value_type == ElementType::kE4M3);
}

}  // namespace nm_act
