// The choice of a tile for a 2:4 GEMM: a pure function of the problem, testable without a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <utility>

#include "../nm_act.h"
#include "tiles.h"

namespace nm_act {

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
  bool overlapped;  // the launch may overlap the end of the previous kernel
};

struct GemmProblem {
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;
  ElementType value_type;
  int multiprocessors;
};

// Costs of a tile in microseconds on an H100 SXM; estimate_us combines them.
struct TileCost {
  double fixed;         // per launch
  double wave_k;        // per wave and 1000 features
  double wave;          // per wave: its start and its end
  double memory_mb;     // per MB of operands and result, each moved once
  double multicast_mb;  // per MB that all blocks together load into shared memory
};

struct TileFacts {
  GemmTile tile;
  int tokens;
  int out_features;
  int in_features;
  int cluster_tokens;   // tiles along the tokens that share a weight tile
  int cluster_outputs;  // tiles along the outputs that share a values tile
  bool bits8;
  const char* name;
};

inline constexpr bool kIsBits16 = false, kIsE4M3 = true;
inline constexpr TileFacts kTiles[] = {
#define NM_ACT_FACTS(name, value, tokens, outputs, features, token_tiles, output_tiles, ...) \
  {GemmTile::name, tokens, outputs, features, token_tiles, output_tiles, kIs##value, #name},
    NM_ACT_TILES(NM_ACT_FACTS)
#undef NM_ACT_FACTS
};

// Fitted to benchmarks/results/h100/gemm_tuning.csv in two steps: to each tile's times, and from there to the least
// time lost by the chosen tile (mean and mean square) over all problems of the table (bf16: from 323 tokens on). A wave
// of 256x192x64 is then counted as 10 % longer, which improves the choice further. tests/operators/test_gemm_tuning.py
// checks the choice against the table.
inline constexpr TileCost kTileCosts[] = {
    {1.981, 6.904, 1.181, 0.086, 0.048},   // k128x256x64
    {0.277, 10.220, 2.219, 0.092, 0.066},  // k256x192x64
    {2.022, 4.363, 0.076, 0.318, 0.040},   // k128x128x64
    {2.160, 2.797, 3.537, 0.367, 0.003},   // k128x256x128E4M3
    {0.264, 4.130, 4.966, 0.434, 0.008},   // k256x192x128E4M3
    {5.089, 1.826, 0.381, 0.179, 0.055},   // k128x128x256E4M3
    {4.657, 1.170, 1.124, 0.396, 0.009},   // k64x128x256E4M3
    {3.086, 0.930, 1.320, 0.342, 0.007},   // k64x64x256E4M3
};
static_assert(std::size(kTileCosts) == std::size(kTiles), "a cost for each tile");

struct TileGrid {
  int64_t rows, columns;  // in tiles, rounded up to whole clusters
};

inline TileGrid grid_of(const GemmProblem& problem, const TileFacts& tile) {
  const auto tiles = [](int64_t size, int tile_size, int cluster) {
    return round_up((size + tile_size - 1) / tile_size, static_cast<uint32_t>(cluster));
  };
  return {tiles(problem.tokens, tile.tokens, tile.cluster_tokens),
          tiles(problem.out_features, tile.out_features, tile.cluster_outputs)};
}

// The widest band that pads the grid by at most 5 %. The scheduler rounds both sides of the grid up to whole bands, and
// a block outside the problem costs a full tile (with a band of 8, 1024 tokens took 2.0 to 2.8 times as long). The
// padding is computed for a cluster of two along the tokens whatever the tile's cluster is, as when the table was
// measured.
inline int select_swizzle(const TileGrid& grid) {
  const auto padded = [&](int64_t swizzle) {
    return round_up(grid.rows, static_cast<uint32_t>(swizzle * 2)) *
           round_up(grid.columns, static_cast<uint32_t>(swizzle));
  };
  for (int swizzle = 8; swizzle > 1; swizzle /= 2) {
    if (padded(swizzle) * 20 <= padded(1) * 21) return swizzle;
  }
  return 1;
}

// The raster order in which the blocks of a wave share most of their operands in L2. A wave proceeds along one side of
// the grid in a band as wide as the swizzle and reads rows of values and columns of the weight. With bands of 8 the two
// orders differ little. Tiles of 64 and of 256 tokens are faster along the tokens almost everywhere.
inline GemmRaster select_raster(const GemmProblem& problem, const TileGrid& grid, const TileFacts& tile, int swizzle) {
  if (swizzle >= 8) return GemmRaster::kAlongOutputs;
  if (tile.tokens != 128) return GemmRaster::kAlongTokens;
  const auto bands = [&](int64_t across, int64_t length, int64_t whole, int64_t band) {
    // The width of the bands that a wave covers, and the number of tiles along them.
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

// The configuration for this problem and tile. Blocks without a cluster get out of step when they start while another
// kernel ends, and then read a weight column once per row of tiles (up to 1.5 times as long).
inline GemmConfig configure(const GemmProblem& problem, const TileFacts& tile) {
  const TileGrid grid = grid_of(problem, tile);
  const int swizzle = select_swizzle(grid);
  const bool clustered = tile.cluster_tokens * tile.cluster_outputs > 1;
  return {tile.tile, select_raster(problem, grid, tile, swizzle), swizzle, clustered || grid.rows == 1};
}

// Estimated time: the cube root of the sum of the cubes of the waves' time and the time for memory and L2 traffic,
// which is close to the larger of the two, and above both where they are close. A block has its multiprocessor to
// itself, so a wave takes the same time however many blocks run in it.
inline double estimate_us(const GemmProblem& problem, const TileFacts& tile) {
  const TileCost& cost = kTileCosts[static_cast<int>(tile.tile)];
  const TileGrid grid = grid_of(problem, tile);
  const int64_t tiles = grid.rows * grid.columns;
  const double waves = static_cast<double>((tiles + problem.multiprocessors - 1) / problem.multiprocessors);
  const double tokens = static_cast<double>(problem.tokens), outputs = static_cast<double>(problem.out_features),
               features = static_cast<double>(problem.in_features), bytes = tile.bits8 ? 1 : 2;
  const double values = tokens * features * bytes * 0.5625;  // one half survives, and metadata is one sixteenth
  const double moved = (outputs * features * bytes + values + tokens * outputs * 2) / 1e6;
  const double shared =
      static_cast<double>(tiles) * (tile.tokens * 0.5625 + tile.out_features) * features * bytes / 1e6;
  const double work = waves * (cost.wave_k * features / 1e3 + cost.wave);
  const double traffic = cost.memory_mb * moved + cost.multicast_mb * shared;
  return cost.fixed + std::cbrt(work * work * work + traffic * traffic * traffic);
}

inline bool is_tile_of(const TileFacts& tile, ElementType value_type) {
  return tile.bits8 == (value_type == ElementType::kE4M3);
}

// The tile with the lowest estimate.
inline GemmConfig select_config(const GemmProblem& problem) {
  const TileFacts* best = nullptr;
  for (const TileFacts& tile : kTiles) {
    if (!is_tile_of(tile, problem.value_type)) continue;
    if (best == nullptr || estimate_us(problem, tile) < estimate_us(problem, *best)) best = &tile;
  }
  return configure(problem, *best);
}

// Whether compression and the sparse GEMM beat pruning and the dense product. From a sweep of 64 to 768 tokens over the
// eight Llama-3 shapes in bf16 (H200, November 2026): at 512 tokens all eight win, at 384 four, at 192 and 256 a few.
inline constexpr int64_t kSparseGemmTokens = 512;
inline bool sparse_gemm_pays(const GemmProblem& problem) { return problem.tokens >= kSparseGemmTokens; }

// Whether lifting to `lifted_features` columns beats pruning and the dense product. By estimate from the GEMM's speed
// over cuBLAS (1.3x to 1.6x in bf16), not measured: a quarter more columns leave a gain, half more none.
inline constexpr int64_t kLiftedTokens = 1024;
inline constexpr int64_t kLiftedPercent = 25;
inline bool lifted_path_pays(const GemmProblem& problem, int64_t lifted_features) {
  return problem.tokens >= kLiftedTokens && lifted_features * 100 <= problem.in_features * (100 + kLiftedPercent);
}

// Whether a compiled GEMM supports these sizes and this stride (in elements) on this compute capability.
inline bool gemm_shape_fits(ElementType value_type, int64_t out_features, int64_t in_features, int64_t weight_stride,
                            int compute_capability_major) {
  const int bytes = value_type == ElementType::kE4M3 ? 1 : 2;
  if (weight_stride * bytes % 16 != 0 || out_features % (16 / bytes) != 0) return false;
  if (compute_capability_major == 9) return in_features % (32 / bytes) == 0;
  return compute_capability_major >= 8 && value_type != ElementType::kE4M3 && in_features % 32 == 0;
}

}  // namespace nm_act
