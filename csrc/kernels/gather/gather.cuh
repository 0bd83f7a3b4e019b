// gather: y = (row_scale * weight_scale * (P @ W) + shift term) * column_scale + bias for a few tokens. Of W [in, out],
// only the rows that some token needs are read. One launch selects, gathers and reduces. If given, it also computes
// RMSNorm (or a norm, a residual and RMSNorm) or SiLU * up before the selection, and adds a residual after the product;
// every block computes the part of these that it needs.
//
// Block (tile, slice) selects the survivors of its slice of the inputs (survivors.cuh; x is small and in L2), then
// reads their weight rows, threads / lanes rows at a time: `lanes` threads lie along a row, 16 bytes each. A thread
// issues kUnroll loads before it waits for the first. Sums are float32, taken over a thread's rows in registers, then
// over the threads with the same outputs through shared memory, then over the slices of the tile (a cluster) through
// distributed shared memory. There are no atomics and every order is fixed, so results are bitwise reproducible.
//
// Limits: 16-bit x; out_features and the row stride are multiples of 16 bytes of the weight.
#pragma once

#include "../launch.cuh"
#include "outputs.cuh"
#include "survivors.cuh"

namespace nm_act {

// How a 32-bit word of a weight is converted to floats.
template <class E>
struct Weight16 {
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&w)[2]) {
    w[0] = E::low(word);
    w[1] = E::high(word);
  }
};

struct WeightE4M3 {
  static constexpr int kPerWord = 4;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> 16 * i);
      const float2 values = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      w[2 * i] = values.x;
      w[2 * i + 1] = values.y;
    }
  }
};

// The float 2^23 + 128 + b has b + 128 as its lowest byte, so a byte permutation and a subtraction convert b. A
// conversion instruction runs at an eighth of their rate.
struct WeightInt8 {
  static constexpr int kPerWord = 4;
  static __device__ __forceinline__ void unpack(uint32_t word, float (&w)[4]) {
    const uint32_t biased = word ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = __uint_as_float(permute_bytes(biased, 0x4B000000u, 0x7440u + static_cast<uint32_t>(i))) - 8388736.0f;
    }
  }
};

// The values of all tokens at one slot of the list.
template <class E, int kTokens>
__device__ __forceinline__ void load_coefficients(const uint16_t* list, int slot, float (&c)[kTokens]) {
  if constexpr (kTokens == 1) {
    c[0] = E::low(list[slot]);
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(list) + slot * (kTokens / 2);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      c[2 * i] = E::low(words[i]);
      c[2 * i + 1] = E::high(words[i]);
    }
  }
}

// Adds this thread's 16 bytes of the weight row in `slot` of the list to its sums.
template <class E, class W, int kTokens, int kOutputs>
__device__ __forceinline__ void add_row(uint4 row, const GatherSlice& slice, int slot,
                                        float (&sum)[kTokens][kOutputs]) {
  float c[kTokens];
  load_coefficients<E, kTokens>(slice.coefficients, slot, c);
  const uint32_t word[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float w[W::kPerWord];
    W::unpack(word[i], w);
#pragma unroll
    for (int j = 0; j < W::kPerWord; ++j) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        float& target = sum[token][i * W::kPerWord + j];
        target = fmaf(c[token], w[j], target);
      }
    }
  }
}

// Adds the kUnroll rows in slots first, first + step, ... of the list to a thread's sums; without kFull, only those
// slots that exist.
template <class E, class W, int kTokens, int kUnroll, bool kFull, int kOutputs>
__device__ __forceinline__ void gather_batch(const unsigned char* weight, uint32_t row_bytes, const GatherSlice& slice,
                                             int survivors, int first, int step, uint64_t policy,
                                             float (&sum)[kTokens][kOutputs]) {
  uint4 loaded[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int slot = first + u * step;
    if (kFull || slot < survivors)
      loaded[u] = load_weight(weight + static_cast<uint64_t>(slice.rows[slot]) * row_bytes, policy);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int slot = first + u * step;
    if (!kFull && slot >= survivors) break;
    add_row<E, W, kTokens>(loaded[u], slice, slot, sum);
  }
}

