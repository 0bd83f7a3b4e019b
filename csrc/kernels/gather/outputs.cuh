// Computes y from the threads' sums: reduction over the block, then over the slices of the tile, then the epilogue.
//
// Every block of the cluster finishes a share of the tile's outputs. A block reduces its own threads' sums and writes
// each result to the shared memory of the block that finishes it. After one barrier of the cluster no block accesses
// another's memory, so each may exit when it is done.
#pragma once

#include "block.cuh"
#include "config.h"

namespace nm_act {

// The outputs of a block's tile, numbered token by token, and the block that finishes each.
struct GatherTile {
  float* received;  // [splits, share]
  int first;        // first output of the tile
  int bits;         // a token has 2^bits outputs in the tile
  int share_bits;   // a block finishes the 2^share_bits outputs from rank << share_bits on, if they exist
  int rank;
  int splits;
};

// While the previous kernel ends, prefetches to L2 what the block reads only once, at its start or its end.
__device__ __forceinline__ void fetch_vectors(const GatherParams& params, const GatherTile& tile, int begin,
                                              int count) {
  constexpr int kLine = 128;
  const int thread = static_cast<int>(threadIdx.x);
  const int own = thread * (kLine / 4), number = (tile.rank << tile.share_bits) + own;
  const int output = tile.first + (number & ((1 << tile.bits) - 1));
  if (own < 1 << tile.share_bits && output < params.out_features) {
    if (params.weight_scale != nullptr) prefetch_line(params.weight_scale + output);
    if (params.shift_out != nullptr) prefetch_line(params.shift_out + output);
    if (params.column_scale != nullptr) prefetch_line(params.column_scale + output);
    if (params.bias != nullptr) prefetch_line(static_cast<const uint16_t*>(params.bias) + output);
    const int token = number >> tile.bits;
    if (params.residual != nullptr && own % (kLine / 2) == 0 && token < params.tokens) {
      const int64_t row = int64_t{token} * params.out_features;
      prefetch_kept_line(static_cast<const uint16_t*>(params.residual) + row + output);
    }
  }
  for (int feature = thread * (kLine / 4); feature < count; feature += static_cast<int>(blockDim.x) * (kLine / 4)) {
    const int at = begin + feature;
    if (params.channel_scale != nullptr) prefetch_line(params.channel_scale + at);
    if (params.shift != nullptr) prefetch_line(params.shift + at);
    if (feature % (kLine / 2) != 0) continue;
    if (params.norm_weight != nullptr) prefetch_line(static_cast<const uint16_t*>(params.norm_weight) + at);
    if (params.x_weight != nullptr) prefetch_line(static_cast<const uint16_t*>(params.x_weight) + at);
    for (int token = 0; token < params.tokens; ++token) {
      prefetch_line(static_cast<const uint16_t*>(params.x) + token * params.x_stride + at);
    }
  }
}

// Reduces the sums over the block's groups of `lanes` threads, in the groups' order, and sends each result to the block
// that finishes it. `own` has separate 16-byte slots per thread, so no thread overwrites what another still reads.
template <int kTokens, int kOutputs>
__device__ __forceinline__ void reduce_block(const float (&sum)[kTokens][kOutputs], unsigned char* own,
                                             const GatherTile& tile, int lanes, int groups) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int quad_bits = 33 - __clz(lanes), outputs = 1 << tile.bits;  // 2^quad_bits sums: four outputs of each lane
  float4* const mine = reinterpret_cast<float4*>(own) + thread;
  const float* const sums = reinterpret_cast<const float*>(own);
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    if (token > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      const float* part = sum[token] + 4 * i;
      mine[i * threads] = make_float4(part[0], part[1], part[2], part[3]);
    }
    __syncthreads();
    // A peer's shared memory may be written only after that block has started.
    if (token == 0 && tile.splits > 1) wait_for_cluster();
    // In the order of the sums in memory, which is not that of the outputs.
    for (int i = thread; i < outputs; i += threads) {
      const int quad = i >> quad_bits, in_quad = i & ((1 << quad_bits) - 1);
      const float* source = sums + quad * threads * 4 + in_quad;
      float total = 0.0f;
#pragma unroll 8
      for (int group = 0; group < groups; ++group) total += source[group * lanes * 4];
      const int number = token * outputs + in_quad / 4 * kOutputs + quad * 4 + in_quad % 4;
      const int rank = number >> tile.share_bits, place = number & ((1 << tile.share_bits) - 1);
      float* target = tile.received + (tile.rank << tile.share_bits) + place;
      if (tile.splits > 1) {
        write_peer(target, rank, total);
      } else {
        *target = total;
      }
    }
  }
}

