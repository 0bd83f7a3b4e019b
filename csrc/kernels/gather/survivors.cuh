// Selection of the survivors of a slice of the inputs by one block: their indices and values, as a list in shared
// memory.
//
// A feature survives if fewer than `keep` of its group beat it; its rank is the sum of the sign bits of m key
// differences. The key of an unscaled 16-bit feature is its 15-bit magnitude with the position appended, which makes
// all keys of a group different. With a channel scale the keys have 31 bits and ties are broken by comparing positions.
// A warp takes 32 features at a time, and a ballot gives their mask. For one token exactly 32 * keep / group of every
// 32 features survive, so every survivor's slot in the list is known and each warp handles its share of the features
// without a block barrier. The union over several tokens, and the non-zero inputs without a pattern, need a prefix sum
// of the counts.
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

// Number of keys of the group that beat key `own`. kUnique: no two keys are equal.
template <bool kUnique>
__device__ __forceinline__ int rank_in_group(const uint32_t* group, int size, int own) {
  const uint32_t mine = group[own];
  uint32_t rank = 0;
#pragma unroll 4
  for (int j = 0; j < size; j += 2) {
    const uint2 pair = *reinterpret_cast<const uint2*>(group + j);
    // Of two equal keys the one at the lower position wins.
    const uint32_t tie0 = !kUnique && j < own ? 1u : 0u, tie1 = !kUnique && j + 1 < own ? 1u : 0u;
    rank += (mine - pair.x - tie0) >> 31;
    rank += (mine - pair.y - tie1) >> 31;
  }
  return static_cast<int>(rank);
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

// x, or RMSNorm(x) * x_weight + x_residual: eight features within the row, which may be read in whole vectors.
template <class E>
__device__ __forceinline__ Chunk<E> load_hidden(const GatherParams& params, int token, int at, float before) {
  Chunk<E> z = load_chunk<E, true>(static_cast<const uint16_t*>(params.x) + token * params.x_stride + at, kChunk);
  if (params.x_weight != nullptr) {
    normalise(z, before, __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.x_weight) + at)),
              params.unit_offset);
    const int64_t row = int64_t{token} * params.in_features;
    add(z, load_chunk<E, true>(static_cast<const uint16_t*>(params.x_residual) + row + at, kChunk));
  }
  return z;
}

// 1 / sqrt(mean(h^2) + epsilon) of every token, over the whole row h(token, feature). Each block computes it, in the
// same order. `slots`: kGatherMaxWarps of each token.
template <int kTokens, class Row>
__device__ __forceinline__ void inverse_norms(const GatherParams& params, float* slots, const Row& h,
                                              float (&inverse)[kTokens]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warps = static_cast<int>(blockDim.x) / 32;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    float squares = 0.0f;
    if (token < params.tokens) {
#pragma unroll 2
      for (int at = thread * kChunk; at < params.in_features; at += static_cast<int>(blockDim.x) * kChunk) {
        squares = add_squares(h(token, at), squares);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
    if (lane == 0) slots[token * kGatherMaxWarps + thread / 32] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    float squares = lane < warps ? slots[token * kGatherMaxWarps + lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
    inverse[token] = inverse_rms(squares, params.in_features, params.epsilon);
  }
}

template <class E, int kTokens>
__device__ __forceinline__ RowNorms<kTokens> row_norms(const GatherParams& params, const GatherSlice& slice) {
  RowNorms<kTokens> norms;
  if (params.norm_weight == nullptr) return norms;
  if (params.x_weight != nullptr) {
    const auto x = [&](int token, int at) {
      return load_chunk<E, true>(static_cast<const uint16_t*>(params.x) + token * params.x_stride + at, kChunk);
    };
    inverse_norms<kTokens>(params, slice.squares + kTokens * kGatherMaxWarps, x, norms.before);
  }
  const auto hidden = [&](int token, int at) { return load_hidden<E>(params, token, at, norms.before[token]); };
  inverse_norms<kTokens>(params, slice.squares, hidden, norms.inverse);
  return norms;
}

// Loads kChunk features of a token and stores z = x - shift and their keys; zeros beyond the slice and the tokens.
// `vector`: x, channel_scale and shift can be read 16 bytes at a time. `before` and `inverse`: of the token's norms.
template <class E>
__device__ __forceinline__ void load_inputs(const GatherParams& params, const GatherSlice& slice, int token,
                                            int feature, bool vector, float before, float inverse) {
  const bool selects = params.pattern.keep > 0;
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
        if (slice.first_tile) {
          const int64_t row = int64_t{token} * params.in_features;
          store_chunk<E, true>(static_cast<uint16_t*>(params.hidden) + row + at, z, kChunk);
        }
      }
      normalise(z, inverse,
                __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(params.norm_weight) + at)),
                params.unit_offset);
    }
    if (selects && params.eta != nullptr) subtract(z, __ldg(params.eta + token));
    if (selects && params.shift != nullptr) {
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

// Whether a feature of the slice survives in a token.
__device__ __forceinline__ bool survives(const GatherParams& params, const GatherSlice& slice, int token, int feature) {
  const int group = params.pattern.group, own = feature & (group - 1);
  const uint32_t* keys = slice.keys + token * slice.size + feature - own;
  const int rank =
      params.channel_scale == nullptr ? rank_in_group<true>(keys, group, own) : rank_in_group<false>(keys, group, own);
  return feature < slice.count && rank < params.pattern.keep;
}

// For one token and a pattern: handles this warp's share of the features, from x to their slots in the list, without a
// block barrier.
template <class E>
__device__ __forceinline__ void select_share(const GatherParams& params, const GatherSlice& slice, bool vector,
                                             float before, float inverse) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int blocks = slice.size / 32, share = ceil_div(blocks, warps);
  const int begin = min(static_cast<int>(threadIdx.x) / 32 * share, blocks), end = min(begin + share, blocks);
  const int per_block = 32 / params.pattern.group * params.pattern.keep;
#pragma unroll 1
  for (int feature = 32 * begin + kChunk * lane; feature < 32 * end; feature += 32 * kChunk) {
    load_inputs<E>(params, slice, 0, feature, vector, before, inverse);
  }
  __syncwarp();
#pragma unroll 1
  for (int block = begin; block < end; ++block) {
    const int feature = 32 * block + lane;
    const bool kept = survives(params, slice, 0, feature);
    const uint32_t mask = __ballot_sync(kAllLanes, kept);
    if (!kept) continue;
    const int slot = block * per_block + __popc(mask & ((1u << lane) - 1u));
    slice.rows[slot] = static_cast<uint16_t>(feature);
    slice.coefficients[slot] = slice.z[feature];
  }
}