// This thread's sums over slots group, group + groups, ... of the list. `weight` points to the thread's first output in
// the slice's first row.
template <class E, class W, int kTokens, int kUnroll, int kOutputs>
__device__ __forceinline__ void gather_rows(const unsigned char* weight, uint32_t row_bytes, const GatherSlice& slice,
                                            int survivors, int group, int groups, float (&sum)[kTokens][kOutputs]) {
  const uint64_t policy = read_once_policy();
  int first = group;
  for (; first + (kUnroll - 1) * groups < survivors; first += kUnroll * groups) {
    gather_batch<E, W, kTokens, kUnroll, true>(weight, row_bytes, slice, survivors, first, groups, policy, sum);
  }
  for (; first < survivors; first += kUnroll / 2 * groups) {
    gather_batch<E, W, kTokens, kUnroll / 2, false>(weight, row_bytes, slice, survivors, first, groups, policy, sum);
  }
}

// Loads in flight per thread, and blocks per multiprocessor to limit registers for; the more sums, the fewer of both.
template <int kTokens, int kOutputs>
struct GatherTuning {
  static constexpr int kUnroll = kTokens <= kFewTokens ? 8 : 4;
  static constexpr int kBlocks = gather_blocks(kTokens, kOutputs);
};

// Prefetches one line per thread of the slice's first rows in this tile, before it is known which survive: memory would
// be idle until the selection is done, and a 50 % pattern needs every other line.
__device__ __forceinline__ void fetch_ahead(const unsigned char* tile, uint32_t row_bytes, int line_bytes, int rows) {
  constexpr int kLine = 128;
  const int lines = ceil_div(line_bytes, kLine), i = static_cast<int>(threadIdx.x);
  if (i < rows * lines) prefetch_line(tile + static_cast<uint64_t>(i / lines) * row_bytes + i % lines * kLine);
}

template <class E, class W, int kTokens>
__global__ void __launch_bounds__(kGatherMaxThreads, GatherTuning<kTokens, 4 * W::kPerWord>::kBlocks)
    gather_kernel(const __grid_constant__ GatherParams params, const GatherConfig config, const bool vector) {
  constexpr int kOutputs = 4 * W::kPerWord, kBytes = kGatherVector / kOutputs;
  if (config.splits > 1) arrive_at_cluster();
  const int tile = config.lanes * kOutputs, size = slice_features(params.in_features, config.splits);
  const int rank = static_cast<int>(blockIdx.x) % config.splits;
  const int first = static_cast<int>(blockIdx.x) / config.splits * tile;
  const int lane = static_cast<int>(threadIdx.x) & (config.lanes - 1);
  const int group = static_cast<int>(threadIdx.x) / config.lanes, groups = config.threads / config.lanes;
  unsigned char* const shared = dynamic_shared();
  const GatherShared at = gather_shared(kTokens, size, config, kOutputs);
  const GatherSlice slice(shared, at, rank * size, size, params.in_features, first == 0);
  const GatherTile outputs{reinterpret_cast<float*>(shared),          first, 31 - __clz(tile),
                           share_bits(kTokens * tile, config.splits), rank,  config.splits};
  const int64_t row_bytes = params.weight_stride * kBytes;
  const auto* weight = static_cast<const unsigned char*>(params.weight) + slice.begin * row_bytes + first * kBytes;

  fetch_vectors(params, outputs, slice.begin, slice.count);
  const auto fetch_rows = [&] {
    fetch_ahead(weight, static_cast<uint32_t>(row_bytes), min(tile, params.out_features - first) * kBytes, slice.count);
  };
  // The weight does not depend on the previous kernel, so its rows may arrive while that one ends. That pays for 8-bit
  // weights; with 16 bits, the previous kernel is slowed down by at least as much.
  if (config.ahead && kBytes == 1) fetch_rows();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (config.ahead && kBytes != 1) fetch_rows();
  const int survivors = select_survivors<E, kTokens>(params, slice, vector);

  float sum[kTokens][kOutputs] = {};
  if (first + lane * kOutputs < params.out_features) {
    gather_rows<E, W, kTokens, GatherTuning<kTokens, kOutputs>::kUnroll>(
        weight + lane * kGatherVector, static_cast<uint32_t>(row_bytes), slice, survivors, group, groups, sum);
  }
  reduce_block(sum, shared + at.own, outputs, config.lanes, groups);
  write_outputs<E>(params, outputs);
}

}  // namespace nm_act
