// Attention of one new token per sequence over a static cache, in one launch with the rotary embedding of its query and
// key and the write of its key and value into the cache:
//
//   y = softmax(scaling * q K^T) V over the last `window` of a sequence's tokens, the new one included
//
// with an RMSNorm of each head of q and k before the embedding, if the norms' weights are given.
//
// A cluster computes one key head of one sequence with its query heads; its blocks divide the tokens, and the warps of
// a block take 16 of them at a time. Both products run on tensor cores, mma.m16n8k16. Since the order of features
// within a product is free, fragments are loaded from the cache without rearranging:
//
//   scores[head, token] = Q K^T: a lane's 16 bytes of a key are its words of operand B for two k-steps;
//   y^T[feature, head] += V^T P: a lane has the same eight features of four tokens, whose words are interleaved to
//                                operand A, and its scores are already operand B.
//
// Each warp keeps its own running maximum, sum and output (float32). The results are combined in a fixed order: through
// shared memory over the warps, through distributed shared memory over the blocks. No partial result reaches global
// memory. Rounding is that of flash attention: rotated values and probabilities to the element type, scores, softmax
// and sums in float32.
//
// Tried and dropped: docs/kernels/decode_attention.md.
#include <cfloat>

#include "../gather/block.cuh"
#include "../launch.cuh"
#include "rotate.cuh"
#include "tile.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 16;              // of a warp in one step
constexpr int kHeads = 8;                // query heads of a key head, the columns of a product
constexpr int kStep = kWarps * kTokens;  // tokens of a block in one step

// A block's shared memory: first what all warps read, then the results.
template <int kDim>
struct Layout {
  static constexpr int kQuery = 0;                                     // E [8, dim]: rotated
  static constexpr int kKey = kQuery + 2 * kHeads * kDim;              // E [dim]: the new key
  static constexpr int kValue = kKey + 2 * kDim;                       // E [dim]: the new value
  static constexpr int kSums = kValue + 2 * kDim;                      // [warps, 8, dim]
  static constexpr int kTops = kSums + 4 * kWarps * kHeads * kDim;     // [warps, 8, 2]: maxima and sums
  static constexpr int kReceived = kTops + 4 * kWarps * kHeads * 2;    // [splits, heads * dim / splits]
  static constexpr int kReceivedTops = kReceived + 4 * kHeads * kDim;  // [splits, 8, 2]
  static int bytes(int splits) { return kReceivedTops + 4 * splits * kHeads * 2; }
};

template <class E>
__device__ __forceinline__ Chunk<E> load_shared(const uint16_t* source) {
  const uint4 vector = *reinterpret_cast<const uint4*>(source);
  return {{vector.x, vector.y, vector.z, vector.w}};
}

// Keys of 16 tokens: lane 4 * i + j holds tokens i and 8 + i, and of every 32 features the eight from 8 * j on.
template <class E, int kDim>
struct Keys {
  Chunk<E> of[2][kDim / 32];
};

// Values of 16 tokens: lane 4 * i + j holds tokens 2 * j, 2 * j + 1, 2 * j + 8 and 2 * j + 9, and of every 64 features
// the eight from 8 * i on.
template <class E, int kDim>
struct Values {
  Chunk<E> of[4][kDim / 64];
};

// Softmax over some tokens. Lane 4 * i + j holds the maximum and its own share of the sum of head i, and outputs of
// heads 2 * j and 2 * j + 1: of every 64 features the pairs from 8 * i on.
template <int kDim>
struct Partial {
  float top = -FLT_MAX, sum = 0.0f;
  float output[kDim / 16][4] = {};
};

template <class E, int kDim>
struct Warp {
  static constexpr int kKeyChunks = kDim / 32, kValueChunks = kDim / 64;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, column = lane % 4;
  Chunk<E> query[kKeyChunks];  // of head `row`
  Partial<kDim> partial;
  float scale;  // of scores, for exp2

  // The token of row i of a lane's keys or values.
  __device__ int key_token(int i) const { return 8 * i + row; }
  __device__ int value_token(int i) const { return 2 * column + i % 2 + 8 * (i / 2); }

  __device__ __forceinline__ void load(Keys<E, kDim>& keys, const uint16_t* cache, int first, int end,
                                       int begin) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = first + key_token(i);
      const uint16_t* from = cache + int64_t{token < end ? token : begin} * kDim + 8 * column;
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) keys.of[i][c] = load_chunk<E, true>(from + 32 * c, kChunk);
    }
  }
  __device__ __forceinline__ void load(Values<E, kDim>& values, const uint16_t* cache, int first, int end,
                                       int begin) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + value_token(i);
      const uint16_t* from = cache + int64_t{token < end ? token : begin} * kDim + 8 * row;
