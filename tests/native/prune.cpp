// launch_prune (any N:M, 2:4+1, 2:4+2), launch_token_shift and launch_variance_ratio with their kernels' own source,
// run on the host (emulate_cuda.h), against the plain contract. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernels.
#include "kernels/prune/prune.cu"
#include "kernels/prune/token_statistics.cu"
#include "operands.h"

namespace {

using namespace operands;

constexpr ElementType kTypes[] = {kBf16, kFp16, kFp32};

struct Options {
  bool channel_scale, shift, eta;
};

struct Memory {
  int gap, offset, out_offset, channel_offset;  // elements
};
constexpr Memory kAligned{8, 0, 0, 0};
constexpr Memory kMemories[] = {kAligned, {3, 1, 0, 0}, {0, 2, 0, 0}, {0, 0, 1, 0}, {16, 0, 0, 1}};

std::string describe(int64_t tokens, int in_features, ElementType type, const char* what) {
  return std::to_string(tokens) + " x " + std::to_string(in_features) + ", type " + std::to_string(int(type)) + ", " +
         what;
}

void run_prune(int64_t tokens, int in_features, ElementType type, Pattern pattern, Options options, Memory memory) {
  const int bytes = bytes_of(type);
  Rows x(tokens, in_features, type, memory.gap, memory.offset);
  x.fill(Content::kHard);
  const auto before = x.memory.copy();
  const Channels scale(options.channel_scale, in_features, true, memory.channel_offset),
      shift(options.shift, in_features, false, memory.channel_offset), eta(options.eta, tokens, false, 0);
  const Buffer out(size_t(tokens) * in_features * bytes, memory.out_offset * bytes);
  current = describe(tokens, in_features, type, "prune ") + name_of(pattern) +
            (options.channel_scale ? ", scale" : "") + (options.shift ? ", shift" : "") + (options.eta ? ", eta" : "");
  PruneParams params{};
  params.x = x.memory.data();
  params.x_stride = x.stride;
  params.out = out.data();
  params.channel_scale = scale.pointer();
  params.shift = shift.pointer();
  params.eta = eta.pointer();
  params.tokens = tokens;
  params.in_features = in_features;
  params.pattern = pattern;
  params.x_type = type;
  check(launch_prune(params, nullptr) == cudaSuccess, "launch");

  size_t wrong = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const Token token = token_of(x.row(t), type, params.shift, options.eta ? params.eta + t : nullptr);
    const std::vector<bool> kept = survivors_of(token.z, pattern, params.channel_scale);
    for (int k = 0; k < in_features; ++k) {
      const uint32_t expected = kept[k] ? token.bits[k] : 0;
      if (!same_bits(out.get(t * in_features + k, bytes), expected, type, options.shift || options.eta)) ++wrong;
    }
  }
  check(wrong == 0, std::to_string(wrong) + " of " + std::to_string(tokens * in_features) + " features");
  check(out.guards_are_intact(), "nothing beside the output");
  check(x.memory.copy() == before && x.memory.guards_are_intact(), "x is only read");
}

void run_patterns() {
  const Options options[] = {{false, false, false}, {true, false, false}, {false, true, false},
                             {false, false, true},  {true, true, false},  {true, false, true}};
  const Pattern patterns[] = {{1, 2, {}},  {2, 4, {}},   {1, 4, {}},   {3, 4, {}},   {4, 8, {}},
                              {7, 8, {}},  {8, 16, {}},  {1, 16, {}},  {15, 16, {}}, {16, 32, {}},
                              {1, 32, {}}, {31, 32, {}}, {19, 32, {}}, {5, 8, {}}};
  int step = 0;
  for (const Pattern& pattern : patterns) {
    for (ElementType type : kTypes) {
      for (const Options& option : options) {
        for (int64_t tokens : {1, 17, 33, 129}) {
          ++step;
          const int groups = 1 + static_cast<int>(engine() % (320 / pattern.group));
          run_prune(tokens, groups * pattern.group, type, pattern, option, kMemories[step % 5]);
          if (tokens == 33) run_prune(tokens, 128, type, pattern, option, kAligned);
        }
      }
    }
  }
}

void run_windows() {
  const Options options[] = {
      {false, false, false}, {true, false, false}, {false, true, false}, {false, false, true}, {true, false, true}};
  int step = 0;
  for (int first = 0; first < 4; ++first) {
    for (int second = 0; second < 4; ++second) {
      const Pattern pattern{2, 4, {first == second ? 1 : 2, {first, first == second ? 0 : second}}};
      for (ElementType type : kTypes) {
        for (const Options& option : options) {
          ++step;
          const int tokens[] = {1, 17, 33};
          run_prune(tokens[step % 3], 16 * (1 + step % 19), type, pattern, option, kMemories[step % 5]);
          if (step % 3 == 0) run_prune(18, 272, type, pattern, option, kAligned);
        }
      }
    }
  }
}

