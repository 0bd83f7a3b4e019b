// Which tile a 2:4 GEMM runs with: a pure function of the problem, testable without a device.
#pragma once

#include <cstdint>
#include <iterator>

#include "../nm_act.h"
#ifdef NM_ACT_TUNING_TILES
#include "tuning_tiles.h"
#endif

namespace nm_act {

// How the main loop and the scheduler run. Overlapped: overlapped_mainloop.cuh. StreamK: blocks share tiles along the
// features where waves are not full.
enum class GemmVariant { kPlain, kOverlapped, kStepped, kStreamK, kOverlappedStreamK };

// Tokens x out_features x in_features of a block's tile.
enum class GemmTile : int {
  k256x128x128 = 0,          // cooperative, cluster 2x1
  k128x128x128 = 1,          // cooperative, cluster 2x1
  k128x256x128 = 2,          // cooperative, cluster 2x1; e4m3: fast accumulation
  k128x128x256PingPong = 3,  // ping-pong, cluster 2x1; e4m3: fast accumulation
#ifdef NM_ACT_TUNING_TILES
#define NM_ACT_TILE(name, ...) name,
  NM_ACT_CANDIDATES(NM_ACT_TILE)
#undef NM_ACT_TILE
#endif
};

enum class GemmRaster : int { kHeuristic = 0, kAlongTokens = 1, kAlongOutputs = 2 };

struct GemmConfig {
  GemmTile tile;
  GemmRaster raster;
  int swizzle;  // tiles a band of the raster is wide: 1, 2, 4, 8
};

struct GemmProblem {
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;
  ElementType value_type;
  int multiprocessors;
};

struct TileFacts {
  GemmTile tile;
  int tokens;
  int out_features;
  int in_features;
  double rate;  // speed of a full wave relative to the best tile of the type
  GemmRaster raster;
};

inline constexpr int kClusterTokens = 2;  // tiles along the tokens that share a weight tile

// Measured on an H200 (CUDA 13.0, November 2026; 8 Llama-3 shapes x 1024, 4096, 16384 tokens, random normal data,
// medians of both rasters and four swizzles, against each other): the second tile is 8 to 15 % slower in bf16 and 10 to
// 25 % in e4m3 where waves are full, and wins up to 16 % where they are not. Rasters: the one given is within 3 % of
// the best, the other up to 12 % off.
inline constexpr TileFacts kBits16Tiles[] = {{GemmTile::k256x128x128, 256, 128, 128, 1.0, GemmRaster::kAlongOutputs},
                                             {GemmTile::k128x128x128, 128, 128, 128, 0.87, GemmRaster::kAlongTokens}};
inline constexpr TileFacts kE4M3Tiles[] = {
    {GemmTile::k128x256x128, 128, 256, 128, 1.0, GemmRaster::kAlongOutputs},
    {GemmTile::k128x128x256PingPong, 128, 128, 256, 0.83, GemmRaster::kAlongTokens}};

#ifdef NM_ACT_TUNING_TILES
struct CandidateFacts {
  TileFacts facts;
  ElementType value_type;
  const char* name;
};

inline constexpr CandidateFacts kCandidates[] = {
#define NM_ACT_FACTS(name, value, tokens, outputs, features, ...) \
  {{GemmTile::name, tokens, outputs, features, 1.0, GemmRaster::kAlongOutputs}, ElementType::value, #name},
    NM_ACT_CANDIDATES(NM_ACT_FACTS)
#undef NM_ACT_FACTS
};
#endif

// The widest band that pads the grid by at most 5 %: the scheduler rounds both sides of the grid up to whole bands, and
// blocks beyond the problem cost a full tile (a band of 8 at 1024 tokens took 2.0 to 2.8 times the time).
inline int select_swizzle(int64_t token_tiles, int64_t output_tiles) {
  const auto padded = [&](int64_t swizzle) {
    return round_up(token_tiles, static_cast<uint32_t>(swizzle * kClusterTokens)) *
           round_up(output_tiles, static_cast<uint32_t>(swizzle));
  };
  for (int swizzle = 8; swizzle > 1; swizzle /= 2) {
    if (padded(swizzle) * 20 <= padded(1) * 21) return swizzle;
  }
  return 1;
}

struct TileRange {
  const TileFacts* first;
  const TileFacts* last;
  const TileFacts* begin() const { return first; }
  const TileFacts* end() const { return last; }
};

inline TileRange tiles_of(ElementType value_type) {
  return value_type == ElementType::kE4M3 ? TileRange{std::begin(kE4M3Tiles), std::end(kE4M3Tiles)}
                                          : TileRange{std::begin(kBits16Tiles), std::end(kBits16Tiles)};
}

// The metadata layout that a tile reads: T = min(TileK, 128) in 16 bits.
inline MetadataLayout metadata_layout_of(ElementType value_type, GemmTile tile) {
  if (value_type == ElementType::kE4M3) return MetadataLayout::kSm90Bits8;
#ifdef NM_ACT_TUNING_TILES
  for (const CandidateFacts& candidate : kCandidates) {
    if (candidate.facts.tile == tile && candidate.facts.in_features < 128) return MetadataLayout::kSm90Bits16T64;
  }
#else
  static_cast<void>(tile);
#endif
  return MetadataLayout::kSm90Bits16T128;
}

// How this problem runs with this tile.
inline GemmConfig configure(const GemmProblem& problem, const TileFacts& tile) {
  const int64_t token_tiles = (problem.tokens + tile.tokens - 1) / tile.tokens;
  const int64_t output_tiles = (problem.out_features + tile.out_features - 1) / tile.out_features;
  return {tile.tile, tile.raster, select_swizzle(token_tiles, output_tiles)};
}

// The tile whose waves cost least. A block has its multiprocessor to itself, so a wave costs the tile's area over its
// rate however many blocks run in it.
inline GemmConfig select_config(const GemmProblem& problem) {
  const TileFacts* best = nullptr;
  double best_cost = 0;
  for (const TileFacts& tile : tiles_of(problem.value_type)) {
    const int64_t token_tiles = (problem.tokens + tile.tokens - 1) / tile.tokens;
    const int64_t output_tiles = (problem.out_features + tile.out_features - 1) / tile.out_features;
    const int64_t tiles = round_up(token_tiles, kClusterTokens) * output_tiles;
    const int64_t waves = (tiles + problem.multiprocessors - 1) / problem.multiprocessors;
    const double cost = static_cast<double>(waves * tile.tokens * tile.out_features) / tile.rate;
    if (best == nullptr || cost < best_cost) {
      best = &tile;
      best_cost = cost;
    }
  }
  return configure(problem, *best);
}

// Whether compression plus sparse GEMM beats pruning and the dense product. From a sweep of 64 to 768 tokens over the
// eight Llama-3 shapes in bf16 (H200, November 2026): at 512 all eight win, at 384 four do, at 192 and 256 some.
inline constexpr int64_t kSparseGemmTokens = 512;
inline bool sparse_gemm_pays(const GemmProblem& problem) { return problem.tokens >= kSparseGemmTokens; }

// Whether lifting to `lifted_features` columns beats pruning and the dense product. By estimate from the GEMM's speed
// over cuBLAS (1.3x to 1.6x in bf16), not measured: a quarter more columns leave a gain, half more none.
inline constexpr int64_t kLiftedTokens = 1024;
inline constexpr int64_t kLiftedPercent = 25;
inline bool lifted_path_pays(const GemmProblem& problem, int64_t lifted_features) {
  return problem.tokens >= kLiftedTokens && lifted_features * 100 <= problem.in_features * (100 + kLiftedPercent);
}

// Sizes and strides (in elements) that a compiled GEMM takes on this compute capability.
inline bool gemm_shape_fits(ElementType value_type, int64_t out_features, int64_t in_features, int64_t weight_stride,
                            int compute_capability_major) {
  const int bytes = value_type == ElementType::kE4M3 ? 1 : 2;
  if (weight_stride * bytes % 16 != 0 || out_features % (16 / bytes) != 0) return false;
  if (compute_capability_major == 9) return in_features % (32 / bytes) == 0;
  return compute_capability_major >= 8 && value_type != ElementType::kE4M3 && in_features % 32 == 0;
}

}  // namespace nm_act