#pragma unroll
      for (int c = 0; c < kValueChunks; ++c) values.of[i][c] = load_chunk<E, true>(from + 64 * c, kChunk);
    }
  }

  // Probabilities of 16 tokens, of which `real` are, relative to the new maximum: operand B of the second product.
  __device__ __forceinline__ void score(const Keys<E, kDim>& keys, int real, uint32_t (&probability)[2]) {
    float scores[2][2][4] = {};  // of eight tokens each, in two sums, so that two products are in flight
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_tile<E>(scores[i][half], query[c].word[2 * half], 0, query[c].word[2 * half + 1], 0,
                           keys.of[i][c].word[2 * half], keys.of[i][c].word[2 * half + 1]);
        }
      }
    }
    float value[4], most = partial.top;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = value_token(i) < real ? scale * (scores[i / 2][0][i % 2] + scores[i / 2][1][i % 2]) : -FLT_MAX;
      most = fmaxf(most, value[i]);
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    if (__any_sync(kAllLanes, most > partial.top)) {
      const float shrink = exp2f(partial.top - most);
      partial.sum *= shrink;
      const float low = __shfl_sync(kAllLanes, shrink, 8 * column),
                  high = __shfl_sync(kAllLanes, shrink, 8 * column + 4);
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        partial.output[i][0] *= low;
        partial.output[i][1] *= high;
        partial.output[i][2] *= low;
        partial.output[i][3] *= high;
      }
      partial.top = most;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = value_token(i) < real ? exp2f(value[i] - most) : 0.0f;
      partial.sum += value[i];
    }
    probability[0] = E::pack(value[0], value[1]);
    probability[1] = E::pack(value[2], value[3]);
  }

  __device__ __forceinline__ void add(const Values<E, kDim>& values, const uint32_t (&probability)[2]) {
#pragma unroll
    for (int c = 0; c < kValueChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a = values.of[0][c].word[i], b = values.of[1][c].word[i], d = values.of[2][c].word[i],
                       e = values.of[3][c].word[i];
        multiply_tile<E>(partial.output[4 * c + i], __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                         __byte_perm(d, e, 0x5410), __byte_perm(d, e, 0x7632), probability[0], probability[1]);
      }
    }
  }
};

// While the previous kernel ends, prefetches to L2 the small vectors that its stream of weights may have displaced.
template <int kDim>
__device__ __forceinline__ void fetch_vectors(const DecodeAttentionParams& params, int sequence) {
  constexpr int kLine = 64, kLines = kDim / kLine;  // in elements
  const int vector = static_cast<int>(threadIdx.x) / kLines, at = static_cast<int>(threadIdx.x) % kLines * kLine;
  const int64_t angle = (params.cos_batch > 1 ? int64_t{sequence} : 0) * kDim;
  const auto fetch = [at](const void* base, int64_t from) {
    if (base != nullptr) prefetch_line(static_cast<const uint16_t*>(base) + from + at);
  };
  if (vector == 0) fetch(params.cos, angle);
  if (vector == 1) fetch(params.sin, angle);
  if (vector == 2) fetch(params.norms.q, 0);
  if (vector == 3) fetch(params.norms.k, 0);
  if (vector == 4 && at == 0) prefetch_line(params.lengths + sequence);
}

