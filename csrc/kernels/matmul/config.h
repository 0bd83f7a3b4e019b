// Which tile a 2:4 GEMM runs with: a pure function of the problem, testable without a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <utility>

#include "../nm_act.h"
#include "tiles.h"

namespace nm_act {

// Tokens x out_features x in_features of a block's tile.
enum class GemmTile : int {
#define NM_ACT_TILE(name, ...) name,
  NM_ACT_TILES(NM_ACT_TILE)
#undef NM_ACT_TILE
};

enum class GemmRaster : int { kHeuristic = 0, kAlongTokens = 1, kAlongOutputs = 2 };

struct GemmConfig {
  GemmTile tile;
  GemmRaster raster;
  int swizzle;      // tiles a band of the raster is wide: 1, 2, 4, 8
  int splits;       // blocks that share a tile along its features; 1 but for tiles of the split schedule
  bool overlapped;  // programmatic dependent launch: starts while the kernel before ends
};

struct GemmProblem {
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;
  ElementType value_type;
  int multiprocessors;
};

// What a tile costs, in microseconds, on an H100 SXM; see estimate_us.
struct TileCost {
  double fixed;         // a launch
  double wave_k;        // a wave, for every 1000 features
  double wave;          // a wave, its beginning and its end
  double memory_mb;     // a MB of operands and result that memory moves at least once
  double multicast_mb;  // a MB that all blocks together bring into shared memory
  double partial_mb;    // a MB of partial sums that blocks which share a tile write and read
};

struct TileFacts {
  GemmTile tile;
  int tokens;
  int out_features;
  int in_features;
  int cluster_tokens;  // tiles along the tokens that share a weight tile
  int cluster_outputs;
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

// Fitted to a run of benchmarks/tune.py: first each tile's times, then, from there, the time lost by the tile that the
// costs choose, over every problem of the run (bf16: from 323 tokens on). tests/operators/test_gemm_tuning.py holds the
// choice to benchmarks/results/h100/gemm_tuning.csv.
inline constexpr TileCost kTileCosts[] = {
    {0.000, 5.960, 4.121, 0.234, 0.034, 0},      // k128x256x64
    {1.192, 9.108, 4.429, 0.113, 0.064, 0},      // k256x192x64
    {3.863, 3.024, 1.202, 0.112, 0.076, 0},      // k128x128x64
    {9.187, 6.622, 0.827, 0.362, 0.000, 0.560},  // k128x256x64Split
    {1.544, 3.076, 3.961, 0.311, 0.028, 0},      // k128x256x128E4M3
    {0.000, 4.699, 4.617, 0.355, 0.037, 0},      // k256x192x128E4M3
    {4.105, 1.821, 0.565, 0.160, 0.057, 0},      // k128x128x256E4M3
    {3.532, 1.504, 0.840, 0.340, 0.000, 0},      // k64x128x256E4M3
    {3.356, 0.953, 0.031, 0.342, 0.000, 0},      // k64x64x256E4M3
};
static_assert(std::size(kTileCosts) == std::size(kTiles), "a cost for each tile");

constexpr const TileFacts& facts_of(GemmTile tile) { return kTiles[static_cast<int>(tile)]; }

struct TileGrid {
  int64_t rows, columns;  // in tiles, whole clusters
};

inline TileGrid grid_of(const GemmProblem& problem, const TileFacts& tile) {
  const auto tiles = [](int64_t size, int tile_size, int cluster) {
    return round_up((size + tile_size - 1) / tile_size, static_cast<uint32_t>(cluster));
  };
  return {tiles(problem.tokens, tile.tokens, tile.cluster_tokens),
          tiles(problem.out_features, tile.out_features, tile.cluster_outputs)};
}

// Tiles of the grid with both sides rounded up to whole bands, as the scheduler does; blocks beyond the problem cost a
// full tile (a band of 8 at 1024 tokens took 2.0 to 2.8 times the time).
inline int64_t banded_tiles(const TileGrid& grid, const TileFacts& tile, int swizzle) {
  return round_up(grid.rows, static_cast<uint32_t>(swizzle * tile.cluster_tokens)) *
         round_up(grid.columns, static_cast<uint32_t>(swizzle * tile.cluster_outputs));
}

// The widest band that pads the grid by at most 5 %.
inline int select_swizzle(const TileGrid& grid, const TileFacts& tile) {
  const int64_t whole = banded_tiles(grid, tile, 1);
  for (int swizzle = 8; swizzle > 1; swizzle /= 2) {
    if (banded_tiles(grid, tile, swizzle) * 20 <= whole * 21) return swizzle;
  }
  return 1;
}

// The order of the tiles that lets the blocks of a wave share most of their operands in L2: a wave runs along one side
// of the grid in a band as wide as the swizzle, and what it reads is rows of values and columns of weight. Bands of 8
// differ little between the two. Tiles of 64 tokens share no weight through a cluster, so a column's rows have to run
// close together: in one band where it holds them all, or else along the tokens (the other order took up to 3.3 times as
// long); wide bands do either way, and are up to 1.9 times as fast along the outputs.
inline GemmRaster select_raster(const GemmProblem& problem, const TileGrid& grid, const TileFacts& tile, int swizzle) {
  if (swizzle >= 8) return GemmRaster::kAlongOutputs;
  if (tile.tokens == 64) {
    return swizzle >= 4 || grid.rows <= swizzle ? GemmRaster::kAlongOutputs : GemmRaster::kAlongTokens;
  }
  const auto bands = [&](int64_t across, int64_t length, int64_t whole, int64_t band) {
    // Tiles along the band, and the width of the bands that a wave covers.
    const int64_t blocks = problem.multiprocessors;
    const int64_t width = std::min(across, band), along = std::min(length, (blocks + width - 1) / width);
    const int64_t needed = along == length
                               ? std::min(across, round_up((blocks + along - 1) / along, static_cast<uint32_t>(whole)))
                               : width;
    return std::pair<int64_t, int64_t>{needed, along};
  };
  const auto read = [&](int64_t rows, int64_t columns) {
    return static_cast<double>(rows * tile.tokens) * 0.5625 + static_cast<double>(columns * tile.out_features);
  };
  const int64_t row_band = int64_t{swizzle} * tile.cluster_tokens,
                column_band = int64_t{swizzle} * tile.cluster_outputs;
  const auto [rows, row_length] = bands(grid.rows, grid.columns, row_band, row_band);
  const auto [columns, column_length] = bands(grid.columns, grid.rows, column_band, column_band);
  return read(column_length, columns) < read(rows, row_length) ? GemmRaster::kAlongTokens : GemmRaster::kAlongOutputs;
}

// How this problem runs with this tile. Blocks without a cluster lose step with one another when they start while
// another kernel ends, and then read a weight column once for each row of tiles (up to 1.5 times the time).
inline GemmConfig configure(const GemmProblem& problem, const TileFacts& tile, int splits = 1) {
  const TileGrid grid = grid_of(problem, tile);
  const int swizzle = select_swizzle(grid, tile);
  const bool clustered = tile.cluster_tokens * tile.cluster_outputs > 1;
  return {tile.tile, select_raster(problem, grid, tile, swizzle), swizzle, splits, clustered || grid.rows == 1};
}

// Waves of tiles on one side, memory and L2 on the other, added by their cubes: whichever is larger, and more where
// both are close. A block has its multiprocessor to itself, so a wave takes the same however many blocks run in it.
inline double estimate_us(const GemmProblem& problem, const TileFacts& tile, int splits = 1) {
  const TileCost& cost = kTileCosts[static_cast<int>(tile.tile)];
  const TileGrid grid = grid_of(problem, tile);
  const int64_t tiles = banded_tiles(grid, tile, select_swizzle(grid, tile));
  const double waves = static_cast<double>((tiles * splits + problem.multiprocessors - 1) / problem.multiprocessors);
  const double tokens = static_cast<double>(problem.tokens), outputs = static_cast<double>(problem.out_features),
               features = static_cast<double>(problem.in_features), bytes = tile.bits8 ? 1 : 2;
  const double values = tokens * features * bytes * 0.5625;  // half of them, and metadata
  const double moved = (outputs * features * bytes + values + tokens * outputs * 2) / 1e6;
  const double shared =
      static_cast<double>(tiles) * (tile.tokens * 0.5625 + tile.out_features) * features * bytes / 1e6;
  const double work = waves * (cost.wave_k * features / splits / 1e3 + cost.wave);
  const double traffic = cost.memory_mb * moved + cost.multicast_mb * shared;
  const double partial = static_cast<double>(tiles * (splits - 1)) * tile.tokens * tile.out_features * 4 / 1e6;
  return cost.fixed + std::cbrt(work * work * work + traffic * traffic * traffic) + cost.partial_mb * partial;
}

inline bool is_tile_of(const TileFacts& tile, ElementType value_type) {
  return tile.bits8 == (value_type == ElementType::kE4M3);
}

inline constexpr int kMaxSplits = 8;
inline constexpr int64_t kSplitFeatures = 1024;  // a block's at least

// The tile, and the number of blocks that share one, that are estimated to take least.
inline GemmConfig select_config(const GemmProblem& problem) {
  const TileFacts* best = nullptr;
  double best_us = 0;
  int best_splits = 1;
  for (const TileFacts& tile : kTiles) {
    if (!is_tile_of(tile, problem.value_type)) continue;
    const int most =
        tile.split ? static_cast<int>(std::min<int64_t>(kMaxSplits, problem.in_features / kSplitFeatures)) : 1;
    for (int splits = tile.split ? 2 : 1; splits <= most; ++splits) {
      const double us = estimate_us(problem, tile, splits);
      if (best != nullptr && us >= best_us) continue;
      best = &tile, best_us = us, best_splits = splits;
    }
  }
  return configure(problem, *best, best_splits);
}

// Whether compression plus sparse GEMM beats pruning and the dense product, from a sweep of 11 token counts over 32
// layer shapes of seven families in bf16 on an H100. Up to 384 tokens cuBLAS has a row of 128 tokens less than the sparse
// tiles, whose clusters take an even number, and is ahead on most shapes; from 385 on both have four rows. Over a weight
// stored [in, out] cuBLAS is slower, and from 6144 outputs on the sparse product is as fast or faster from 129 tokens
// on. docs/kernels/sparse_gemm.md has what a choice by estimates would win.
inline constexpr int64_t kSparseGemmTokens = 385;
inline constexpr int64_t kSparseGemmTokensInOut = 129, kSparseGemmOutputsInOut = 6144;
inline bool sparse_gemm_pays(const GemmProblem& problem, bool weight_in_out) {
  return problem.tokens >= kSparseGemmTokens ||
         (weight_in_out && problem.tokens >= kSparseGemmTokensInOut && problem.out_features >= kSparseGemmOutputsInOut);
}

// Whether 2:4+1 over a lifted weight, a quarter more columns, beats pruning and the dense product. By estimate from the
// GEMM's speed over cuBLAS (1.3x to 1.6x in bf16), not measured.
inline constexpr int64_t kLiftedTokens = 1024;
inline bool lifted_path_pays(const GemmProblem& problem) { return problem.tokens >= kLiftedTokens; }

// Sizes and strides (in elements) that a compiled GEMM takes on this compute capability.
inline bool gemm_shape_fits(ElementType value_type, int64_t out_features, int64_t in_features, int64_t weight_stride,
                            int compute_capability_major) {
  const int bytes = value_type == ElementType::kE4M3 ? 1 : 2;
  if (weight_stride * bytes % 16 != 0 || out_features % (16 / bytes) != 0) return false;
  if (compute_capability_major == 9) return in_features % (32 / bytes) == 0;
  return compute_capability_major >= 8 && value_type != ElementType::kE4M3 && in_features % 32 == 0;
}

}  // namespace nm_act
