// The choice of the kernels for a 2:4 GEMM: a pure function of the problem, testable without a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <utility>

#include "tiles.h"

namespace nm_act {

struct GemmProblem {
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;
  ElementType value_type;
  int multiprocessors;
  bool weight_in_out = false;

  bool operator==(const GemmProblem&) const = default;
};

// Costs of a tile in microseconds on an H100 SXM; estimate_us combines them.
struct TileCost {
  double fixed;         // per launch
  double wave_k;        // per wave and 1000 features
  double wave;          // per wave: its start and its end
  double memory_mb;     // per MB of operands and result, each moved once
  double multicast_mb;  // per MB that all blocks together load into shared memory
  double partial_mb;    // per MB of partial sums that blocks which share a tile write and read
};

// Fitted to the least time lost by the chosen configuration over all problems of benchmarks/tune.py's stage "turns" on
// one H100, where a launch in stream order counts as kStreamOrderUs more. tests/operators/test_gemm_tuning.py checks
// the choice against benchmarks/results/h100/gemm_tuning.csv.
inline constexpr TileCost kTileCosts[] = {
    {0.005, 6.207, 4.084, 0.254, 0.025, 0},       // k128x256x64
    {0.005, 5.687, 4.066, 0.113, 0.050, 0},       // k128x256x64NoCluster
    {0.667, 8.855, 5.598, 0.083, 0.066, 0},       // k256x192x64
    {0.350, 7.844, 4.520, 0.238, 0.033, 0},       // k256x160x64
    {8.649, 2.796, 0.825, 0.067, 0.083, 0},       // k128x128x64
    {2.209, 2.340, 1.158, 0.176, 0.072, 0},       // k128x128x64NoCluster
    {16.821, 6.367, 0.770, 0.249, 0.003, 1.111},  // k128x256x64Split
    {2.499, 2.795, 2.861, 0.387, 0.035, 0},       // k128x256x128E4M3
    {1.160, 2.786, 3.121, 0.324, 0.038, 0},       // k128x256x128E4M3NoCluster
    {0.013, 4.469, 4.541, 0.456, 0.031, 0},       // k256x192x128E4M3
    {0.845, 3.552, 4.116, 0.409, 0.042, 0},       // k256x160x128E4M3
    {0, 0, 0, 0, 0, 0},                           // k128x256x128E4M3Split: streamed only, kStreamCostE4M3
    {3.677, 2.880, 0.515, 0.154, 0.050, 0},       // k128x128x256E4M3
    {2.318, 2.217, 1.185, 0.283, 0.023, 0},       // k128x128x256E4M3NoCluster
    {2.949, 1.746, 0.536, 0.203, 0.001, 0},       // k64x128x256E4M3
    {2.120, 1.586, 0.030, 0.254, 0.028, 0},       // k64x64x256E4M3
};
static_assert(std::size(kTileCosts) == std::size(kTiles), "a cost for each tile");

// Streamed tiles: the waves cost what those of the widest tile do, but for what their features take and a constant in
// microseconds for the partial sums.
struct StreamCost {
  double features;
  double fixed;
};
inline constexpr StreamCost kStreamCost16{1.22, 8.7}, kStreamCostE4M3{1.20, 7.9};

// Microseconds that an operator takes longer if its GEMM starts in stream order and not while the kernel before ends: 1
// to 4 up to 640 tokens, about none from 1536 on, where it matters least (200 problems on an H100, in no CSV).
inline constexpr double kStreamOrderUs = 1.5;

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

// Number of tiles if both sides of the grid are rounded up to whole bands, as the scheduler does. A block outside the
// problem costs a full tile (with a band of 8, 1024 tokens took 2.0 to 2.8 times as long).
inline int64_t banded_tiles(const TileGrid& grid, const TileFacts& tile, int swizzle) {
  return round_up(grid.rows, static_cast<uint32_t>(swizzle * tile.cluster_tokens)) *
         round_up(grid.columns, static_cast<uint32_t>(swizzle * tile.cluster_outputs));
}

// Bytes of values and weight that a wave of a tile reads if its blocks lie as close to a square as they can. A token's
// features are half as many values, and one bit each of metadata.
inline double wave_bytes(const GemmProblem& problem, const TileFacts& tile) {
  const double kept = tile.bits8 ? 0.625 : 1.125, weight = tile.bits8 ? 1 : 2;
  return 2 * std::sqrt(problem.multiprocessors * tile.tokens * kept * tile.out_features * weight) *
         static_cast<double>(problem.in_features);
}

// Whether the blocks are kept in step. Over several waves, those of a persistent kernel drift apart, and then read from
// memory again what L2 no longer holds. With bands of 8, they took 0.74 to 1.02 times as long in step where waves read
// more bytes than these, 0.95 times on average; where they read less, 0.95 to 1.04 times, 1.00 on average. On
// one card, 16384 x 57344 x 8192 in e4m3 took 1.11 to 1.20 times as long in step at first, not seen again
// (docs/kernels/sparse_gemm.md).
inline constexpr double kPacedBytes16 = 40e6, kPacedBytesE4M3 = 20e6;
inline constexpr int64_t kPacedWaves = 6;
inline bool is_paced(const GemmProblem& problem, const TileGrid& grid, const TileFacts& tile) {
  return can_pace(tile.tile) && grid.rows * grid.columns >= kPacedWaves * problem.multiprocessors &&
         wave_bytes(problem, tile) > (tile.bits8 ? kPacedBytesE4M3 : kPacedBytes16);
}

// With values and weight of more bytes than this, and blocks that are not kept in step, bands of 8 took up to 1.28
// times as long as bands of 2 on an H100.
inline constexpr double kNarrowBandBytes = 3e8;

// The widest band that pads nothing: with clusters, a padding of 3 to 4 % cost 7 to 9 % on an H100. Without clusters,
// where the number of rows is odd, up to 5 % of padding.
inline int select_swizzle(const GemmProblem& problem, const TileGrid& grid, const TileFacts& tile) {
  const double bytes = (static_cast<double>(problem.tokens) * 0.5625 + static_cast<double>(problem.out_features)) *
                       static_cast<double>(problem.in_features) * (tile.bits8 ? 1 : 2);
  const int widest = is_clustered(tile) && bytes > kNarrowBandBytes && !is_paced(problem, grid, tile) ? 2 : 8;
  const int64_t whole = banded_tiles(grid, tile, 1), most = is_clustered(tile) ? whole : whole * 21 / 20;
  for (int swizzle = widest; swizzle > 1; swizzle /= 2) {
    if (banded_tiles(grid, tile, swizzle) <= most) return swizzle;
  }
  return 1;
}

// Tiles of 256 outputs took 0 to 1 % longer along the tokens where that order reads a sixth less or not even that (the
// stage "turns" of the tuning table, 128x256).
inline constexpr double kAlongTokensReads = 0.85;

// The raster order in which the blocks of a wave share most of their operands in L2. A wave proceeds along one side of
// the grid in a band as wide as the swizzle and reads rows of values and columns of the weight. With the order that
// reads less, and the bands above, 924 pairs of problem and tile took 0.5 % longer on an H100 than with the best order
// and band of each, and 11 % at worst (before the factor below, and before blocks were kept in step).
// Tiles without a cluster share no weight through it, so the rows of a column have to run close together: in one band
// that holds them all, or else along the tokens (the other order took up to 3.3 times as long). With wider bands the
// order along the outputs was up to 2.2 times as fast.
inline GemmRaster select_raster(const GemmProblem& problem, const TileGrid& grid, const TileFacts& tile, int swizzle) {
  if (grid.rows == 0 || grid.columns == 0) return GemmRaster::kAlongTokens;
  if (!is_clustered(tile)) {
    return swizzle >= 4 || grid.rows <= swizzle ? GemmRaster::kAlongOutputs : GemmRaster::kAlongTokens;
  }
  if (tile.cluster_outputs > 1) return GemmRaster::kAlongTokens;  // the other order took up to 1.27 times as long
  if (swizzle == 8 && is_paced(problem, grid, tile)) return GemmRaster::kAlongOutputs;  // 0.3 % faster on average
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
  const double most = tile.out_features == 256 ? kAlongTokensReads : 1;
  return read(column_length, columns) < most * read(rows, row_length) ? GemmRaster::kAlongTokens
                                                                      : GemmRaster::kAlongOutputs;
}

// How a tile covers a problem.
struct Tiling {
  TileGrid grid;
  int swizzle;
  int64_t tiles;  // with those of the bands that lie outside the problem
};

inline Tiling tiling_of(const GemmProblem& problem, const TileFacts& tile) {
  const TileGrid grid = grid_of(problem, tile);
  const int swizzle = select_swizzle(problem, grid, tile);
  return {grid, swizzle, banded_tiles(grid, tile, swizzle)};
}

// Whether the kernel starts while the one before ends. Blocks without a cluster would then begin wherever a
// multiprocessor is free and get out of step: neighbours no longer read the same weight column at the same time (an
// operator took up to 1.65 times as long).
inline bool starts_early(const TileFacts& tile, const TileGrid& grid) { return is_clustered(tile) || grid.rows == 1; }

// The configuration for this problem and tile.
inline GemmConfig configure(const GemmProblem& problem, const TileFacts& tile, int splits = 1) {
  const auto [grid, swizzle, tiles] = tiling_of(problem, tile);
  const GemmRaster raster =
      splits == kStreamed ? GemmRaster::kAlongTokens : select_raster(problem, grid, tile, swizzle);
  return {tile.tile, raster, swizzle, splits, starts_early(tile, grid), is_paced(problem, grid, tile)};
}

// Estimated time of the waves alone.
inline double waves_us(const GemmProblem& problem, const TileFacts& tile, const TileCost& cost, int64_t tiles,
                       int splits) {
  const double wave = cost.wave_k * static_cast<double>(problem.in_features) / 1e3;
  if (splits == kStreamed) {
    const StreamCost& stream = tile.bits8 ? kStreamCostE4M3 : kStreamCost16;
    const double whole = static_cast<double>(std::max<int64_t>(tiles / problem.multiprocessors - 1, 0));
    const double shared = static_cast<double>(tiles) / problem.multiprocessors - whole;
    return whole * (wave + cost.wave) + shared * (wave * stream.features + cost.wave) + stream.fixed;
  }
  const double waves = static_cast<double>((tiles * splits + problem.multiprocessors - 1) / problem.multiprocessors);
  return waves * (wave / splits + cost.wave);
}

// Estimated time: the cube root of the sum of the cubes of the waves' time and the time for memory and L2 traffic. It
// is close to the larger of the two, and above both if they are similar. A block has its multiprocessor to itself, so a
// wave takes the same time however many blocks run in it.
inline double estimate_us(const GemmProblem& problem, const TileFacts& tile, const Tiling& tiling, int splits) {
  const GemmTile costed = splits == kStreamed ? wide_tile(problem.value_type) : tile.tile;
  const TileCost& cost = kTileCosts[static_cast<int>(costed)];
  const int64_t tiles = tiling.tiles;
  const double tokens = static_cast<double>(problem.tokens), outputs = static_cast<double>(problem.out_features),
               features = static_cast<double>(problem.in_features), bytes = tile.bits8 ? 1 : 2;
  const double values = tokens * features * bytes * 0.5625;  // metadata as of 16 bits, near enough for e4m3
  const double moved = (outputs * features * bytes + values + tokens * outputs * 2) / 1e6;
  const double shared =
      static_cast<double>(tiles) * (tile.tokens * 0.5625 + tile.out_features) * features * bytes / 1e6;
  const double traffic = cost.memory_mb * moved + cost.multicast_mb * shared;
  const double work = waves_us(problem, tile, cost, tiles, splits);
  const double partial =
      static_cast<double>(tiles * std::max(splits - 1, 0)) * tile.tokens * tile.out_features * 4 / 1e6;
  return cost.fixed + std::cbrt(work * work * work + traffic * traffic * traffic) + cost.partial_mb * partial +
         (starts_early(tile, tiling.grid) ? 0 : kStreamOrderUs);
}

inline double estimate_us(const GemmProblem& problem, const TileFacts& tile, int splits = 1) {
  return estimate_us(problem, tile, tiling_of(problem, tile), splits);
}

inline constexpr int kMaxSplits = 8;
inline constexpr int64_t kSplitFeatures = 1024;  // the fewest that a block may have

// Whether streaming a tile can pay: its last wave is partly empty, and CUTLASS divides more than eight steps. Below two
// waves it took up to 1.5 times as long as the best other choice, from 12 on it lost 2 % on average, in between it
// gained 4 to 5 % on average where the estimates of that time chose it, and lost 4 % at most; on all problems it would
// lose 3 to 5 %.
inline constexpr int64_t kFewestStreamedWaves = 2, kMostStreamedWaves = 12;
inline bool can_stream(const GemmProblem& problem, const TileFacts& tile, int64_t tiles) {
  return tile.split && problem.in_features > 8 * tile.in_features && tiles % problem.multiprocessors != 0 &&
         tiles > kFewestStreamedWaves * problem.multiprocessors && tiles < kMostStreamedWaves * problem.multiprocessors;
}

// Fewest and most splits of a tile. In e4m3, splits won on 3 of 408 problems, so those tiles are streamed only.
inline std::pair<int, int> splits_of(const GemmProblem& problem, const TileFacts& tile) {
  if (!tile.split) return {1, 1};
  const int64_t most = std::min<int64_t>(kMaxSplits, problem.in_features / kSplitFeatures);
  return {2, tile.bits8 ? 1 : static_cast<int>(most)};
}

// Weights of more features than this, of which one shape was measured, 57344 x 8192 on H100s (half as many made no
// difference). Stored [in, out], 128x256 takes 1.01 to 1.07 times as long as 256x192 from 2048 tokens on, and 256x160
// 1.04 to 1.28 times; with 1024 tokens 256x192 takes 1.09 times as long as 256x160, and 128x256 was slower than both
// before its blocks were kept in step. Stored [out, in], 256x160 takes 0.90 to 1.04 times as long as 128x256 in 16 bits,
// on three cards, and 1.00 to 1.03 times in e4m3; tiles without a cluster 0.90 to 1.14 times.
inline constexpr int64_t kHugeWeight = int64_t{1} << 28;
inline constexpr int64_t kHugeWeightTokens = 2048;
inline bool is_huge(const GemmProblem& problem) { return problem.out_features * problem.in_features > kHugeWeight; }

inline bool suits_huge_weight(const GemmProblem& problem, const TileFacts& tile) {
  const bool many = problem.tokens >= kHugeWeightTokens;
  if (!problem.weight_in_out) return tile.out_features != 160 && (is_clustered(tile) || !many);
  if (many) return tile.tokens == 256 && tile.out_features == 192;
  return tile.tokens != 128 || tile.out_features != 256;
}

// Whether a tile takes part in the choice. Tiles without a cluster do where the number of rows is odd, so that clusters
// would compute one more, and the small ones, which come without; elsewhere they would gain 0.3 % on average, and they
// depend on neighbours that keep in step.
inline bool takes_part(const GemmProblem& problem, const TileFacts& tile) {
  if (!is_tile_of(tile, problem.value_type)) return false;
  if (is_huge(problem) && !suits_huge_weight(problem, tile)) return false;
  return is_clustered(tile) || tile.tokens < 128 || grid_of(problem, tile).rows % 2 != 0;
}

struct GemmEstimate {
  GemmConfig config;
  double us;
};

// The tile, and the number of blocks that share it, with the lowest estimate.
inline GemmEstimate least_estimate(const GemmProblem& problem) {
  const TileFacts* best = nullptr;
  double best_us = 0;
  int best_splits = 1;
  const auto consider = [&](const TileFacts& tile, const Tiling& tiling, int splits) {
    const double us = estimate_us(problem, tile, tiling, splits);
    if (best != nullptr && us >= best_us) return;
    best = &tile, best_us = us, best_splits = splits;
  };
  for (const TileFacts& tile : kTiles) {
    if (!takes_part(problem, tile)) continue;
    const Tiling tiling = tiling_of(problem, tile);
    const auto [fewest, most] = splits_of(problem, tile);
    for (int splits = fewest; splits <= most; ++splits) consider(tile, tiling, splits);
    if (can_stream(problem, tile, tiling.tiles)) consider(tile, tiling, kStreamed);
  }
  return {configure(problem, *best, best_splits), best_us};
}

// The configuration of the product in one launch.
inline GemmConfig select_config(const GemmProblem& problem) { return least_estimate(problem).config; }

// A product in one launch, or cut into two along its tokens or its outputs, one after the other: the first in whole
// waves of one tile, the second in another tile, which would otherwise be a last wave that is partly empty.
enum class GemmCut : int { kNone = 0, kTokens = 1, kOutputs = 2 };

struct GemmPlan {
  GemmConfig first;  // of the whole product if it is not cut
  GemmCut cut = GemmCut::kNone;
  int64_t at = 0;  // the tokens, a multiple of 64, or outputs of the first part
  GemmConfig second{};
};

template <class Sizes>  // a problem, or the parameters of its kernel
int64_t size_along(const Sizes& sizes, GemmCut cut) {
  return cut == GemmCut::kTokens ? sizes.tokens : sizes.out_features;
}

inline GemmProblem problem_of_part(GemmProblem problem, GemmCut cut, int64_t size) {
  (cut == GemmCut::kTokens ? problem.tokens : problem.out_features) = size;
  return problem;
}

inline double estimate_us(const GemmProblem& problem, const GemmConfig& config) {
  return estimate_us(problem, facts_of(config.tile), config.splits);
}

inline double estimate_us(const GemmProblem& problem, const GemmPlan& plan) {
  if (plan.cut == GemmCut::kNone) return estimate_us(problem, plan.first);
  const int64_t rest = size_along(problem, plan.cut) - plan.at;
  return estimate_us(problem_of_part(problem, plan.cut, plan.at), plan.first) +
         estimate_us(problem_of_part(problem, plan.cut, rest), plan.second);
}

// The estimated gain from which a product is cut. Of the cuts in benchmarks/results/h100/gemm_tuning.csv, to which
// costs and limits are fitted, the 62 in bf16 and 20 in e4m3 whose estimates gain as much gained 4.6 and 3.1 % on
// average, and lost 5 and 4 % at worst.
inline constexpr double kCutGain16 = 1.03, kCutGainE4M3 = 1.01;

// The first part takes all whole waves of a tile, or all but one, and the second what remains: estimates find no more
// to gain in other cuts.
inline constexpr int64_t kCutWaves = 2;

inline GemmPlan select_plan(const GemmProblem& problem) {
  const GemmEstimate whole = least_estimate(problem);
  GemmPlan plan{whole.config};
  if (is_huge(problem)) return plan;  // the one cut that was measured gained nothing (1280 tokens in e4m3)
  double best_us = whole.us / (problem.value_type == ElementType::kE4M3 ? kCutGainE4M3 : kCutGain16);
  const auto consider = [&](const TileFacts& tile, GemmCut cut, int64_t at) {
    const int64_t rest = size_along(problem, cut) - at;
    if (at <= 0 || rest <= 0) return;
    const GemmProblem first = problem_of_part(problem, cut, at);
    if (!takes_part(first, tile)) return;
    const GemmEstimate second = least_estimate(problem_of_part(problem, cut, rest));
    const double us = estimate_us(first, tile) + second.us;
    if (us >= best_us) return;
    best_us = us, plan = {configure(first, tile), cut, at, second.config};
  };
  for (const TileFacts& tile : kTiles) {
    if (!is_tile_of(tile, problem.value_type) || tile.split) continue;
    const TileGrid grid = grid_of(problem, tile);
    const int64_t waves = (grid.rows * grid.columns + problem.multiprocessors - 1) / problem.multiprocessors;
    for (int64_t filled = std::max<int64_t>(waves - kCutWaves, 1); filled < waves; ++filled) {
      const int64_t tiles = filled * problem.multiprocessors;
      consider(tile, GemmCut::kTokens, tiles / grid.columns / tile.cluster_tokens * tile.cluster_tokens * tile.tokens);
      consider(tile, GemmCut::kOutputs,
               tiles / grid.rows / tile.cluster_outputs * tile.cluster_outputs * tile.out_features);
    }
  }
  return plan;
}

// A product with a residual: in the widest tile, whose epilogue adds the residual, unless other launches plus one more
// pass over result and residual are estimated to be faster. The pass moves six bytes per output, as fast as the copies
// of benchmarks/results/h100/compress.csv (2.98 TB/s from 1024 tokens on); its launch is assumed to cost what that
// file's shortest compression took (64 x 4096 in 16 bits, 2.0 us).
inline constexpr double kAddUsPerMb = 1 / 2.98, kAddUs = 2.0;
inline GemmPlan select_residual_plan(const GemmProblem& problem) {
  const GemmPlan best = select_plan(problem);
  const TileFacts& wide = facts_of(wide_tile(problem.value_type));
  if (!takes_part(problem, wide)) return best;
  const double moved = static_cast<double>(problem.tokens) * static_cast<double>(problem.out_features) * 6 / 1e6;
  const double apart = estimate_us(problem, best) + kAddUs + kAddUsPerMb * moved;
  return estimate_us(problem, wide) <= apart ? GemmPlan{configure(problem, wide)} : best;
}

// The configuration of a product with the gated activation: gate and up together fill the widest tile's grid.
inline GemmConfig gated_config(const GemmProblem& problem) {
  return configure(problem, facts_of(wide_tile(problem.value_type)));
}

// Whether compression and the sparse GEMM beat pruning and the dense product; from a sweep of 11 token counts over 32
// layer shapes of seven families in bf16 on an H100. Up to 323 tokens, cuBLAS takes fewer or smaller rows than three of
// 128 and is faster on many shapes; at 352, the sparse product won on 17 of 23 shapes (in no CSV). With a weight stored
// [in, out], cuBLAS is slower: from 6144 outputs on, the sparse product is at least as fast from 129 tokens on.
// docs/kernels/sparse_gemm.md says what a choice by estimates would gain.
inline constexpr int64_t kSparseGemmTokens = 337;
inline constexpr int64_t kSparseGemmTokensInOut = 129, kSparseGemmOutputsInOut = 6144;
inline bool sparse_gemm_pays(const GemmProblem& problem) {
  return problem.tokens >= kSparseGemmTokens || (problem.weight_in_out && problem.tokens >= kSparseGemmTokensInOut &&
                                                 problem.out_features >= kSparseGemmOutputsInOut);
}

// Largest number of tokens for which a dense e4m3 product is computed with one scale and scaled by a separate kernel.
// For one to 16 tokens, the four products of a Llama-3-8B layer took 95 to 99 us in this way, and 114 to 121 us with
// row-wise scales (benchmarks/results/h100/few_tokens.csv); more than 16 tokens were not timed in this way.
inline constexpr int64_t kOneScaleTokens = 16;

// Whether 2:4+1 over a lifted weight, which has a quarter more columns, beats pruning and the dense product: from 1024
// tokens on it is 1.09x to 1.16x as fast as the dense product in the mean of eight shapes, and 1.01x at least
// (benchmarks/results/h100/patterns.csv); fewer tokens were not measured.
inline constexpr int64_t kLiftedTokens = 1024;
inline bool lifted_path_pays(const GemmProblem& problem) { return problem.tokens >= kLiftedTokens; }

// Whether a compiled GEMM supports these sizes and this stride (in elements) on this compute capability.
inline bool gemm_shape_fits(ElementType value_type, int64_t out_features, int64_t in_features, int64_t weight_stride,
                            int compute_capability_major) {
  const int bytes = value_type == ElementType::kE4M3 ? 1 : 2;
  if (out_features > kMaxFeatures || in_features > kMaxFeatures) return false;
  if (weight_stride * bytes % 16 != 0 || out_features % (16 / bytes) != 0) return false;
  if (compute_capability_major == 9) return in_features % (32 / bytes) == 0;
  return compute_capability_major >= 8 && value_type != ElementType::kE4M3 && in_features % 32 == 0;
}

}  // namespace nm_act
