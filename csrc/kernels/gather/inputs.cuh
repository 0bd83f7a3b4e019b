// The inputs of a block's slice and their keys, in shared memory: x - shift, of RMSNorm(x) (or of a norm, a residual and
// RMSNorm) or activation(x) * up if asked for.
#pragma once

#include "../prune/activations.cuh"
#include "../prune/compress.cuh"
#include "block.cuh"
#include "config.h"

namespace nm_act {

// The magnitude's key followed by the position within 32 features, lower positions larger; below 2^20.
__device__ __forceinline__ uint32_t unique_key(uint32_t magnitude, int feature) {
  return magnitude << 5 | (31u - static_cast<uint32_t>(feature) % 32u);
}

// This block's slice and its arrays in shared memory.
struct GatherSlice {
  int begin;  // first feature
  int count;  // features, from 0 to `size`
  int size;   // a multiple of 32
  uint16_t* z;
  uint32_t* keys;
  uint16_t* rows;
  uint16_t* coefficients;
  uint32_t* masks;
  float* squares;
  int* offsets;
  bool first_tile;  // one of the blocks that write `hidden`

  __device__ __forceinline__ GatherSlice(unsigned char* shared, const GatherShared& at, int begin, int size,
                                         int in_features, bool first_tile)
      : begin(begin),
        count(max(0, min(size, in_features - begin))),
        size(size),
        z(reinterpret_cast<uint16_t*>(shared + at.z)),
        keys(reinterpret_cast<uint32_t*>(shared + at.keys)),
        rows(reinterpret_cast<uint16_t*>(shared + at.rows)),
        coefficients(reinterpret_cast<uint16_t*>(shared + at.coefficients)),
        masks(reinterpret_cast<uint32_t*>(shared + at.masks)),
        squares(reinterpret_cast<float*>(shared + at.squares)),
        offsets(reinterpret_cast<int*>(shared + at.offsets)),
        first_tile(first_tile) {}
};

// Factors of a token's norms: that of x, if there is an x_weight, and that of the row to be selected.
template <int kTokens>
struct RowNorms {
  float before[kTokens] = {}, inverse[kTokens] = {};
};

// Eight values of the element type.
__device__ __forceinline__ uint4 load_weights(const void* weight, int at) {
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(weight) + at));
}

// x, or RMSNorm(x) * x_weight + x_residual: eight features within the row, which may be read in whole vectors.
template <class E>
__device__ __forceinline__ Chunk<E> load_hidden(const GatherParams& params, int token, int at, float before) {
  Chunk<E> z = load_chunk<E, true>(static_cast<const uint16_t*>(params.x) + token * params.x_stride + at, kChunk);
  if (params.x_weight != nullptr) {
    normalise(z, before, load_weights(params.x_weight, at), params.unit_offset);
    const int64_t row = int64_t{token} * params.in_features;
    add(z, load_chunk<E, true>(static_cast<const uint16_t*>(params.x_residual) + row + at, kChunk));
  }
  return z;
}

template <class E>
__device__ __forceinline__ void store_hidden(const GatherParams& params, int token, int at, const Chunk<E>& hidden) {
  const int64_t row = int64_t{token} * params.in_features;
  store_chunk<E, true>(static_cast<uint16_t*>(params.hidden) + row + at, hidden, kChunk);
}

// 1 / sqrt(mean(h^2) + epsilon) of every token, from the sums of squares over the features that each thread has; every
// block computes it, in the same order. `slots`: kGatherMaxWarps of each token.
template <int kTokens>
__device__ __forceinline__ void inverse_norms(const GatherParams& params, float* slots, float (&squares)[kTokens],
                                              float (&inverse)[kTokens]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
  const auto sum = [](float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
  };
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float own = sum(squares[token]);
    if (lane == 0) slots[token * kGatherMaxWarps + thread / 32] = own;
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const float all = sum(lane < warps ? slots[token * kGatherMaxWarps + lane] : 0.0f);
    inverse[token] = inverse_rms(all, params.in_features, params.epsilon);
  }
}

// The sums of squares of this thread's features of the rows h(token, feature), eight by eight.
template <int kTokens, class Row>
__device__ __forceinline__ void sum_squares(const GatherParams& params, const Row& h, float (&squares)[kTokens]) {
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    squares[token] = 0.0f;
    if (token >= params.tokens) continue;
#pragma unroll 2
    for (int at = static_cast<int>(threadIdx.x) * kChunk; at < params.in_features;
         at += static_cast<int>(blockDim.x) * kChunk) {
      squares[token] = add_squares(h(token, at), squares[token]);
    }
  }
}

template <class E, int kTokens>
__device__ __forceinline__ RowNorms<kTokens> row_norms(const GatherParams& params, const GatherSlice& slice) {
  RowNorms<kTokens> norms;
  if (params.norm_weight == nullptr) return norms;
  float squares[kTokens];
  if (params.x_weight != nullptr) {
    const auto x = [&](int token, int at) {
      return load_chunk<E, true>(static_cast<const uint16_t*>(params.x) + token * params.x_stride + at, kChunk);
    };
    sum_squares(params, x, squares);
    inverse_norms(params, slice.squares + kTokens * kGatherMaxWarps, squares, norms.before);
  }
  const auto hidden = [&](int token, int at) { return load_hidden<E>(params, token, at, norms.before[token]); };
  sum_squares(params, hidden, squares);
  inverse_norms(params, slice.squares, squares, norms.inverse);
  return norms;
}

