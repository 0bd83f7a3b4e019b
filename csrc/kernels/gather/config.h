// How the gather kernel divides a product into blocks: a pure function of the problem, testable without a device.
//
// A block owns a tile of outputs (`lanes` threads side by side, each with 16 bytes of a weight row) and a slice of the
// inputs; it reads threads / lanes rows at a time. The slices of one tile form a thread-block cluster, whose blocks
// reduce their sums through distributed shared memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "../latest.h"
#include "../nm_act.h"

namespace nm_act {

inline constexpr int kGatherVector = 16;     // bytes a thread loads at once
inline constexpr int kGatherSliceStep = 32;  // slices are multiples of it: whole groups of every pattern, whole warps
inline constexpr int kGatherMaxSplits = 8;   // the largest portable cluster
inline constexpr int kGatherMaxThreads = 512;
inline constexpr int kGatherMaxWarps = kGatherMaxThreads / 32;
inline constexpr int kGatherMaxSlice = 1 << 15;  // row numbers are 16 bits wide

struct GatherConfig {
  int lanes;    // threads along the outputs: 16, 32, 64 or 128
  int splits;   // slices of the inputs: 1 to kGatherMaxSplits
  int threads;  // per block: 256 or 512
  bool ahead;   // each thread prefetches a line to L2 before the selection
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

// Inputs per block; the last blocks of a cluster may have fewer or none.
NM_ACT_HOST_DEVICE constexpr int slice_features(int in_features, int splits) {
  return ceil_div(ceil_div(in_features, splits), kGatherSliceStep) * kGatherSliceStep;
}

// Number of tokens of the compiled kernel that serves `tokens`.
NM_ACT_HOST_DEVICE constexpr int compiled_tokens(int tokens) {
  return tokens <= 1 ? 1 : tokens <= 2 ? 2 : tokens <= 4 ? 4 : 8;
}

// Blocks of kGatherMaxThreads per multiprocessor that the kernels' register use is limited for.
NM_ACT_HOST_DEVICE constexpr int gather_blocks(int tokens, int outputs_per_thread) {
  return tokens * outputs_per_thread <= 8 ? 2 : 1;
}

// Byte offsets into a block's dynamic shared memory. With several tokens the list of survivors overwrites the keys it
// was made from; the threads' sums overwrite everything that only the selection needs.
struct GatherShared {
  int offsets;       // int32 [slice / 32 + 1]: number of survivors before each 32 features
  int rows;          // uint16 [slice]: the survivors' indices in the slice
  int coefficients;  // uint16 [slice, tokens]
  int keys;          // uint32 [tokens, slice]
  int z;             // uint16 [tokens, slice]: the shifted inputs
  int masks;         // uint32 [tokens, slice / 32]: each token's survivors, as bits
  int squares;       // float [2, tokens, kGatherMaxWarps]: each warp's sum of squares, for two norms
  int own;           // float4 [sums per thread / 4, threads]: the threads' sums
  int bytes;         // in all; at offset 0 lie the sums received from the tile's slices, float [splits, share]
};

// log2 of the outputs of a tile that each block of the cluster finishes, at least 1 (a pair). Powers of two divide
// fast.
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
  at.squares = at.masks + 4 * tokens * (slice / 32);
  const int selection = at.squares + 2 * 4 * tokens * kGatherMaxWarps;
  const int gathered = at.own + config.threads * outputs_per_thread / 4 * kGatherVector;
  at.bytes = selection > gathered ? selection : gathered;
  return at;
}

inline int block_count(const GatherProblem& problem, const GatherConfig& config) {
  return ceil_div(problem.out_features, config.lanes * outputs_per_lane(problem.weight_type)) * config.splits;
}

inline int shared_bytes(const GatherProblem& problem, const GatherConfig& config) {
  return gather_shared(compiled_tokens(problem.tokens), slice_features(problem.in_features, config.splits), config,
                       outputs_per_lane(problem.weight_type))
      .bytes;
}

// Shared memory per block: 227 KiB on compute capability 9.0; 99 KiB on the smallest devices that run the sm_80 code.
inline int shared_limit(GemmDevice device) { return (device.compute_capability_major == 9 ? 227 : 99) * 1024; }

inline bool is_valid(const GatherProblem& problem, const GatherConfig& config) {
  const bool lanes = config.lanes == 16 || config.lanes == 32 || config.lanes == 64 || config.lanes == 128;
  const bool threads = config.threads == 256 || config.threads == kGatherMaxThreads;
  const int most = problem.device.compute_capability_major == 9 ? kGatherMaxSplits : 1;
  return lanes && threads && config.splits >= 1 && config.splits <= most &&
         slice_features(problem.in_features, config.splits) <= kGatherMaxSlice &&
         shared_bytes(problem, config) <= shared_limit(problem.device);
}

// Expected fraction of the weight rows that at least one of `tokens` independent tokens needs.
inline double union_fraction(Pattern pattern, int tokens) {
  const double kept = static_cast<double>(pattern.keep) / pattern.group + pattern.extra.count * 2.0 / 16;
  double dropped = 1.0;
  for (int i = 0; i < tokens; ++i) dropped *= 1.0 - kept;
  return 1.0 - dropped;
}

// Whether skipping rows beats pruning followed by the dense product. For 8-bit weights it always does, because the
// dense product would need a 16-bit copy. For 16-bit weights it does if the union of the tokens' rows leaves out at
// least one row in 20 (every 50 % pattern, up to four tokens). This is an estimate: the rows that are read cost the
// same on both paths, and gather saves a launch.
inline bool gather_pays(ElementType weight_type, Pattern pattern, int tokens) {
  return weight_bytes(weight_type) == 1 || union_fraction(pattern, tokens) <= 0.95;
}

// Registers per thread, as compiled for compute capability 9.0.
inline int gather_registers(int tokens, int outputs_per_thread) {
  const bool bits8 = outputs_per_thread == 16;
  return tokens == 1 ? (bits8 ? 80 : 56) : tokens == 2 ? (bits8 ? 96 : 72) : 120;
}

inline int blocks_per_multiprocessor(const GatherProblem& problem, const GatherConfig& config) {
  constexpr int kRegisters = 64 * 1024, kThreads = 2048, kShared = 227 * 1024;
  const int registers = gather_registers(compiled_tokens(problem.tokens), outputs_per_lane(problem.weight_type));
  const int by_threads = std::min(kRegisters / registers, kThreads) / config.threads;
  return std::max(1, std::min(by_threads, kShared / (shared_bytes(problem, config) + 1024)));
}

// Number of blocks that run at once with `each` blocks per multiprocessor. A cluster must fit into one group of
// multiprocessors: in the tuning sweep, 132 multiprocessors held 14 clusters of eight or seven blocks, 16 of six and 38
// of three, which is what six groups of 16 multiprocessors and two of 13 would hold.
inline int resident_blocks(GemmDevice device, int splits, int each) {
  if (splits == 1) return device.multiprocessors * each;
  const int groups = std::max(3, device.multiprocessors / 16);
  return ((groups - 2) * (16 * each / splits) + 2 * (13 * each / splits)) * splits;
}

inline int resident_blocks(const GatherProblem& problem, const GatherConfig& config) {
  return resident_blocks(problem.device, config.splits, blocks_per_multiprocessor(problem, config));
}

// Whether every block of a launch can have a multiprocessor of its own. Otherwise two blocks may share the bandwidth of
// one multiprocessor while another is idle, which cost 2 % of a decode step (docs/kernels/gather.md).
inline bool blocks_fit_apart(const GatherProblem& problem, const GatherConfig& config) {
  return block_count(problem, config) <= resident_blocks(problem.device, config.splits, 1);
}

// Fraction of a block's weights that is prefetched before the selection. With half of the rows surviving, it pays up to
// about 0.3.
inline double ahead_share(const GatherProblem& problem, const GatherConfig& config) {
  constexpr double kLine = 128;
  const double tile_bytes = config.lanes * kGatherVector;
  return config.threads * kLine / (tile_bytes * slice_features(problem.in_features, config.splits));
}

inline constexpr double kMaxAheadShare = 0.314;

inline bool ahead_pays(const GatherProblem& problem, const GatherConfig& config) {
  return problem.pattern.keep * 2 >= problem.pattern.group && problem.pattern.keep > 0 &&
         ahead_share(problem, config) < kMaxAheadShare;
}

// Estimated microseconds of a configuration, up to a constant that all share. Blocks run in waves; in each wave, every
// block selects its slice and then streams its rows, as fast as memory, its multiprocessor and its loads in flight
// allow. The constants are fitted to benchmarks/results/h100/decode_tuning.csv (docs/kernels/gather.md).
inline double gather_cost(const GatherProblem& problem, const GatherConfig& config) {
  constexpr double kMemory = 3.156e6, kMultiprocessor = 4.928e4;  // bytes a microsecond
  constexpr double kLatency = 0.744, kWave = 3.256, kAhead = 1.0;
  constexpr double kSelect = 0.2107;  // per feature and token, for one thread
  const int blocks = block_count(problem, config);
  const int most = blocks_per_multiprocessor(problem, config);
  const int resident = resident_blocks(problem.device, config.splits, most);
  int each = 1;
  while (each < most && resident_blocks(problem.device, config.splits, each) < std::min(blocks, resident)) ++each;
  const int waves = ceil_div(blocks, resident);
  const int slice = slice_features(problem.in_features, config.splits);
  const double kept = problem.pattern.keep == 0 ? 0.5 : union_fraction(problem.pattern, problem.tokens);
  const double bytes = kept * slice * config.lanes * kGatherVector;  // per block
  const double select = kSelect * problem.tokens * slice / config.threads * std::min(each, 2);
  const double memory = blocks * bytes / kMemory;
  const double multiprocessor = waves * each * bytes / kMultiprocessor;
  const double flight = waves * bytes * kLatency / (config.threads * 8 * kGatherVector);
  const double stream =
      std::cbrt(memory * memory * memory + multiprocessor * multiprocessor * multiprocessor + flight * flight * flight);
  const double hidden = config.ahead ? kAhead * (1 - ahead_share(problem, config) / kMaxAheadShare) : 0.0;
  const double idle = std::max(1.0, 0.6 * problem.device.multiprocessors / blocks);  // so few blocks: not measured
  return waves * (select + kWave) + stream * idle - hidden;
}

// Calls visit with every configuration that can run the problem.
template <class Visit>
void for_each_gather_config(const GatherProblem& problem, const Visit& visit) {
  for (int threads : {512, 256}) {
    for (int lanes : {128, 64, 32, 16}) {
      for (int splits = 1; splits <= kGatherMaxSplits; ++splits) {
        for (bool ahead : {false, true}) {
          const GatherConfig config{lanes, splits, threads, ahead};
          const bool empty_slices = (splits - 1) * slice_features(problem.in_features, splits) >= problem.in_features;
          if (is_valid(problem, config) && (splits == 1 || !empty_slices)) visit(config);
        }
      }
    }
  }
}

// The configuration with the lowest estimate; splits is 0 if none can run the problem.
inline GatherConfig select_gather_config(const GatherProblem& problem) {
  GatherConfig best{};
  double best_cost = 0;
  for_each_gather_config(problem, [&](const GatherConfig& config) {
    if (config.ahead != ahead_pays(problem, config)) return;
    const double cost = gather_cost(problem, config);
    if (best.splits == 0 || cost < best_cost) {
      best = config;
      best_cost = cost;
    }
  });
  return best;
}

// Products for which, within a decode step, another configuration was measured to be faster than the one that is
// fastest alone: in a step, a kernel's blocks start while those of the previous kernel end, and clusters wait for room
// beside them (docs/kernels/gather.md). For one token, 16-bit weights and 132 multiprocessors. All were measured with
// 8:16 in bf16 and are used for 50 % patterns.
struct LayerGather {
  int out_features, in_features;
  GatherConfig config;
};
inline constexpr LayerGather kLayerGathers[] = {
    {28672, 4096, {128, 4, 512, true}}, {3584, 3584, {16, 8, 512, true}},    {37888, 3584, {128, 5, 512, true}},
    {2048, 2048, {32, 8, 512, true}},   {16384, 2048, {128, 6, 512, false}},
};

// The configuration for a product within a layer's decode step: a measured one, else the one that is fastest alone.
inline GatherConfig select_gather_config_in_layer(const GatherProblem& problem) {
  const bool measured = problem.tokens == 1 && weight_bytes(problem.weight_type) == 2 && problem.pattern.keep > 0 &&
                        2 * problem.pattern.keep == problem.pattern.group && problem.device.multiprocessors == 132;
  for (const LayerGather& layer : kLayerGathers) {
    if (measured && layer.out_features == problem.out_features && layer.in_features == problem.in_features &&
        is_valid(problem, layer.config)) {
      return layer.config;
    }
  }
  return select_gather_config(problem);
}

// What select_gather_config or select_gather_config_in_layer chooses. The search takes up to 4 us of the host's time, at
// every eager call, so each thread keeps its latest results.
inline GatherConfig remembered_gather_config(const GatherProblem& problem, bool in_layer) {
  using Key = std::pair<GatherProblem, bool>;
  thread_local Latest<Key, GatherConfig, 5> latest;  // no problem has 0 tokens
  const auto holds = [&](const Key& key) {
    const GatherProblem& other = key.first;
    return other.tokens == problem.tokens && other.out_features == problem.out_features &&
           other.in_features == problem.in_features && other.weight_type == problem.weight_type &&
           other.pattern.keep == problem.pattern.keep && other.pattern.group == problem.pattern.group &&
           other.pattern.extra.count == problem.pattern.extra.count &&
           other.device.compute_capability_major == problem.device.compute_capability_major &&
           other.device.multiprocessors == problem.device.multiprocessors && key.second == in_layer;
  };
  return latest.find({problem, in_layer}, hash_of(problem.out_features, problem.in_features, problem.tokens), holds,
                     [&] { return in_layer ? select_gather_config_in_layer(problem) : select_gather_config(problem); });
}

// The configuration for these sizes, with rows weight_stride elements apart; splits is 0 if the kernel does not support
// them. The caller checks pointers.
inline GatherConfig choose_gather_config(ElementType weight_type, Pattern pattern, int64_t tokens, int64_t out_features,
                                         int64_t in_features, int64_t weight_stride, GemmDevice device,
                                         bool in_layer = false) {
  const int bytes = weight_bytes(weight_type);
  const bool few = pattern.keep > 0 || bytes == 1;
  const int64_t row_bytes = weight_stride * bytes;
  if (tokens < 1 || tokens > (few ? kFewTokens : kMaxGatherTokens) || in_features <= 0 || out_features <= 0 ||
      in_features > INT32_MAX || out_features > INT32_MAX || row_bytes > INT32_MAX ||
      out_features % outputs_per_lane(weight_type) != 0 || row_bytes % kGatherVector != 0) {
    return {};
  }
  const GatherProblem problem{static_cast<int>(tokens),
                              static_cast<int>(out_features),
                              static_cast<int>(in_features),
                              weight_type,
                              pattern,
                              device};
  return remembered_gather_config(problem, in_layer);
}

}  // namespace nm_act
