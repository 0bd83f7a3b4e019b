// Properties of select_config and select_plan (csrc/kernels/matmul/config.h), which need no device: the tile is one of
// the value type's and the one that is estimated to take least, bands pad no grid of clusters and others by at most 5
// %, blocks without a cluster are not overlapped where rows of tiles share weight, and choices that the tuning runs
// settled stay what they were. The times lost against the table: tests/operators/test_gemm_tuning.py. Prints "N checks, 0
// failed"; exits 1 on a mismatch.
#include <cstdio>
#include <initializer_list>

#include "kernels/matmul/config.h"

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;

void check(bool ok, const char* what, const GemmProblem& problem) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: tokens %lld, out_features %lld, in_features %lld, type %d\n", what,
              static_cast<long long>(problem.tokens), static_cast<long long>(problem.out_features),
              static_cast<long long>(problem.in_features), static_cast<int>(problem.value_type));
}

void check_properties(const GemmProblem& problem) {
  const GemmConfig config = select_config(problem);
  const TileFacts& tile = kTiles[static_cast<int>(config.tile)];
  check(tile.tile == config.tile, "facts by number", problem);
  check(takes_part(problem, tile), "a tile that takes part", problem);
  for (const TileFacts& other : kTiles) {
    if (!takes_part(problem, other)) continue;
    const double us = estimate_us(problem, tile, config.splits);
    const auto [fewest, most] = splits_of(problem, other);
    for (int splits = fewest; splits <= most; ++splits) {
      check(us <= estimate_us(problem, other, splits), "least time", problem);
    }
    if (can_stream(problem, other, tiling_of(problem, other).tiles))
      check(us <= estimate_us(problem, other, kStreamed), "least time", problem);
  }
  const bool streamed = config.splits == kStreamed;
  check(streamed ? can_stream(problem, tile, tiling_of(problem, tile).tiles) : config.splits == 1 || tile.split,
        "a tile that is shared", problem);
  check(streamed || config.splits == 1 || config.splits * kSplitFeatures <= problem.in_features, "splits", problem);
  check(config.raster == GemmRaster::kAlongTokens || config.raster == GemmRaster::kAlongOutputs, "raster", problem);
  const bool power = config.swizzle == 1 || config.swizzle == 2 || config.swizzle == 4 || config.swizzle == 8;
  check(power, "swizzle", problem);
  const int64_t token_tiles = (problem.tokens + tile.tokens - 1) / tile.tokens;
  const int64_t output_tiles = (problem.out_features + tile.out_features - 1) / tile.out_features;
  const auto padded = [&](int swizzle) {  // whole bands of whole clusters
    return round_up(token_tiles, static_cast<uint32_t>(swizzle * tile.cluster_tokens)) *
           round_up(output_tiles, static_cast<uint32_t>(swizzle * tile.cluster_outputs));
  };
  const bool within =
      is_clustered(tile) ? padded(config.swizzle) == padded(1) : padded(config.swizzle) * 20 <= padded(1) * 21;
  check(within, "padding of the grid", problem);
  check(config.overlapped == (is_clustered(tile) || token_tiles == 1), "overlap", problem);
  check(!config.paced || (can_pace(config.tile) && config.splits == 1), "blocks in step", problem);
  check(!config.paced || token_tiles * output_tiles >= (kPacedWaves - 1) * problem.multiprocessors,
        "many waves in step", problem);
  check(is_clustered(tile) || tile.tokens < 128 || token_tiles % 2 == 1, "clusters of whole pairs", problem);
}

