// Attention of one new token per sequence over a static cache, in one launch with the rotary embedding of its query and
// key and the write of its key and value into the cache:
//
//   y = softmax(scaling * q K^T) V over the last `window` of a sequence's tokens, the new one included
//
// with RMSNorm of each head of q and k before the embedding, if their weights are given.
//
// A cluster has one key head of one sequence and kGroup of its query heads; its blocks divide the tokens. In a block,
// kDim / 8 lanes share a token: each has eight features of its key and value, and of the query heads. Such a team keeps
// its own running maximum, sum and output of every query head (float32), over kTokens tokens whose loads are all issued
// before the first is used. The teams' results are combined in a fixed order: within the warp, through shared memory over
// the warps, through distributed shared memory over the blocks. No partial result reaches global memory. Rounding is that
// of Transformers' modules: rotated values to the element type, softmax and sums in float32, y to the element type.
//
// Tried and dropped (docs/kernels/decode_attention.md): the cache through cp.async into shared memory, twice the blocks
// with half the query heads each, small blocks with the cache prefetched to L2.
#include <cfloat>

#include "../gather/block.cuh"
#include "../launch.cuh"
#include "rotate.cuh"

namespace nm_act {
namespace {

constexpr int kTokens = 4;  // of a team in one step

// Threads of a block with so many query heads, which take registers.
template <int kGroup>
constexpr int block_threads() {
  return kGroup <= 4 ? 512 : 256;
}

template <int kDim, int kGroup>
struct Shape {
  static constexpr int kThreads = block_threads<kGroup>(), kWarps = kThreads / 32;
  static constexpr int kLanes = kDim / kChunk, kTeams = kThreads / kLanes;
  static constexpr int kOutputs = kGroup * kDim;
};

// Floats of a block's shared memory.
template <int kDim, int kGroup>
struct Layout {
  using S = Shape<kDim, kGroup>;
  static constexpr int kQuery = 0;                                  // [group, dim]: rotated, scaled
  static constexpr int kKey = kQuery + S::kOutputs;                 // [dim]: the new key
  static constexpr int kValue = kKey + kDim;                        // [dim]: the new value
  static constexpr int kSums = kValue + kDim;                       // [warps, group, dim]
  static constexpr int kTops = kSums + S::kWarps * S::kOutputs;     // [warps, group, 2]: maxima and sums
  static constexpr int kReceived = kTops + S::kWarps * kGroup * 2;  // [splits, dim * group / splits]
  static constexpr int kReceivedTops = kReceived + S::kOutputs;     // [splits, group, 2]
  static int bytes(int splits) { return 4 * (kReceivedTops + splits * kGroup * 2); }
};

template <class E>
__device__ __forceinline__ void unpack(const Chunk<E>& chunk, float (&value)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) value[i] = chunk.get(i);
}

// Softmax over some tokens: the largest score, the sum of exponentials and of weighted values, for each query head.
template <int kGroup>
struct Partial {
  float top[kGroup], sum[kGroup], output[kGroup][kChunk];
};

template <int kGroup>
__device__ __forceinline__ void merge(Partial<kGroup>& a, int g, float top, float sum, const float (&output)[kChunk]) {
  const float most = fmaxf(a.top[g], top);
  const float mine = exp2f(a.top[g] - most), theirs = exp2f(top - most);
  a.top[g] = most;
  a.sum[g] = a.sum[g] * mine + sum * theirs;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) a.output[g][i] = a.output[g][i] * mine + output[i] * theirs;
}