// Sets bit f % 32 of masks[token][f / 32] if feature f of the slice survives in that token.
template <int kTokens>
__device__ __forceinline__ void mark_survivors(const GatherParams& params, const GatherSlice& slice) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int blocks = slice.size / 32;
  for (int block = static_cast<int>(threadIdx.x) / 32; block < blocks; block += warps) {
    const int feature = 32 * block + lane;
#pragma unroll 1
    for (int token = 0; token < kTokens; ++token) {
      bool kept = token < params.tokens && feature < slice.count;
      if (params.pattern.keep == 0) {
        kept = kept && (slice.z[token * slice.size + feature] & 0x7FFFu) != 0;
      } else if (token < params.tokens) {
        kept = survives(params, slice, token, feature);
      }
      const uint32_t mask = __ballot_sync(kAllLanes, kept);
      if (lane == 0) slice.masks[token * blocks + block] = mask;
    }
  }
}

template <int kTokens>
__device__ __forceinline__ uint32_t union_mask(const GatherSlice& slice, int block) {
  uint32_t mask = 0;
#pragma unroll
  for (int token = 0; token < kTokens; ++token) mask |= slice.masks[token * (slice.size / 32) + block];
  return mask;
}

// offsets[b] = number of survivors before block b of 32 features; the last entry is their total. Computed by the first
// warp.
template <int kTokens>
__device__ __forceinline__ void sum_counts(const GatherSlice& slice) {
  const int lane = static_cast<int>(threadIdx.x), blocks = slice.size / 32;
  if (lane >= 32) return;
  int before = 0;
  for (int first = 0; first < blocks; first += 32) {
    const int block = first + lane;
    const int own = block < blocks ? __popc(union_mask<kTokens>(slice, block)) : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (block < blocks) slice.offsets[block] = before + sum - own;
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) slice.offsets[blocks] = before;
}

// Writes the list: rows in ascending order, each with the value of every token (0 where it does not survive in a
// token).
template <int kTokens>
__device__ __forceinline__ void list_survivors(const GatherSlice& slice) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  const int blocks = slice.size / 32;
  for (int block = static_cast<int>(threadIdx.x) / 32; block < blocks; block += warps) {
    const uint32_t mask = union_mask<kTokens>(slice, block);
    if ((mask >> lane & 1u) == 0) continue;
    const int slot = slice.offsets[block] + __popc(mask & ((1u << lane) - 1u)), feature = 32 * block + lane;
    slice.rows[slot] = static_cast<uint16_t>(feature);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const bool kept = slice.masks[token * blocks + block] >> lane & 1u;
      slice.coefficients[slot * kTokens + token] = kept ? slice.z[token * slice.size + feature] : uint16_t{0};
    }
  }
}

// Fills the list and returns its length; ends with a barrier.
template <class E, int kTokens>
__device__ __forceinline__ int select_survivors(const GatherParams& params, const GatherSlice& slice, bool vector) {
  const RowNorms<kTokens> norms = row_norms<E, kTokens>(params, slice);
  if (kTokens == 1 && params.pattern.keep > 0) {
    select_share<E>(params, slice, vector, norms.before[0], norms.inverse[0]);
    __syncthreads();
    return slice.count / params.pattern.group * params.pattern.keep;
  }
  const int chunks = slice.size / kChunk;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * chunks; i += static_cast<int>(blockDim.x)) {
    const int token = i / chunks;
    float before = norms.before[0], inverse = norms.inverse[0];
#pragma unroll
    for (int other = 1; other < kTokens; ++other) {
      before = token == other ? norms.before[other] : before;
      inverse = token == other ? norms.inverse[other] : inverse;
    }
    load_inputs<E>(params, slice, token, i % chunks * kChunk, vector, before, inverse);
  }
  __syncthreads();
  mark_survivors<kTokens>(params, slice);
  __syncthreads();
  sum_counts<kTokens>(slice);
  __syncthreads();
  list_survivors<kTokens>(slice);
  __syncthreads();
  return slice.offsets[slice.size / 32];
}

}  // namespace nm_act
