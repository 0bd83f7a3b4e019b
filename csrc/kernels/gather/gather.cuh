// gather: y = (row_scale * weight_scale * (P @ W) + shift term) * column_scale + bias for a few tokens, reading only
// the rows of W [in, out] that some token needs. One launch: select, gather, reduce.
//
//   block (tile, slice): selects the survivors of its slice of the inputs (survivors.cuh; x is small and in L2), then
//   reads their weight rows. `lanes` threads lie along a row, 16 bytes each, threads / lanes rows are read at a time,
//   and every thread has kUnroll loads in flight before it waits for the first:
//   512 threads x 8 x 16 bytes = 64 KiB a block, where about 26 to 40 KiB a multiprocessor saturate an H200's memory.
//   Sums are float32: in registers over a thread's rows, then over the rows' threads through shared memory, then over
//   the slices of the tile, a cluster, through distributed shared memory. Every order is fixed: no atomics, the same
//   bits every time.
// Limits: out_features and the row stride are multiples of 16 bytes of the weight; 16-bit x.
#pragma once

#include "../launch.cuh"
#include "survivors.cuh"

namespace nm_act {

// How a weight's 32-bit words become floats.
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

// 2^23 + 128 + b has b + 128 in its lowest byte: a byte permutation and a subtraction, where a conversion instruction
// runs at an eighth of their rate.
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

// The values of all tokens at one place of the list.
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

// Adds kUnroll rows to a thread's sums, those at places first, first + step, ... of the list. Not kFull: as many of
// them as there are.
template <class E, class W, int kTokens, int kUnroll, bool kFull, int kOutputs>
__device__ __forceinline__ void gather_batch(const unsigned char* weight, uint32_t row_bytes, const GatherSlice& slice,
                                             int survivors, int first, int step, float (&sum)[kTokens][kOutputs]) {
  uint4 loaded[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int slot = first + u * step;
    if (kFull || slot < survivors)
      loaded[u] = load_weight(weight + static_cast<uint64_t>(slice.rows[slot]) * row_bytes);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int slot = first + u * step;
    if (!kFull && slot >= survivors) break;
    float c[kTokens];
    load_coefficients<E, kTokens>(slice.coefficients, slot, c);
    const uint32_t word[4] = {loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w};
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
}

// This thread's sums over places group, group + groups, ... of the list; `weight` is its first output in the slice's
// first row.
template <class E, class W, int kTokens, int kUnroll, int kOutputs>
__device__ __forceinline__ void gather_rows(const unsigned char* weight, uint32_t row_bytes, const GatherSlice& slice,
                                            int survivors, int group, int groups, float (&sum)[kTokens][kOutputs]) {
  int first = group;
  for (; first + (kUnroll - 1) * groups < survivors; first += kUnroll * groups) {
    gather_batch<E, W, kTokens, kUnroll, true>(weight, row_bytes, slice, survivors, first, groups, sum);
  }
  for (; first < survivors; first += kUnroll / 2 * groups) {
    gather_batch<E, W, kTokens, kUnroll / 2, false>(weight, row_bytes, slice, survivors, first, groups, sum);
  }
}

// totals [kTokens, tile]: the threads' sums added up in the order of their groups. Ends with a barrier.
template <int kTokens, int kOutputs>
__device__ __forceinline__ void reduce_block(const float (&sum)[kTokens][kOutputs], float* sums, float* totals,
                                             int lane, int group, int groups, int tile) {
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    __syncthreads();
    float4* target = reinterpret_cast<float4*>(sums + group * tile + lane * kOutputs);
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      const float* part = sum[token] + 4 * i;
      target[i] = make_float4(part[0], part[1], part[2], part[3]);
    }
    __syncthreads();
    for (int output = static_cast<int>(threadIdx.x); output < tile; output += static_cast<int>(blockDim.x)) {
      float total = 0.0f;
#pragma unroll 4
      for (int i = 0; i < groups; ++i) total += sums[i * tile + output];
      totals[token * tile + output] = total;
    }
  }
  __syncthreads();
}