// Adds tokens with their keys and values; `real[t]` is false for a token beyond the range.
template <class E, int kLanes, int kGroup, int kCount>
__device__ __forceinline__ void add_tokens(Partial<kGroup>& partial, const float (&query)[kGroup][kChunk],
                                           const Chunk<E> (&key)[kCount], const Chunk<E> (&value)[kCount],
                                           const bool (&real)[kCount]) {
  float score[kCount][kGroup];
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    float k[kChunk];
    unpack(key[t], k);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) dot = fmaf(query[g][i], k[i], dot);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
      score[t][g] = real[t] ? dot : -FLT_MAX;
    }
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float most = partial.top[g];
#pragma unroll
    for (int t = 0; t < kCount; ++t) most = fmaxf(most, score[t][g]);
    const float scale = exp2f(partial.top[g] - most);
    partial.top[g] = most;
    partial.sum[g] *= scale;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) partial.output[g][i] *= scale;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      score[t][g] = real[t] ? exp2f(score[t][g] - most) : 0.0f;
      partial.sum[g] += score[t][g];
    }
  }
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    float v[kChunk];
    unpack(value[t], v);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) partial.output[g][i] = fmaf(score[t][g], v[i], partial.output[g][i]);
    }
  }
}

template <class E, int kDim, int kGroup>
__global__ void __launch_bounds__(block_threads<kGroup>())
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams params, const int splits) {
  using S = Shape<kDim, kGroup>;
  using L = Layout<kDim, kGroup>;
  if (splits > 1) arrive_at_cluster();
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const int rank = static_cast<int>(blockIdx.x) % splits, cluster = static_cast<int>(blockIdx.x) / splits;
  const int group = params.q_heads / params.k_heads, parts = (group + kGroup - 1) / kGroup;
  const int part = cluster % parts, head = cluster / parts;
  const int sequence = head / params.k_heads, key_head = head % params.k_heads;
  // This cluster's query heads.
  const int first_head = key_head * group + part * kGroup, heads = min(kGroup, group - part * kGroup);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % S::kLanes, team = thread / S::kLanes;
  const int64_t cached = (int64_t{sequence} * params.k_heads + key_head) * params.max_tokens * kDim;
  auto* const keys = static_cast<uint16_t*>(params.keys) + cached;
  auto* const values = static_cast<uint16_t*>(params.values) + cached;
  wait_for_previous_kernel();
  allow_next_kernel();

  const int length = min(params.lengths[sequence], params.max_tokens);
  const int start = params.window > 0 ? max(0, length - params.window) : 0;
  const int share = (length - start + splits - 1) / splits;
  const int begin = min(start + rank * share, length), end = min(begin + share, length);
  const int last = length - 1;  // the new token's place
  const bool owns_new = last >= begin && last < end;

  // The rotated query of the group, and the new key and value: a thread takes a piece of one head.
  constexpr int kPieces = kDim / 2 / kChunk;
  const int64_t angle = (params.cos_batch > 1 ? int64_t{sequence} : 0) * kDim;
  for (int i = thread; i < (kGroup + 2) * kPieces; i += S::kThreads) {
    const int row = i / kPieces, feature = i % kPieces * kChunk;
    Piece<E> piece{zero_chunk<E>(), zero_chunk<E>()};
    const Piece<E> cosine = load_piece<E>(params.cos, angle + feature, kDim / 2);
    const Piece<E> sine = load_piece<E>(params.sin, angle + feature, kDim / 2);
    const bool is_query = row < kGroup, is_key = row == kGroup;
    if (!is_query || row < heads) {
      const void* source = is_query ? params.q : is_key ? params.k : params.v;
      const void* norm = is_query ? params.norms.q : is_key ? params.norms.k : nullptr;
      const int64_t stride = is_query ? params.q_stride : is_key ? params.k_stride : params.v_stride;
      const int at_head = is_query ? first_head + row : key_head;
      piece = load_piece<E>(source, sequence * stride + int64_t{at_head} * kDim + feature, kDim / 2);
      if (norm != nullptr) normalise_head(piece, norm, feature, kPieces, params.norms);
      if (is_query || is_key) piece = rotate<E>(piece, cosine, sine);
      if (!is_query && owns_new && part == 0) {
        store_piece<E>(is_key ? keys : values, int64_t{last} * kDim + feature, kDim / 2, piece);
      }
    }
    float* target = shared + (row < kGroup ? L::kQuery + row * kDim : row == kGroup ? L::kKey : L::kValue) + feature;
    const float factor = row < kGroup ? params.scaling * 1.4426950408889634f : 1.0f;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      target[j] = piece.first.get(j) * factor;
      target[kDim / 2 + j] = piece.second.get(j) * factor;
    }
  }
  __syncthreads();

  float query[kGroup][kChunk];
  Partial<kGroup> partial;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    partial.top[g] = -FLT_MAX;
    partial.sum[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      query[g][i] = shared[L::kQuery + g * kDim + lane * kChunk + i];
      partial.output[g][i] = 0.0f;
    }
  }
  const int old_end = owns_new ? last : end;