template <class E, int kDim>
__global__ void __launch_bounds__(kThreads)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams params, const int splits) {
  using L = Layout<kDim>;
  if (splits > 1) arrive_at_cluster();
  unsigned char* const shared = dynamic_shared();
  auto* const queries = reinterpret_cast<uint16_t*>(shared + L::kQuery);
  auto* const new_key = reinterpret_cast<uint16_t*>(shared + L::kKey);
  auto* const new_value = reinterpret_cast<uint16_t*>(shared + L::kValue);
  auto* const sums = reinterpret_cast<float*>(shared + L::kSums);
  auto* const tops = reinterpret_cast<float*>(shared + L::kTops);
  auto* const received = reinterpret_cast<float*>(shared + L::kReceived);
  auto* const received_tops = reinterpret_cast<float*>(shared + L::kReceivedTops);
  const int rank = static_cast<int>(blockIdx.x) % splits, head = static_cast<int>(blockIdx.x) / splits;
  const int heads = params.q_heads / params.k_heads;  // of this cluster
  const int sequence = head / params.k_heads, key_head = head % params.k_heads;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int64_t cached = (int64_t{sequence} * params.k_heads + key_head) * params.max_tokens * kDim;
  auto* const keys = static_cast<uint16_t*>(params.keys) + cached;
  auto* const values = static_cast<uint16_t*>(params.values) + cached;

  fetch_vectors<kDim>(params, sequence);
  wait_for_previous_kernel();
  allow_next_kernel();

  // The rotated queries, and the new key and value: a thread has a piece of one head. Loaded before the length, which
  // would delay them.
  constexpr int kPieces = kDim / 2 / kChunk;
  static_assert((kHeads + 2) * kPieces <= kThreads);
  const int row = thread / kPieces, feature = thread % kPieces * kChunk;
  const bool is_query = row < kHeads, is_key = row == kHeads, has_piece = row < kHeads + 2;
  Piece<E> piece{zero_chunk<E>(), zero_chunk<E>()}, cosine = piece, sine = piece;
  if (has_piece && (!is_query || row < heads)) {
    const void* source = is_query ? params.q : is_key ? params.k : params.v;
    const int64_t stride = is_query ? params.q_stride : is_key ? params.k_stride : params.v_stride;
    const int at_head = is_query ? key_head * heads + row : key_head;
    const int64_t angle = (params.cos_batch > 1 ? int64_t{sequence} : 0) * kDim;
    piece = load_piece<E>(source, sequence * stride + int64_t{at_head} * kDim + feature, kDim / 2);
    cosine = load_piece<E>(params.cos, angle + feature, kDim / 2);
    sine = load_piece<E>(params.sin, angle + feature, kDim / 2);
  }
  // A length out of range counts as no tokens: nothing is written, and 0 / 0 gives NaN.
  const int given = params.lengths[sequence], length = given < 0 || given > params.max_tokens ? 0 : given;
  const int start = params.window > 0 ? max(0, length - params.window) : 0;
  const int share = (length - start + splits - 1) / splits;
  const int begin = min(start + rank * share, length), end = min(begin + share, length);
  const int last = length - 1;  // the new token's place
  const bool owns_new = last >= begin && last < end;
  if (has_piece) {
    if (!is_query || row < heads) {
      const void* norm = is_query ? params.norms.q : is_key ? params.norms.k : nullptr;
      if (norm != nullptr) normalise_head(piece, norm, feature, kPieces, params.norms);
      if (is_query || is_key) piece = rotate<E>(piece, cosine, sine);
      if (!is_query && owns_new) {
        store_piece<E>(is_key ? keys : values, int64_t{last} * kDim + feature, kDim / 2, piece);
      }
    }
    store_piece<E>(is_query ? queries + row * kDim : is_key ? new_key : new_value, feature, kDim / 2, piece);
  }
  __syncthreads();

  Warp<E, kDim> team;
  team.scale = params.scaling * 1.4426950408889634f;
#pragma unroll
  for (int c = 0; c < team.kKeyChunks; ++c) {
    team.query[c] = load_shared<E>(queries + team.row * kDim + 32 * c + 8 * team.column);
  }
  uint32_t probability[2];
  const int old_end = owns_new ? last : end;
  if (owns_new && warp == kWarps - 1) {  // the first of 16 tokens, of which the others are zero
    Keys<E, kDim> key{};
    Values<E, kDim> value{};
    if (team.row == 0) {
#pragma unroll
      for (int c = 0; c < team.kKeyChunks; ++c) {
        key.of[0][c] = load_shared<E>(new_key + 32 * c + 8 * team.column);
      }
    }
    if (team.column == 0) {
#pragma unroll
      for (int c = 0; c < team.kValueChunks; ++c) {
        value.of[0][c] = load_shared<E>(new_value + 64 * c + 8 * team.row);
      }
    }
    team.score(key, 1, probability);
    team.add(value, probability);
  }
  // Where registers suffice, the next tile is loaded while this one is multiplied; else keys and values together.
  constexpr bool kAhead = kDim <= 128;
  int first = begin + warp * kTokens;
  Keys<E, kDim> key;
  Values<E, kDim> value;
  const auto load_keys = [&](int at) {
    if (at < old_end) team.load(key, keys, at, old_end, begin);
  };
  const auto load_values = [&](int at) {
    if (at < old_end) team.load(value, values, at, old_end, begin);
  };
  const auto load_both = [&](int at) {
    load_keys(at);
    load_values(at);
  };
  if constexpr (kAhead) load_both(first);
#pragma unroll 1
  for (; first < old_end; first += kStep) {
    if constexpr (!kAhead) load_both(first);
    team.score(key, old_end - first, probability);
    if constexpr (kAhead) load_keys(first + kStep);
    team.add(value, probability);
    if constexpr (kAhead) load_values(first + kStep);
  }

  // The warps' results.
  const float sum = team.partial.sum + __shfl_xor_sync(kAllLanes, team.partial.sum, 1);
  const float whole = sum + __shfl_xor_sync(kAllLanes, sum, 2);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const int feature = 64 * (i / 4) + 8 * team.row + 2 * (i % 4);
    float* to = sums + (warp * kHeads + 2 * team.column) * kDim + feature;
    *reinterpret_cast<float2*>(to) = make_float2(team.partial.output[i][0], team.partial.output[i][2]);
    *reinterpret_cast<float2*>(to + kDim) = make_float2(team.partial.output[i][1], team.partial.output[i][3]);
  }
  if (team.column == 0) {
    tops[(warp * kHeads + team.row) * 2] = team.partial.top;
    tops[(warp * kHeads + team.row) * 2 + 1] = whole;
  }
  __syncthreads();
  // A peer's shared memory may be written only after that block has started.
  if (splits > 1) wait_for_cluster();
  const int all = heads * kDim, outputs = all / splits;  // outputs of a block; splits is a power of two of at most 16
  for (int i = thread; i < all; i += kThreads) {
    const int g = i / kDim, feature = i % kDim;
    float top = -FLT_MAX, total = 0.0f, output = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, tops[(w * kHeads + g) * 2]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float shrink = exp2f(tops[(w * kHeads + g) * 2] - top);
      total += shrink * tops[(w * kHeads + g) * 2 + 1];
      output += shrink * sums[(w * kHeads + g) * kDim + feature];
    }
    write_peer(received + rank * outputs + i % outputs, i / outputs, output);
    if (feature < splits) {  // everybody gets everybody's maxima and sums
      float* to = received_tops + (rank * kHeads + g) * 2;
      write_peer(to, feature, top);
      write_peer(to + 1, feature, total);
    }
  }
  if (splits > 1) {
    arrive_at_cluster();
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  for (int i = thread; i < outputs; i += kThreads) {
    const int g = (rank * outputs + i) / kDim, feature = (rank * outputs + i) % kDim;
    const float* from = received_tops + g * 2;
    float top = -FLT_MAX, total = 0.0f, output = 0.0f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, from[s * kHeads * 2]);
    for (int s = 0; s < splits; ++s) {
      const float shrink = exp2f(from[s * kHeads * 2] - top);
      total += shrink * from[s * kHeads * 2 + 1];
      output += shrink * received[s * outputs + i];
    }
    const int64_t at = (int64_t{sequence} * params.q_heads + key_head * heads + g) * kDim + feature;
    static_cast<uint16_t*>(params.y)[at] = static_cast<uint16_t>(E::pack(output / total, 0.0f));
  }
}

