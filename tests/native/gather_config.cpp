// Properties of select_gather_config (csrc/kernels/gather/config.h), which needs no device: valid on every card, clusters
// on 9.0 alone, no empty slice, one wave and enough blocks for large layers. The times lost against the table:
// tests/operators/test_gather_config.py. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "kernels/gather/config.h"

#include <cstdio>
#include <string>

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;

void check(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

void check_configs() {
  const int shapes[][2] = {{6144, 4096},  {4096, 4096},   {28672, 4096}, {4096, 14336}, {10240, 8192},
                           {8192, 8192},  {57344, 8192},  {8192, 28672}, {16, 32},      {48, 4},
                           {1024, 32768}, {128256, 4096}, {576, 1536}};
  for (const auto& [out, in] : shapes) {
    for (int tokens : {1, 2, 3, 4}) {
      for (ElementType type : {ElementType::kBFloat16, ElementType::kE4M3}) {
        for (const GemmDevice device : {GemmDevice{9, 132}, GemmDevice{8, 108}, GemmDevice{12, 170}}) {
          const GatherProblem problem{tokens, out, in, type, {8, 16, {}}, device};
          const GatherConfig config = select_gather_config(problem);
          const std::string what = std::to_string(tokens) + " x " + std::to_string(out) + " x " + std::to_string(in);
          // Without clusters a block selects from all inputs, which must fit its shared memory.
          if (device.compute_capability_major != 9 && compiled_tokens(tokens) * in > 12000) {
            check(config.splits == 0 || is_valid(problem, config), "a configuration or none for " + what);
            continue;
          }
          check(config.splits > 0 && is_valid(problem, config), "a configuration for " + what);
          if (config.splits == 0) continue;
          check(device.compute_capability_major == 9 || config.splits == 1, "clusters only on 9.0, " + what);
          check((config.splits - 1) * slice_features(in, config.splits) < in, "no empty slice, " + what);
          const int tiles = ceil_div(out, config.lanes * outputs_per_lane(type)), blocks = tiles * config.splits;
          const bool large = double(out) * in >= 4096 * 4096 && device.compute_capability_major == 9;
          if (tokens == 1 && large) check(blocks <= resident_blocks(problem, config), "one wave, " + what);
          if (large && out >= 4096) check(blocks >= 0.7 * device.multiprocessors, "enough blocks, " + what);
        }
      }
    }
  }
  const auto apart = [](int out, int in, const GatherConfig& config) {
    return blocks_fit_apart({1, out, in, ElementType::kBFloat16, {8, 16, {}}, {9, 132}}, config);
  };
  check(apart(28672, 4096, {128, 4, 512, true}), "28 clusters of four on 30 places");
  check(!apart(28672, 4096, {128, 8, 512, true}), "224 blocks on 132 multiprocessors");
  check(apart(4096, 14336, {32, 6, 512, true}), "16 clusters of six on 16 places");
  check(!apart(4096, 14336, {32, 8, 512, true}), "16 clusters of eight on 14 places");
  check(gather_pays(ElementType::kBFloat16, {8, 16, {}}, 4), "four tokens at half");
  check(!gather_pays(ElementType::kBFloat16, {12, 16, {}}, 4), "four tokens at three quarters");
  check(gather_pays(ElementType::kInt8, {12, 16, {}}, 4), "8-bit weights always");
}

// More problems than a thread keeps, twice and in turn, so that entries are replaced and found again.
void check_remembered() {
  const GemmDevice devices[] = {{9, 132}, {9, 114}, {8, 108}};
  for (int round = 0; round < 4; ++round) {
    for (int size = 1; size <= 40; ++size) {
      for (ElementType type : {ElementType::kBFloat16, ElementType::kE4M3}) {
        for (const Pattern& pattern : {Pattern{8, 16, {}}, Pattern{2, 4, {}}, Pattern{2, 4, {1, {}}}}) {
          for (const GemmDevice device : devices) {
            const int tokens = 1 + size % 4, features = round < 2 ? 512 * size : 512 * (size % 3 + 1);
            const GatherProblem problem{tokens, 4096, features, type, pattern, device};
            for (bool in_layer : {false, true}) {
              const GatherConfig found = remembered_gather_config(problem, in_layer);
              const GatherConfig sought =
                  in_layer ? select_gather_config_in_layer(problem) : select_gather_config(problem);
              check(found.lanes == sought.lanes && found.splits == sought.splits && found.threads == sought.threads &&
                        found.ahead == sought.ahead,
                    "what is remembered is what is found, " + std::to_string(features));
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_configs();
  check_remembered();
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