// The epilogue's factors and terms for two neighbouring outputs of a token.
struct EpiloguePair {
  float row_scale, weight_scale[2], shift[2], column_scale[2], bias[2];
  uint32_t residual;  // two values of the element type
};

template <class E>
__device__ __forceinline__ EpiloguePair load_epilogue(const GatherParams& params, int token, int output) {
  const auto pair = [output](const float* source, float (&value)[2], float none) {
    value[0] = source != nullptr ? __ldg(source + output) : none;
    value[1] = source != nullptr ? __ldg(source + output + 1) : none;
  };
  EpiloguePair e;
  e.row_scale = params.row_scale != nullptr ? __ldg(params.row_scale + token) : 1.0f;
  pair(params.weight_scale, e.weight_scale, 1.0f);
  pair(params.shift_out, e.shift, 0.0f);
  if (params.shift_out != nullptr && params.eta != nullptr) {
    const float eta = __ldg(params.eta + token);
    e.shift[0] *= eta;
    e.shift[1] *= eta;
  }
  pair(params.column_scale, e.column_scale, 1.0f);
  const auto* bias = static_cast<const uint16_t*>(params.bias);
  e.bias[0] = bias != nullptr ? E::low(bias[output]) : 0.0f;
  e.bias[1] = bias != nullptr ? E::low(bias[output + 1]) : 0.0f;
  const auto* residual = static_cast<const uint16_t*>(params.residual);
  const int64_t at = static_cast<int64_t>(token) * params.out_features + output;
  e.residual = residual != nullptr ? *reinterpret_cast<const uint32_t*>(residual + at) : 0;
  return e;
}

// Sums the slices in their order and writes this block's share of the outputs, two per thread.
template <class E>
__device__ __forceinline__ void write_outputs(const GatherParams& params, const GatherTile& tile) {
  const int share = 1 << tile.share_bits, before = tile.rank << tile.share_bits;
  if (tile.splits > 1) arrive_at_cluster();
  const auto epilogue_at = [&](int i) {
    const int token = (before + i) >> tile.bits, output = tile.first + ((before + i) & ((1 << tile.bits) - 1));
    const bool exists = i < share && token < params.tokens && output < params.out_features;
    return exists ? load_epilogue<E>(params, token, output) : EpiloguePair{};
  };
  // Loaded while the other blocks arrive.
  int i = 2 * static_cast<int>(threadIdx.x);
  EpiloguePair e = epilogue_at(i);
  if (tile.splits > 1) {
    wait_for_cluster();
  } else {
    __syncthreads();
  }
#pragma unroll 1
  for (; i < share; i += 2 * static_cast<int>(blockDim.x), e = epilogue_at(i)) {
    const int token = (before + i) >> tile.bits, output = tile.first + ((before + i) & ((1 << tile.bits) - 1));
    if (token >= params.tokens || output >= params.out_features) continue;
    float2 part[kGatherMaxSplits];
#pragma unroll
    for (int slice = 0; slice < kGatherMaxSplits; ++slice) {
      if (slice < tile.splits) {
        part[slice] = *reinterpret_cast<const float2*>(tile.received + (slice << tile.share_bits) + i);
      }
    }
    float low = part[0].x, high = part[0].y;
#pragma unroll
    for (int slice = 1; slice < kGatherMaxSplits; ++slice) {
      if (slice < tile.splits) {
        low += part[slice].x;
        high += part[slice].y;
      }
    }
    low = fmaf(low * e.weight_scale[0], e.row_scale, e.shift[0]) * e.column_scale[0] + e.bias[0];
    high = fmaf(high * e.weight_scale[1], e.row_scale, e.shift[1]) * e.column_scale[1] + e.bias[1];
    auto* y = static_cast<uint16_t*>(params.y) + static_cast<int64_t>(token) * params.out_features + output;
    uint32_t rounded = E::pack(low, high);
    if (params.residual != nullptr) {
      rounded = E::pack(E::low(rounded) + E::low(e.residual), E::high(rounded) + E::high(e.residual));
    }
    *reinterpret_cast<uint32_t*>(y) = rounded;
  }
}

}  // namespace nm_act