// A plan leaves nothing out and computes nothing twice, its parts are choices of their own that can be addressed, and
// it is cut where that is estimated to gain.
void check_plan(const GemmProblem& problem) {
  const GemmPlan plan = select_plan(problem);
  if (plan.cut == GemmCut::kNone) return;
  const int64_t rest_size = size_along(problem, plan.cut) - plan.at;
  check(plan.at > 0 && rest_size > 0, "two parts", problem);
  check(plan.at % 64 == 0, "a cut that metadata and outputs can be addressed at", problem);
  const double gain = problem.value_type == ElementType::kE4M3 ? kCutGainE4M3 : kCutGain16;
  check(estimate_us(problem, plan) * gain < least_estimate(problem).us, "a cut that gains", problem);
  const GemmProblem first = problem_of_part(problem, plan.cut, plan.at),
                    second = problem_of_part(problem, plan.cut, rest_size);
  for (const auto& [part, config] : {std::pair{first, plan.first}, std::pair{second, plan.second}}) {
    check(takes_part(part, facts_of(config.tile)), "a tile that takes part", part);
  }
  const GemmConfig rest = select_config(second);
  check(plan.second.tile == rest.tile && plan.second.splits == rest.splits, "the best choice for the rest", problem);
}

void check_choice(int64_t tokens, int64_t out_features, int64_t in_features, ElementType type, GemmTile tile) {
  const GemmProblem problem{tokens, out_features, in_features, type, 132};
  check(select_config(problem).tile == tile, "tile", problem);
}

}  // namespace

