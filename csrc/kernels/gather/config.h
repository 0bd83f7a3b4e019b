// How a decode product is cut into blocks: a pure function of the problem, testable without a device.
//
// A block owns a tile of outputs (`lanes` threads side by side, 16 bytes of a weight row each) and a slice of the
// inputs; threads / lanes rows are read at a time. The slices of one tile form a thread-block cluster, whose blocks add
// up their sums through distributed shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../nm_act.h"

namespace nm_act {

inline constexpr int kGatherVector = 16;     // bytes a thread loads at once
inline constexpr int kGatherSliceStep = 32;  // slices begin at whole groups of every pattern, and at whole warps
inline constexpr int kGatherMaxSplits = 8;   // the largest portable cluster
inline constexpr int kGatherMaxThreads = 512;
inline constexpr int kGatherMaxAhead = 4;
inline constexpr int kGatherMaxSlice = 1 << 15;  // row numbers are 16 bits wide

struct GatherConfig {
  int lanes;    // threads along the outputs: 8, 16, 32, 64 or 128
  int splits;   // slices of the inputs: 1 to kGatherMaxSplits
  int threads;  // of a block: 128, 256 or 512, a multiple of lanes
  int depth;    // rows in flight a thread through shared memory: 8 or 16; 0: batches in registers
  int ahead;    // lines a thread fetches into the L2 before anything is selected: 0 to kGatherMaxAhead
};

struct GatherProblem {
  int tokens;
  int out_features;
  int in_features;
  ElementType weight_type;
  Pattern pattern;  // keep 0: no selection
  GemmDevice device;
};

NM_ACT_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

NM_ACT_HOST_DEVICE constexpr int weight_bytes(ElementType type) {
  return type == ElementType::kE4M3 || type == ElementType::kInt8 ? 1 : 2;
}

NM_ACT_HOST_DEVICE constexpr int outputs_per_lane(ElementType type) { return kGatherVector / weight_bytes(type); }

// Inputs of a block, the last blocks of a cluster maybe fewer or none.
NM_ACT_HOST_DEVICE constexpr int slice_features(int in_features, int splits) {
  return ceil_div(ceil_div(in_features, splits), kGatherSliceStep) * kGatherSliceStep;
}

// Tokens that a kernel is compiled for.
NM_ACT_HOST_DEVICE constexpr int compiled_tokens(int tokens) {
  return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : 8;
}

// Blocks of kGatherMaxThreads that a multiprocessor's registers hold, as the kernels are compiled.
NM_ACT_HOST_DEVICE constexpr int gather_blocks(int tokens, int outputs_per_thread) {
  return tokens * outputs_per_thread <= 8 ? 2 : 1;
}

// The ring of rows exists up to kMaxDecodeTokens; eight tokens have no registers to gain from it.
NM_ACT_HOST_DEVICE constexpr bool has_depth(int tokens, int depth) {
  return depth == 0 || (tokens <= kMaxDecodeTokens && (depth == 8 || depth == 16));
}

// Byte offsets into the dynamic shared memory of a block. With several tokens the survivors' list takes the place of
// the keys it came from; what the threads gather takes the place of everything that only the selection needs.
struct GatherShared {
  int offsets;       // int32 [slice / 32 + 1]: survivors before each 32 features
  int rows;          // uint16 [slice]: survivors, by number in the slice
  int coefficients;  // uint16 [slice, tokens]
  int keys;          // uint32 [tokens, slice]
  int z;             // uint16 [tokens, slice]: the shifted inputs
  int masks;         // uint32 [tokens, slice / 32]: who survives in which token
  int own;           // 16 bytes a thread, as often as the depth or its sums need it: its rows, then its sums
  int bytes;         // what the slices of the tile sent, float [splits, share of the outputs], comes first
};

// Each block of a cluster finishes 2^bits of a tile's outputs, pairs at least: powers of two divide fast.
NM_ACT_HOST_DEVICE constexpr int share_bits(int outputs, int splits) {
  int bits = 1;
  while ((splits << bits) < outputs) ++bits;
  return bits;
}

NM_ACT_HOST_DEVICE constexpr GatherShared gather_shared(int tokens, int slice, const GatherConfig& config,
                                                        int outputs_per_thread) {
  GatherShared at{};
  const int bits = share_bits(tokens * config.lanes * outputs_per_thread, config.splits);
  at.offsets = ceil_div(4 * config.splits << bits, 16) * 16;
  at.rows = at.offsets + ceil_div(4 * (slice / 32 + 1), 16) * 16;
  at.coefficients = at.rows + 2 * slice;
  at.own = at.coefficients + 2 * slice * tokens;
  at.keys = tokens == 1 ? at.own : at.rows;
  const int after_keys = at.keys + 4 * tokens * slice;
  at.z = after_keys > at.own ? after_keys : at.own;
  at.masks = at.z + 2 * tokens * slice;
  const int selection = at.masks + 4 * tokens * (slice / 32);
  const int places = config.depth > outputs_per_thread / 4 ? config.depth : outputs_per_thread / 4;
  const int gathered = at.own + config.threads * places * kGatherVector;
  at.bytes = selection > gathered ? selection : gathered;
  return at;
}

inline int shared_bytes(const GatherProblem& problem, const GatherConfig& config) {
  return gather_shared(compiled_tokens(problem.tokens), slice_features(problem.in_features, config.splits), config,
                       outputs_per_lane(problem.weight_type))
      .bytes;
}

// 227 KiB a block on compute capability 9.0; the smallest of the others that run the sm_80 code have 99.
inline int shared_limit(GemmDevice device) { return (device.compute_capability_major == 9 ? 227 : 99) * 1024; }

inline bool is_valid(const GatherProblem& problem, const GatherConfig& config) {
  const bool lanes =
      config.lanes == 8 || config.lanes == 16 || config.lanes == 32 || config.lanes == 64 || config.lanes == 128;
  const bool threads = config.threads == 128 || config.threads == 256 || config.threads == kGatherMaxThreads;
  const int most = problem.device.compute_capability_major == 9 ? kGatherMaxSplits : 1;
  const bool ahead = config.ahead >= 0 && config.ahead <= kGatherMaxAhead;
  return lanes && threads && config.lanes <= config.threads && config.splits >= 1 && config.splits <= most &&
         has_depth(compiled_tokens(problem.tokens), config.depth) && ahead &&
         slice_features(problem.in_features, config.splits) <= kGatherMaxSlice &&
         shared_bytes(problem, config) <= shared_limit(problem.device);
}

// Fraction of the weight rows that some of `tokens` independent tokens needs.
inline double union_fraction(Pattern pattern, int tokens) {
  const double kept = static_cast<double>(pattern.keep) / pattern.group + pattern.extra.count * 2.0 / 16;
  double dropped = 1.0;
  for (int i = 0; i < tokens; ++i) dropped *= 1.0 - kept;
  return 1.0 - dropped;
}

// Whether skipping rows beats pruning and the dense product. An 8-bit weight always gains: the dense product would need
// a 16-bit copy of it. A 16-bit one gains while the union leaves out at least one row in 20 (all 50 % patterns up to
// four tokens); an estimate: the rows that are read anyway cost the same on both paths, and this one saves a launch.
inline bool gather_pays(ElementType weight_type, Pattern pattern, int tokens) {
  return weight_bytes(weight_type) == 1 || union_fraction(pattern, tokens) <= 0.95;
}

// Blocks that can run at once, by registers and shared memory. Clusters do not the groups of 16 or 18 multiprocessors
// to the last one.
inline int resident_blocks(const GatherProblem& problem, const GatherConfig& config) {
  constexpr int kPerMultiprocessor = 224 * 1024;
  const int by_shared = std::max(1, kPerMultiprocessor / (shared_bytes(problem, config) + 1024));
  const int by_registers = gather_blocks(compiled_tokens(problem.tokens), outputs_per_lane(problem.weight_type)) *
                           kGatherMaxThreads / config.threads;
  const int multiprocessors = problem.device.multiprocessors;
  const int usable = config.splits > 1 && multiprocessors > 16 ? multiprocessors / 16 * 16 : multiprocessors;
  return usable * std::max(1, std::min(by_shared, by_registers));
}

// Relative time of a configuration: the bytes it streams, stretched where too few blocks run to keep memory busy or
// where a last wave is not full, plus the bytes that memory could have moved while a block selects and adds up. What
// matters is that all blocks run at once with equal work; the number of blocks on a multiprocessor matters little,
// because one multiprocessor can take about three times its share of the memory bandwidth. The constants are estimates
// (docs/kernels/gather.md); `benchmarks/tune_decode.py` measures every candidate.
inline double gather_cost(const GatherProblem& problem, const GatherConfig& config) {
  const int tile = config.lanes * outputs_per_lane(problem.weight_type);
  const int tiles = ceil_div(problem.out_features, tile);
  const double blocks = static_cast<double>(tiles) * config.splits;
  const int resident = resident_blocks(problem, config), multiprocessors = problem.device.multiprocessors;
  const double kept = problem.pattern.keep == 0 ? 0.5 : union_fraction(problem.pattern, problem.tokens);
  const double padded = static_cast<double>(tiles) * tile / problem.out_features;
  const double bytes = kept * problem.out_features * weight_bytes(problem.weight_type) * problem.in_features * padded;
  const double waves = std::max(1.0, static_cast<double>(ceil_div(static_cast<int>(blocks), resident)));
  const double unfilled = waves > 1 ? waves * resident / blocks : 1.0;
  const double idle = std::max(1.0, 0.9 * multiprocessors / blocks);
  const double imbalance = ceil_div(static_cast<int>(blocks), multiprocessors) * multiprocessors / blocks - 1.0;
  const double narrow = 0.02 * 32 / config.lanes;
  // 4 TB/s move 4 MB a microsecond; a block selects some 3000 features of a token in that time.
  constexpr double kBytesPerMicrosecond = 4e6;
  const int slice = slice_features(problem.in_features, config.splits);
  const double select =
      waves * problem.tokens * slice / 3000.0 * std::min(2.0, std::max(1.0, blocks / multiprocessors));
  return bytes * unfilled * idle * (1 + 0.05 * imbalance + narrow) +
         kBytesPerMicrosecond * (select + 0.05 * config.splits);
}

// Calls visit with every configuration that the problem can run with, but for the lines fetched ahead.
template <class Visit>
void for_each_gather_config(const GatherProblem& problem, const Visit& visit) {
  for (int threads : {512, 256, 128}) {
    for (int lanes : {128, 64, 32, 16, 8}) {
      for (int splits = 1; splits <= kGatherMaxSplits; ++splits) {
        for (int depth : {0, 8, 16}) {
          const GatherConfig config{lanes, splits, threads, depth, 0};
          const bool empty_slices = (splits - 1) * slice_features(problem.in_features, splits) >= problem.in_features;
          if (is_valid(problem, config) && (splits == 1 || !empty_slices)) visit(config);
        }
      }
    }
  }
}

// The cheapest candidate; splits 0 if there is none.
inline GatherConfig select_gather_config(const GatherProblem& problem) {
  GatherConfig best{};
  double best_cost = 0;
  for_each_gather_config(problem, [&](const GatherConfig& config) {
    if (config.threads != kGatherMaxThreads || config.depth != 0) return;
    const double cost = gather_cost(problem, config);
    if (best.splits == 0 || cost < best_cost) {
      best = config;
      best_cost = cost;
    }
  });
  return best;
}

// Whether the kernel takes sizes and strides, rows weight_stride elements apart; pointers are the caller's to check.
inline bool gather_shape_fits(ElementType weight_type, Pattern pattern, int64_t tokens, int64_t out_features,
                              int64_t in_features, int64_t weight_stride, GemmDevice device) {
  const int bytes = weight_bytes(weight_type);
  const bool few = pattern.keep > 0 || bytes == 1;
  const int64_t row_bytes = weight_stride * bytes;
  if (tokens < 1 || tokens > (few ? kMaxDecodeTokens : kMaxGatherTokens) || in_features <= 0 || out_features <= 0 ||
      in_features > INT32_MAX || out_features > INT32_MAX || row_bytes > INT32_MAX) {
    return false;
  }
  return out_features % outputs_per_lane(weight_type) == 0 && row_bytes % kGatherVector == 0 &&
         select_gather_config({static_cast<int>(tokens), static_cast<int>(out_features), static_cast<int>(in_features),
                               weight_type, pattern, device})
                 .splits > 0;
}

}  // namespace nm_act