void run_token_shift(int64_t tokens, int in_features, ElementType type, TokenShift kind, Memory memory) {
  Rows x(tokens, in_features, type, memory.gap, memory.offset);
  x.fill(Content::kHard);
  const Buffer eta(size_t(tokens) * 4);
  current = describe(tokens, in_features, type, kind == TokenShift::kMean ? "mean" : "median");
  const TokenStatisticsParams params{x.memory.data(), x.stride, tokens, in_features, type};
  check(launch_token_shift(params, kind, eta.data<float>(), nullptr) == cudaSuccess, "launch");
  for (int64_t t = 0; t < tokens; ++t) {
    const Token token = token_of(x.row(t), type, nullptr, nullptr);
    check(is_token_shift(eta.data<float>()[t], kind, token.z), "token " + std::to_string(t));
  }
  check(eta.guards_are_intact() && x.memory.guards_are_intact(), "nothing beside the operands");
}

void run_variance(int64_t tokens, int in_features, ElementType type, Options options, Memory memory, Content content) {
  const int bytes = bytes_of(type);
  Rows x(tokens, in_features, type, memory.gap, memory.offset);
  x.fill(content);
  Rows pruned(tokens, in_features, type, 0, memory.out_offset);
  const Channels shift(options.shift, in_features, false, memory.channel_offset), eta(options.eta, tokens, false, 0);
  const Buffer nu(size_t(tokens) * 4);
  current =
      describe(tokens, in_features, type, "variance") + (options.shift ? ", shift" : "") + (options.eta ? ", eta" : "");
  std::vector<Token> z;
  std::vector<std::vector<bool>> kept;
  for (int64_t t = 0; t < tokens; ++t) {
    z.push_back(token_of(x.row(t), type, shift.pointer(), options.eta ? eta.pointer() + t : nullptr));
    kept.push_back(survivors_of(z[t].z, {1, 2, {}}, nullptr));
    for (int k = 0; k < in_features; ++k) pruned.memory.put(t * in_features + k, kept[t][k] ? z[t].bits[k] : 0, bytes);
  }
  const TokenStatisticsParams params{x.memory.data(), x.stride, tokens, in_features, type};
  check(launch_variance_ratio(params, pruned.memory.data(), shift.pointer(), eta.pointer(), nu.data<float>(),
                              nullptr) == cudaSuccess,
        "launch");
  for (int64_t t = 0; t < tokens; ++t) {
    check(is_variance_ratio(nu.data<float>()[t], z[t].z, kept[t]), "token " + std::to_string(t));
  }
  check(nu.guards_are_intact(), "nothing beside the output");
}

// Tokens whose squares leave float32, or whose mean is far beyond their spread, the first feature by itself or not.
void run_variance_extremes() {
  struct Extreme {
    double size, mean;
  };
  for (ElementType type : {kTypes[0], kTypes[2]}) {
    for (const Extreme& extreme : {Extreme{1e19, 0}, {1e-23, 0}, {1, 3e4}, {1e-3, 1}, {1e30, 1e36}, {1e-30, -1e-28}}) {
      for (int in_features : {64, 4096, 16392}) {
        Rows x(2, in_features, type, 0, 0), pruned(2, in_features, type, 0, 0);
        const Buffer nu(2 * 4);
        current = describe(2, in_features, type, "variance of ") + std::to_string(extreme.mean / extreme.size);
        std::vector<Token> z;
        std::vector<std::vector<bool>> kept;
        for (int64_t t = 0; t < 2; ++t) {
          for (int k = 0; k < in_features; ++k) x.set(t, k, encode(extreme.size * normal() + extreme.mean, type));
          if (t == 1) x.set(t, 0, 0);
          z.push_back(token_of(x.row(t), type, nullptr, nullptr));
          kept.push_back(survivors_of(z[t].z, {2, 4, {}}, nullptr));
          for (int k = 0; k < in_features; ++k) pruned.set(t, k, kept[t][k] ? z[t].bits[k] : 0);
        }
        const TokenStatisticsParams params{x.memory.data(), x.stride, 2, in_features, type};
        check(launch_variance_ratio(params, pruned.memory.data(), nullptr, nullptr, nu.data<float>(), nullptr) ==
                  cudaSuccess,
              "launch");
        for (int64_t t = 0; t < 2; ++t) {
          check(is_variance_ratio(nu.data<float>()[t], z[t].z, kept[t]), "token " + std::to_string(t));
        }
      }
    }
  }
}