int main() {
  for (ElementType type : {ElementType::kBFloat16, ElementType::kFloat16, ElementType::kE4M3}) {
    for (int64_t tokens : {1, 17, 64, 129, 500, 1024, 3000, 4096, 16384, 100000}) {
      for (int64_t out_features : {16, 128, 1000, 4096, 6144, 10240, 28672, 57344}) {
        for (int multiprocessors : {78, 114, 132}) {
          const GemmProblem out_in{tokens, out_features, 4096, type, multiprocessors};
          const GemmProblem in_out{tokens, out_features, 8192, type, multiprocessors, true};
          for (const GemmProblem& problem : {out_in, in_out}) {
            if (problem.weight_in_out && type == ElementType::kE4M3) continue;
            check_properties(problem);
            check_plan(problem);
          }
        }
      }
    }
  }
  const ElementType bf16 = ElementType::kBFloat16, e4m3 = ElementType::kE4M3;
  // 1024 tokens: full waves for the wide tile on 4096 outputs, 1.45 waves on 6144.
  check_choice(1024, 4096, 4096, bf16, GemmTile::k128x256x64);
  check_choice(1024, 6144, 4096, bf16, GemmTile::k256x192x64);
  check_choice(1024, 6144, 4096, e4m3, GemmTile::k256x192x128E4M3);
  check_choice(4096, 4096, 14336, bf16, GemmTile::k128x256x64);
  check_choice(4096, 6144, 4096, bf16, GemmTile::k256x192x64);
  check_choice(4096, 8192, 28672, e4m3, GemmTile::k128x256x128E4M3);
  check_choice(16, 4096, 4096, e4m3, GemmTile::k64x64x256E4M3);
  // An odd number of rows of tiles; one that a pair of 256 rows fits.
  check_choice(640, 6144, 4096, bf16, GemmTile::k128x256x64NoCluster);
  check_choice(2350, 5120, 4096, e4m3, GemmTile::k128x256x128E4M3NoCluster);
  check_choice(1820, 2560, 9728, bf16, GemmTile::k256x160x64);
  const GemmProblem huge{16384, 57344, 8192, bf16, 132, true};
  check(select_config(huge).tile == GemmTile::k256x192x64, "tile of a huge weight stored [in, out]", huge);
  check(select_residual_plan(huge).first.tile == GemmTile::k256x192x64, "the same with a residual", huge);
  for (int64_t tokens : {2048, 2100, 4096, 8300}) {
    const GemmProblem many{tokens, 57344, 8192, bf16, 132, true};
    check(select_config(many).tile == GemmTile::k256x192x64, "tile of a huge weight and many tokens", many);
  }
  for (int64_t tokens : {256, 1024}) {
    const GemmProblem few{tokens, 57344, 8192, bf16, 132, true};
    const GemmTile tile = select_config(few).tile;
    check(tile != GemmTile::k256x192x64 && tile != GemmTile::k128x256x64, "tile of a huge weight and few tokens", few);
  }
  const GemmProblem large{4096, 28672, 8192, bf16, 132, true};
  check(takes_part(large, facts_of(GemmTile::k128x256x64)), "tiles of a large weight stored [in, out]", large);
  const GemmProblem wide{16384, 4096, 4096, bf16, 132}, large_operands{16384, 28672, 4096, bf16, 132};
  check(select_config(wide).swizzle == 8, "swizzle of a large grid", wide);
  check(select_config(large_operands).swizzle == 2, "swizzle of large operands", large_operands);
  // In step where a wave reads much, and waves are many; then bands are wide, along the outputs.
  const GemmProblem deep{4096, 8192, 28672, bf16, 132}, deep8{16384, 8192, 28672, e4m3, 132},
      broad8{16384, 10240, 8192, e4m3, 132}, huge8{16384, 57344, 8192, e4m3, 132};
  for (const GemmProblem& problem : {deep, deep8, broad8, huge8}) {
    const GemmConfig config = select_config(problem);
    check(config.paced && config.swizzle == 8 && config.raster == GemmRaster::kAlongOutputs, "in step", problem);
  }
  const GemmProblem shallow{16384, 28672, 4096, bf16, 132}, brief{1024, 8192, 28672, bf16, 132},
      shallow8{16384, 28672, 4096, e4m3, 132};
  for (const GemmProblem& problem : {shallow, brief, shallow8}) {
    check(!select_config(problem).paced, "not in step", problem);
  }
  const GemmProblem gate_up{4096, 57344, 8192, bf16, 132, true};
  check(gated_config(gate_up).paced, "gate and up in step", gate_up);
  // Huge weights stored [out, in]: not 256x160, nor tiles without a cluster for many tokens.
  for (int64_t tokens : {1024, 2350, 4096, 6656}) {
    for (ElementType type : {bf16, e4m3}) {
      const GemmProblem problem{tokens, 57344, 8192, type, 132};
      const TileFacts& tile = facts_of(select_config(problem).tile);
      check(tile.out_features != 160 && (tokens < 2048 || is_clustered(tile)), "tile of a huge weight", problem);
    }
  }
  // One launch where waves are full, two where one would leave most of its last wave empty.
  const GemmProblem full{4096, 4096, 4096, bf16, 132}, odd{2350, 6144, 4096, bf16, 132},
      narrow{640, 8192, 8192, bf16, 132};
  check(select_plan(full).cut == GemmCut::kNone, "one launch", full);
  check(select_plan(odd).cut == GemmCut::kTokens, "cut along the tokens", odd);
  check(select_plan(narrow).cut == GemmCut::kOutputs, "cut along the outputs", narrow);
  for (int64_t tokens : {1100, 1300, 2000, 2350, 2600, 3300, 4284, 5000, 7000, 8050}) {
    for (int64_t out_features : {2560, 3072, 3584, 5120, 6144, 8192, 27648}) {
      for (ElementType type : {bf16, e4m3}) check_plan({tokens, out_features, 3584, type, 132});
    }
  }
  for (ElementType type : {bf16, e4m3}) {
    for (const GemmProblem& empty : {GemmProblem{0, 4096, 4096, type, 132}, GemmProblem{4096, 0, 4096, type, 132}}) {
      check(select_plan(empty).cut == GemmCut::kNone, "one launch for nothing", empty);
      check(is_tile_of(facts_of(gated_config(empty).tile), type), "a tile for nothing", empty);
    }
  }
  constexpr int64_t kWraps = (int64_t{1} << 32) + 64;  // 64 in 32 bits
  for (ElementType type : {bf16, e4m3}) {
    check(gemm_shape_fits(type, 64, 64, 64, 9), "a shape that fits", {1, 64, 64, type, 132});
    check(!gemm_shape_fits(type, kWraps, 64, 64, 9), "more outputs than are counted", {1, kWraps, 64, type, 132});
    check(!gemm_shape_fits(type, 64, kWraps, kWraps, 9), "more inputs than are counted", {1, 64, kWraps, type, 132});
  }
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
