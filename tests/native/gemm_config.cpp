// Properties of select_config (csrc/kernels/matmul/config.h), which needs no device: the tile is one of the value
// type's, bands pad the grid by at most 5 %, and the choices that the tuning runs on an H200 settled stay what they
// were. Prints "N checks, 0 failed"; exits 1 on a mismatch.
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
  const TileFacts* tile = nullptr;
  for (const TileFacts& candidate : tiles_of(problem.value_type)) {
    if (candidate.tile == config.tile) tile = &candidate;
  }
  check(tile != nullptr, "tile of the type", problem);
  if (tile == nullptr) return;
  check(config.raster == tile->raster, "raster", problem);
  const bool power = config.swizzle == 1 || config.swizzle == 2 || config.swizzle == 4 || config.swizzle == 8;
  check(power, "swizzle", problem);
  const int64_t token_tiles = (problem.tokens + tile->tokens - 1) / tile->tokens;
  const int64_t output_tiles = (problem.out_features + tile->out_features - 1) / tile->out_features;
  const int64_t plain = round_up(token_tiles, kClusterTokens) * output_tiles;
  const int64_t padded = round_up(token_tiles, static_cast<uint32_t>(kClusterTokens * config.swizzle)) *
                         round_up(output_tiles, static_cast<uint32_t>(config.swizzle));
  check(padded * 20 <= plain * 21, "padding of the grid", problem);
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
          check_properties({tokens, out_features, 4096, type, multiprocessors});
        }
      }
    }
  }
  const ElementType bf16 = ElementType::kBFloat16, e4m3 = ElementType::kE4M3;
  // 1024 tokens: full waves for the large tile on 4096 outputs, 1.45 waves on 6144.
  check_choice(1024, 4096, 4096, bf16, GemmTile::k256x128x128);
  check_choice(1024, 6144, 4096, bf16, GemmTile::k128x128x128);
  check_choice(1024, 6144, 4096, e4m3, GemmTile::k128x128x256PingPong);
  check_choice(4096, 4096, 14336, bf16, GemmTile::k256x128x128);
  check_choice(16384, 28672, 4096, bf16, GemmTile::k256x128x128);
  check_choice(16384, 28672, 4096, e4m3, GemmTile::k128x256x128);
  const GemmProblem wide{16384, 28672, 4096, bf16, 132};
  check(select_config(wide).swizzle == 8, "swizzle of a large grid", wide);
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