// Rows of several blocks, each by itself and as one.
void run_long_rows() {
  for (const Pattern& pattern : {Pattern{8, 16, {}}, Pattern{16, 32, {}}, Pattern{2, 4, {}}}) {
    for (ElementType type : {kTypes[0], kTypes[1]}) {
      run_prune(3, 16896, type, pattern, {false, false, true}, kAligned);
      run_prune(2, 8224, type, pattern, {false, true, false}, {0, 0, 0, 0});
      run_prune(5, 8224, type, pattern, {false, false, false}, {0, 0, 0, 0});
    }
  }
}

void run_statistics() {
  int step = 0;
  for (ElementType type : kTypes) {
    for (int in_features : {2, 6, 8, 34, 256, 264, 1030, 2048, 16384, 16392, 32766, 32768}) {
      const int64_t tokens = in_features < 300 ? 33 : in_features < 3000 ? 9 : 2;
      const Memory& memory = kMemories[++step % 5];
      for (TokenShift kind : {TokenShift::kMean, TokenShift::kMedian}) {
        for (const Memory& at : {memory, kAligned}) run_token_shift(tokens, in_features, type, kind, at);
      }
      for (const Options& options : {Options{}, Options{false, true, false}, Options{false, false, true}}) {
        run_variance(tokens, in_features, type, options, memory, Content::kFinite);
        run_variance(tokens, in_features, type, options, kAligned, Content::kFinite);
      }
    }
    // float32 squares of any bits may overflow; 16-bit ones of fp16 do not.
    if (type == ElementType::kFloat16) run_variance(14, 96, type, {}, kAligned, Content::kHard);
  }
}

void check_refusals() {
  current = "refusals";
  const long before = emulation::launches;
  const auto prune = [](int64_t tokens, int in_features, Pattern pattern, ElementType type) {
    PruneParams params{};
    params.tokens = tokens;
    params.in_features = in_features;
    params.x_stride = in_features;
    params.pattern = pattern;
    params.x_type = type;
    return launch_prune(params, nullptr);
  };
  const cudaError_t refused = cudaErrorInvalidValue;
  const ElementType type = ElementType::kBFloat16;
  check(prune(1, 24, {8, 16, {}}, type) == refused, "features off a group");
  check(prune(1, 24, {2, 4, {1, {0, 0}}}, type) == refused, "features off a unit");
  check(prune(1, 24, {3, 3, {}}, type) == refused, "a group of three");
  check(prune(1, 64, {0, 16, {}}, type) == refused && prune(1, 64, {16, 16, {}}, type) == refused, "none or all kept");
  check(prune(1, 64, {2, 4, {2, {1, 1}}}, type) == refused, "one column twice");
  check(prune(1, 64, {2, 4, {1, {4, 0}}}, type) == refused, "no such column");
  check(prune(1, 64, {2, 4, {}}, ElementType::kE4M3) == refused, "e4m3 inputs");
  check(prune(int64_t{1} << 40, 64, {2, 4, {}}, type) == refused, "too many blocks");
  check(prune(0, 64, {2, 4, {}}, type) == cudaSuccess && prune(4, 0, {2, 4, {}}, type) == cudaSuccess, "nothing");
  const TokenStatisticsParams long_rows{nullptr, 32776, 1, 32776, type}, none{nullptr, 8, 0, 8, type};
  check(launch_token_shift(long_rows, TokenShift::kMean, nullptr, nullptr) == refused, "a row that is too long");
  check(launch_token_shift(none, TokenShift::kNone, nullptr, nullptr) == refused, "no shift");
  check(launch_variance_ratio(none, nullptr, nullptr, nullptr, nullptr, nullptr) == cudaSuccess, "no tokens");
  check(emulation::launches == before, "no launch");
}

}  // namespace

int main() {
  return run_checks([] {
    run_patterns();
    run_windows();
    run_long_rows();
    run_statistics();
    run_variance_extremes();
    check_refusals();
    // Five group sizes and two sets of windows, each unaligned and by 32-bit keys, all but 2:4+2 for 16-bit types bare
    // too; statistics of three types, aligned and not, of four or eight chunks.
    constexpr size_t kPrune = 7 * (3 + 3) + 6 * 2, kStatistics = 2 * 3 * 2 * 2;
    check_every_kernel_ran(kPrune + kStatistics);
    check(emulation::most_threads == nm_act::kMaxRowThreads, "no more threads than the kernels are compiled for");
  });
}