// Stores z = x - shift of kChunk features of a token, and their keys; those from `count` on are zero. `whole`: all are
// in the slice, and channel_scale and shift can be read 16 bytes at a time.
template <class E>
__device__ __forceinline__ void store_inputs(const GatherParams& params, const GatherSlice& slice, int token,
                                             int feature, Chunk<E> z, int count, bool whole) {
  const bool selects = params.pattern.keep > 0;
  const int at = slice.begin + feature;
  if (selects && count > 0) {
    if (params.eta != nullptr) subtract(z, __ldg(params.eta + token));
    if (params.shift != nullptr) {
      subtract(z, whole ? load_channels<true>(params.shift + at, count, 0.0f)
                        : load_channels<false>(params.shift + at, count, 0.0f));
    }
  }
  *reinterpret_cast<uint4*>(slice.z + token * slice.size + feature) =
      make_uint4(z.word[0], z.word[1], z.word[2], z.word[3]);
  if (!selects) return;
  uint32_t key[kChunk];
  if (params.channel_scale != nullptr) {
    const ChannelChunk scale = whole ? load_channels<true>(params.channel_scale + at, count, 1.0f)
                                     : load_channels<false>(params.channel_scale + at, count, 1.0f);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) key[j] = scaled_key(z.get(j), scale.value[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const uint32_t halves = magnitude_keys(z.word[j / 2], E::kNanKeys);
      key[j] = unique_key(j % 2 ? halves >> 16 : halves & 0xFFFFu, feature + j);
    }
  }
  uint4* keys = reinterpret_cast<uint4*>(slice.keys + token * slice.size + feature);
  keys[0] = make_uint4(key[0], key[1], key[2], key[3]);
  keys[1] = make_uint4(key[4], key[5], key[6], key[7]);
}

// Loads kChunk features of a token and stores z and their keys; zeros beyond the slice and the tokens. `vector`: x,
// channel_scale and shift can be read 16 bytes at a time. `before` and `inverse`: of the token's norms.
template <class E>
__device__ __forceinline__ void load_inputs(const GatherParams& params, const GatherSlice& slice, int token,
                                            int feature, bool vector, float before, float inverse) {
  const int at = slice.begin + feature;
  const int count = token < params.tokens ? max(0, min(kChunk, slice.count - feature)) : 0;
  const bool whole = vector && count == kChunk;
  Chunk<E> z = zero_chunk<E>();
  if (count > 0) {
    const auto* source = static_cast<const uint16_t*>(params.x) + token * params.x_stride + at;
    z = whole ? load_chunk<E, true>(source, count) : load_chunk<E, false>(source, count);
    if (params.up != nullptr) {
      const auto* up = static_cast<const uint16_t*>(params.up) + token * params.x_stride + at;
      multiply_by_activated(z, load_chunk<E, true>(up, kChunk), params.activation);
    }
    if (params.norm_weight != nullptr) {
      if (params.x_weight != nullptr) {
        z = load_hidden<E>(params, token, at, before);
        if (slice.first_tile) store_hidden(params, token, at, z);
      }
      normalise(z, inverse, load_weights(params.norm_weight, at), params.unit_offset);
    }
  }
  store_inputs(params, slice, token, feature, z, count, whole);
}

// Whether the block's threads can hold a whole row that is normed, one chunk each. Two would take 12 more registers
// with 8-bit weights.
__device__ __forceinline__ bool holds_row(const GatherParams& params) {
  return params.norm_weight != nullptr && params.in_features <= kChunk * static_cast<int>(blockDim.x);
}

// row_norms and load_inputs of the whole slice, for one token whose row the block can hold: everything is read at once,
// where those read x two or three times, each time after the last. Ends with a barrier.
template <class E>
__device__ __forceinline__ void load_held_row(const GatherParams& params, const GatherSlice& slice, bool vector) {
  const int at = static_cast<int>(threadIdx.x) * kChunk;
  const bool in_row = at < params.in_features, in_slice = at >= slice.begin && at < slice.begin + slice.count;
  const bool sandwich = params.x_weight != nullptr;
  Chunk<E> h = zero_chunk<E>(), residual = zero_chunk<E>();
  uint4 x_weight = make_uint4(0, 0, 0, 0), norm_weight = x_weight;
  if (in_row) h = load_chunk<E, true>(static_cast<const uint16_t*>(params.x) + at, kChunk);
  if (in_row && sandwich) {
    x_weight = load_weights(params.x_weight, at);
    residual = load_chunk<E, true>(static_cast<const uint16_t*>(params.x_residual) + at, kChunk);
  }
  if (in_slice) norm_weight = load_weights(params.norm_weight, at);
  float squares[1], inverse[1];
  if (sandwich) {
    squares[0] = add_squares(h, 0.0f);
    inverse_norms(params, slice.squares + kGatherMaxWarps, squares, inverse);
    normalise(h, inverse[0], x_weight, params.unit_offset);
    add(h, residual);
    if (slice.first_tile && in_slice) store_hidden(params, 0, at, h);
  }
  squares[0] = add_squares(h, 0.0f);
  inverse_norms(params, slice.squares, squares, inverse);
  if (in_slice) {
    normalise(h, inverse[0], norm_weight, params.unit_offset);
    store_inputs(params, slice, 0, at - slice.begin, h, kChunk, vector);
  }
  __syncthreads();
}

}  // namespace nm_act