#pragma unroll 1
  for (int first = begin; first < old_end; first += S::kTeams * kTokens) {
    Chunk<E> key[kTokens], value[kTokens];
    bool real[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int token = first + t * S::kTeams + team;
      real[t] = token < old_end;
      const int64_t at = int64_t{real[t] ? token : begin} * kDim + lane * kChunk;
      key[t] = load_chunk<E, true>(keys + at, kChunk);
      value[t] = load_chunk<E, true>(values + at, kChunk);
    }
    add_tokens<E, S::kLanes>(partial, query, key, value, real);
  }
  if (owns_new) {  // all teams compute it, the first one keeps it
    Chunk<E> key[1], value[1];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const int at = lane * kChunk + 2 * i;
      key[0].set_pair(i, shared[L::kKey + at], shared[L::kKey + at + 1]);
      value[0].set_pair(i, shared[L::kValue + at], shared[L::kValue + at + 1]);
    }
    const bool real[1] = {team == 0};
    add_tokens<E, S::kLanes>(partial, query, key, value, real);
  }

  // Teams of a warp.
#pragma unroll
  for (int offset = S::kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const float top = __shfl_xor_sync(kAllLanes, partial.top[g], offset);
      const float sum = __shfl_xor_sync(kAllLanes, partial.sum[g], offset);
      float output[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) output[i] = __shfl_xor_sync(kAllLanes, partial.output[g][i], offset);
      merge(partial, g, top, sum, output);
    }
  }
  const int warp = thread / 32;
  if (thread % 32 < S::kLanes) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float* sums = shared + L::kSums + (warp * kGroup + g) * kDim + lane * kChunk;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[i] = partial.output[g][i];
      if (lane == 0) {
        shared[L::kTops + (warp * kGroup + g) * 2] = partial.top[g];
        shared[L::kTops + (warp * kGroup + g) * 2 + 1] = partial.sum[g];
      }
    }
  }
  __syncthreads();
  // A peer's shared memory may be written only after that block has started.
  if (splits > 1) wait_for_cluster();
  const int outputs = S::kOutputs / splits;  // that a block finishes; splits is a power of two
  for (int i = thread; i < S::kOutputs; i += S::kThreads) {
    const int g = i / kDim, feature = i % kDim;
    float top = -FLT_MAX, sum = 0.0f, output = 0.0f;
#pragma unroll 4
    for (int w = 0; w < S::kWarps; ++w) top = fmaxf(top, shared[L::kTops + (w * kGroup + g) * 2]);
#pragma unroll 4
    for (int w = 0; w < S::kWarps; ++w) {
      const float scale = exp2f(shared[L::kTops + (w * kGroup + g) * 2] - top);
      sum += scale * shared[L::kTops + (w * kGroup + g) * 2 + 1];
      output += scale * shared[L::kSums + (w * kGroup + g) * kDim + feature];
    }
    write_peer(shared + L::kReceived + rank * outputs + i % outputs, i / outputs, output);
    if (feature < splits) {  // everybody gets everybody's maxima and sums
      float* tops = shared + L::kReceivedTops + (rank * kGroup + g) * 2;
      write_peer(tops, feature, top);
      write_peer(tops + 1, feature, sum);
    }
  }
  if (splits > 1) {
    arrive_at_cluster();
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  for (int i = thread; i < outputs; i += S::kThreads) {
    const int g = (rank * outputs + i) / kDim, feature = (rank * outputs + i) % kDim;
    if (g >= heads) continue;
    const float* tops = shared + L::kReceivedTops + g * 2;
    float top = -FLT_MAX, sum = 0.0f, output = 0.0f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, tops[s * kGroup * 2]);
    for (int s = 0; s < splits; ++s) {
      const float scale = exp2f(tops[s * kGroup * 2] - top);
      sum += scale * tops[s * kGroup * 2 + 1];
      output += scale * shared[L::kReceived + s * outputs + i];
    }
    const int64_t at = (int64_t{sequence} * params.q_heads + first_head + g) * kDim + feature;
    static_cast<uint16_t*>(params.y)[at] = static_cast<uint16_t>(E::pack(output / sum, 0.0f));
  }
}

