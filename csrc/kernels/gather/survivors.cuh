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

#include "inputs.cuh"

namespace nm_act {

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

// Whether a feature of the slice survives in a token.
__device__ __forceinline__ bool survives(const GatherParams& params, const GatherSlice& slice, int token, int feature) {
  const int group = params.pattern.group, own = feature & (group - 1);
  const uint32_t* keys = slice.keys + token * slice.size + feature - own;
  if (feature >= slice.count) return false;
  const int rank =
      params.channel_scale == nullptr ? rank_in_group<true>(keys, group, own) : rank_in_group<false>(keys, group, own);
  return rank < params.pattern.keep;
}

// The blocks of 32 features that a warp handles when each warp has its own share.
struct WarpShare {
  int begin, end;
};

__device__ __forceinline__ WarpShare warp_share(const GatherSlice& slice) {
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int blocks = slice.size / 32, share = ceil_div(blocks, warps);
  const int begin = min(static_cast<int>(threadIdx.x) / 32 * share, blocks);
  return {begin, min(begin + share, blocks)};
}

// Loads this warp's share for one token, without a block barrier.
template <class E>
__device__ __forceinline__ void load_share(const GatherParams& params, const GatherSlice& slice, bool vector,
                                           float before, float inverse) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const WarpShare share = warp_share(slice);
#pragma unroll 1
  for (int feature = 32 * share.begin + kChunk * lane; feature < 32 * share.end; feature += 32 * kChunk) {
    load_inputs<E>(params, slice, 0, feature, vector, before, inverse);
  }
  __syncwarp();
}

// For one token and a pattern: puts the survivors of this warp's share into their slots of the list.
__device__ __forceinline__ void list_share(const GatherParams& params, const GatherSlice& slice) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int per_block = 32 / params.pattern.group * params.pattern.keep;
  const WarpShare share = warp_share(slice);
#pragma unroll 1
  for (int block = share.begin; block < share.end; ++block) {
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
  if constexpr (kTokens == 1) {
    if (params.pattern.keep > 0) {
      if (holds_row(params)) {
        load_held_row<E>(params, slice, vector);
      } else {
        const RowNorms<1> norms = row_norms<E, 1>(params, slice);
        load_share<E>(params, slice, vector, norms.before[0], norms.inverse[0]);
      }
      list_share(params, slice);
      __syncthreads();
      return slice.count / params.pattern.group * params.pattern.keep;
    }
  }
  const RowNorms<kTokens> norms = row_norms<E, kTokens>(params, slice);
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