// Launches with the largest number of blocks per cluster (kSplits, or halved repeatedly) with which all clusters run at
// once. If a cluster had to wait for the others, it would then read its cache while the rest of the device is idle.
template <class E, int kDim, int kSplits = 16>
cudaError_t launch_shape(const DecodeAttentionParams& params, cudaStream_t stream) {
  constexpr auto kKernel = decode_attention_kernel<E, kDim>;
  const int heads = params.batch * params.k_heads;
  const LaunchShape shape{static_cast<unsigned>(heads) * kSplits, kThreads, kSplits, Layout<kDim>::bytes(kSplits)};
  if constexpr (kSplits > 1) {
    if (heads > resident_clusters<kKernel, kSplits>(shape)) return launch_shape<E, kDim, kSplits / 2>(params, stream);
  }
  return launch_kernel(kKernel, shape, stream, params, kSplits);
}

template <class E>
cudaError_t launch_typed(const DecodeAttentionParams& params, cudaStream_t stream) {
  switch (params.dim) {
    case 64: return launch_shape<E, 64>(params, stream);
    case 128: return launch_shape<E, 128>(params, stream);
    default: return launch_shape<E, 256>(params, stream);
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
  switch (params.type) {
    case ElementType::kBFloat16: return launch_typed<BFloat16>(params, stream);
    case ElementType::kFloat16: return launch_typed<Float16>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