// One output: the product's sum through the epilogue.
__device__ __forceinline__ float finish_output(const GatherParams& params, float sum, int token, int output) {
  if (params.weight_scale != nullptr) sum *= __ldg(params.weight_scale + output);
  if (params.row_scale != nullptr) sum *= __ldg(params.row_scale + token);
  if (params.shift_out != nullptr) {
    const float eta = params.eta != nullptr ? __ldg(params.eta + token) : 1.0f;
    sum = fmaf(eta, __ldg(params.shift_out + output), sum);
  }
  if (params.column_scale != nullptr) sum *= __ldg(params.column_scale + output);
  return sum;
}

// Adds up the slices in their order, two outputs a thread; the blocks of the cluster share the outputs.
template <class E>
__device__ __forceinline__ void write_outputs(const GatherParams& params, const float* totals, int tile, int first,
                                              int slice, int splits) {
  const int pairs = tile / 2, step = splits * static_cast<int>(blockDim.x);
  for (int i = slice * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); i < params.tokens * pairs;
       i += step) {
    const int token = i / pairs, output = first + i % pairs * 2;
    if (output >= params.out_features) continue;
    const float2* place = reinterpret_cast<const float2*>(totals) + i;
    float2 sum = splits == 1 ? *place : read_peer(place, 0);
    for (int rank = 1; rank < splits; ++rank) {
      const float2 part = read_peer(place, rank);
      sum.x += part.x;
      sum.y += part.y;
    }
    float low = finish_output(params, sum.x, token, output), high = finish_output(params, sum.y, token, output + 1);
    if (params.bias != nullptr) {
      const auto* bias = static_cast<const uint16_t*>(params.bias);
      low += E::low(bias[output]);
      high += E::low(bias[output + 1]);
    }
    auto* y = static_cast<uint16_t*>(params.y) + static_cast<int64_t>(token) * params.out_features + output;
    *reinterpret_cast<uint32_t*>(y) = E::pack(low, high);
  }
}

// Loads in flight a thread, and blocks a multiprocessor that registers are kept for: more sums leave room for fewer.
template <int kTokens, int kOutputs>
struct GatherTuning {
  static constexpr int kUnroll = kTokens <= kMaxDecodeTokens ? 8 : 4;
  static constexpr int kBlocks = gather_blocks(kTokens, kOutputs);
};

template <class E, class W, int kTokens>
__global__ void __launch_bounds__(kGatherMaxThreads, GatherTuning<kTokens, 4 * W::kPerWord>::kBlocks)
    gather_kernel(const __grid_constant__ GatherParams params, const GatherConfig config, const bool vector) {
  constexpr int kOutputs = 4 * W::kPerWord;
  const int tile = config.lanes * kOutputs, size = slice_features(params.in_features, config.splits);
  const int slice_index = static_cast<int>(blockIdx.x) % config.splits;
  const int first = static_cast<int>(blockIdx.x) / config.splits * tile;
  const int lane = static_cast<int>(threadIdx.x) & (config.lanes - 1);
  const int group = static_cast<int>(threadIdx.x) / config.lanes, groups = config.threads / config.lanes;
  unsigned char* const shared = dynamic_shared();
  const GatherShared at = gather_shared(kTokens, size, tile, config.threads, kOutputs);
  const GatherSlice slice(shared, at, slice_index * size, size, params.in_features);

  wait_for_previous_kernel();
  allow_next_kernel();
  const int survivors = select_survivors<E, kTokens>(params, slice, vector);

  float sum[kTokens][kOutputs] = {};
  const int output = first + lane * kOutputs;
  if (output < params.out_features) {
    constexpr int kBytes = kGatherVector / kOutputs;
    const int64_t row_bytes = params.weight_stride * kBytes;
    const auto* weight = static_cast<const unsigned char*>(params.weight) + slice.begin * row_bytes + output * kBytes;
    gather_rows<E, W, kTokens, GatherTuning<kTokens, kOutputs>::kUnroll>(weight, static_cast<uint32_t>(row_bytes),
                                                                         slice, survivors, group, groups, sum);
  }
  float* const totals = reinterpret_cast<float*>(shared);
  reduce_block(sum, reinterpret_cast<float*>(shared + at.sums), totals, lane, group, groups, tile);
  if (config.splits > 1) sync_cluster();
  write_outputs<E>(params, totals, tile, first, slice_index, config.splits);
  // Nobody leaves while another block may still read its totals.
  if (config.splits > 1) leave_cluster();
}

}  // namespace nm_act