// How a launch divides the work: clusters of `splits` blocks, each with `group` query heads of a key head.
struct Division {
  int group, splits;
};

// Few heads are divided over up to half of the multiprocessors: more blocks were slower alone, and leave none for the
// blocks of the next product. Many heads go by whole groups.
Division divide(const DecodeAttentionParams& params, int multiprocessors) {
  const int group = params.q_heads / params.k_heads, heads = params.batch * params.k_heads;
  Division division{1, 8};  // the largest portable cluster
  const auto blocks = [&](Division d) { return heads * ((group + d.group - 1) / d.group) * d.splits; };
  while (division.group < group && 2 * blocks(division) > multiprocessors) division.group *= 2;
  while (division.splits > 1 && blocks(division) > multiprocessors) division.splits /= 2;
  return division;
}

template <class E, int kDim, int kGroup>
cudaError_t launch_shape(const DecodeAttentionParams& params, int splits, cudaStream_t stream) {
  const int parts = (params.q_heads / params.k_heads + kGroup - 1) / kGroup;
  const LaunchShape shape{static_cast<unsigned>(params.batch * params.k_heads * parts * splits),
                          block_threads<kGroup>(), static_cast<unsigned>(splits), Layout<kDim, kGroup>::bytes(splits)};
  return launch_kernel(decode_attention_kernel<E, kDim, kGroup>, shape, stream, params, splits);
}

template <class E, int kDim>
cudaError_t launch_group(const DecodeAttentionParams& params, Division division, cudaStream_t stream) {
  switch (division.group) {
    case 1: return launch_shape<E, kDim, 1>(params, division.splits, stream);
    case 2: return launch_shape<E, kDim, 2>(params, division.splits, stream);
    case 4: return launch_shape<E, kDim, 4>(params, division.splits, stream);
    default: return launch_shape<E, kDim, 8>(params, division.splits, stream);
  }
}

template <class E>
cudaError_t launch_typed(const DecodeAttentionParams& params, Division division, cudaStream_t stream) {
  switch (params.dim) {
    case 64: return launch_group<E, 64>(params, division, stream);
    case 128: return launch_group<E, 128>(params, division, stream);
    default: return launch_group<E, 256>(params, division, stream);
  }
}

bool fits(const DecodeAttentionParams& p) {
  constexpr auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return decode_attention_supports(p.q_heads, p.k_heads, p.dim) && p.q_stride % kChunk == 0 &&
         p.k_stride % kChunk == 0 && p.v_stride % kChunk == 0 && aligned(p.q) && aligned(p.k) && aligned(p.v) &&
         aligned(p.cos) && aligned(p.sin) && aligned(p.keys) && aligned(p.values) && fits(p.norms, p.dim);
}

}  // namespace

cudaError_t launch_decode_attention(const DecodeAttentionParams& params, GemmDevice device, cudaStream_t stream) {
  if (!fits(params) || device.compute_capability_major != 9) return cudaErrorInvalidValue;
  if (params.batch == 0) return cudaSuccess;
  const Division division = divide(params, device.multiprocessors);
  switch (params.type) {
    case ElementType::kBFloat16: return launch_typed<BFloat16>(params, division, stream);
    case ElementType::kFloat16: return launch_typed<Float16>(params, division, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
