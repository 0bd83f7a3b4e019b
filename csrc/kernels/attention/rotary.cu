// Rotary position embedding of queries and keys, and the write of keys and values into a cache, in one pass:
//
//   rotated = round(round(x * cos) + round(rotate_half(x) * sin)),  rotate_half(x) = [-x2, x1] of the halves [x1, x2]
//
// with x = norm(head, weight) if the heads are normalised.
//
// A thread has one piece (rotate.cuh) of kHeads heads: it loads the piece's cosines and sines once and issues all
// heads' loads before it uses the first. Limit: rows of whole aligned pieces, dim % 16 == 0.
#include "../launch.cuh"
#include "rotate.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;

template <class E>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryParams params) {
  const int half = params.dim / 2, pieces = half / kChunk;
  const int value_heads = params.v.data != nullptr ? params.k.heads : 0,
            all_heads = params.q.heads + params.k.heads + value_heads;
  const int groups = (all_heads + kHeads - 1) / kHeads;
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned per_token = static_cast<unsigned>(groups * pieces);
  const unsigned row = thread / per_token, in_row = thread - row * per_token;
  const int first_head = static_cast<int>(in_row) / pieces * kHeads,
            feature = static_cast<int>(in_row) % pieces * kChunk;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (row >= static_cast<unsigned>(params.batch * params.tokens)) return;
  const int sequence = static_cast<int>(row) / params.tokens, token = static_cast<int>(row) % params.tokens;

  const int64_t angle = (params.cos_batch > 1 ? int64_t{row} : token) * params.dim + feature;
  const Piece<E> cosine = load_piece<E>(params.cos, angle, half), sine = load_piece<E>(params.sin, angle, half);
  const int64_t position =
      params.lengths == nullptr ? token : int64_t{params.lengths[sequence]} - params.tokens + token;

  // A head's tensor and its place in it. Queries come first, then keys, then values.
  const auto part_of = [&](int head, int& place) -> const RotaryPart& {
    if (head < params.q.heads) return place = head, params.q;
    head -= params.q.heads;
    if (head < params.k.heads) return place = head, params.k;
    return place = head - params.k.heads, params.v;
  };
  Piece<E> piece[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i >= all_heads) break;
    int place;
    const RotaryPart& part = part_of(first_head + i, place);
    piece[i] = load_piece<E>(
        part.data, sequence * part.batch_stride + token * part.token_stride + int64_t{place} * params.dim + feature,
        half);
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i >= all_heads) break;
    int place;
    const RotaryPart& part = part_of(first_head + i, place);
    const int64_t at_token = &part == &params.q ? token : position;
    if (at_token < 0 || at_token >= part.out_tokens) continue;
    const void* norm = &part == &params.q ? params.norms.q : &part == &params.k ? params.norms.k : nullptr;
    if (norm != nullptr) normalise_head(piece[i], norm, feature, pieces, params.norms);
    const int64_t at =
        sequence * part.out_batch_stride + at_token * part.out_token_stride + place * part.out_head_stride + feature;
    store_piece<E>(part.out, at, half, &part == &params.v ? piece[i] : rotate<E>(piece[i], cosine, sine));
  }
}

bool fits(const RotaryPart& part) {
  constexpr auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  return aligned(part.data) && aligned(part.out) && part.batch_stride % kChunk == 0 &&
         part.token_stride % kChunk == 0 && part.out_batch_stride % kChunk == 0 &&
         part.out_token_stride % kChunk == 0 && part.out_head_stride % kChunk == 0;
}

}  // namespace

cudaError_t launch_rotary(const RotaryParams& params, cudaStream_t stream) {
  const bool values = params.v.data != nullptr;
  if (params.dim % (2 * kChunk) != 0 || params.dim <= 0 || !fits(params.q) || !fits(params.k) ||
      (values && !fits(params.v)) || reinterpret_cast<uintptr_t>(params.cos) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(params.sin) % 16 != 0 || !fits(params.norms, params.dim)) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = int64_t{params.batch} * params.tokens;
  const int heads = params.q.heads + params.k.heads * (values ? 2 : 1);
  const int64_t threads = rows * ((heads + kHeads - 1) / kHeads) * (params.dim / (2 * kChunk));
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (threads == 0) return cudaSuccess;
  if (threads > INT32_MAX) return cudaErrorInvalidValue;
  switch (params.type) {
    case ElementType::kBFloat16:
      return launch_kernel(rotary_kernel<BFloat16>, static_cast<unsigned>(blocks), kThreads, stream, params);
    case ElementType::kFloat16:
      return launch_kernel(rotary_kernel<Float16>, static_cast<unsigned>(blocks), kThreads, stream, params);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
