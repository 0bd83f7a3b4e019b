// Gather: y[t] = sum over surviving k of p[t, k] * W[k, :], reading only those rows of a weight stored [in, out].
//
// The work is divided by output columns, never by rows, so threads share nothing and every sum has one order. Within a
// block of columns, kGatherUnroll rows are processed together: their products are summed in registers and added once to
// the block's float32 accumulators, which keeps the loop at memory speed and shortens the chain of roundings. The rows
// are far apart and at no fixed stride, so hardware prefetchers do not help, and the loop prefetches the next rows
// itself. docs/kernels/cpu_decode.md has the floor and the variants that were measured.
#include <algorithm>

#include "cpu/isa/epilogue.h"
#include "cpu/isa/table.h"

namespace nm_act::cpu::NM_ACT_ISA {
namespace {

// Accumulators per block: 16 KiB, half of the usual L1. The longer the run along a row, the faster memory is read.
constexpr int64_t kAccumulators = 4096;
constexpr int kUnroll = kGatherUnroll;

// A multiple of a cache line for every dtype, so that only the last columns of the weight take the scalar loop and
// results do not depend on how the columns are divided.
constexpr int64_t block_columns(int tokens) { return kAccumulators / tokens / kGatherColumns * kGatherColumns; }

template <class T, int Tokens>
void gather_block(const GatherParams& p, int64_t begin, int64_t end) {
  const int64_t columns = end - begin;
  const int64_t vector_columns = columns / kLanes * kLanes;
  float acc[Tokens][block_columns(Tokens)] = {};
  const T* weight = static_cast<const T*>(p.weight) + begin;

  for (int64_t r = 0; r < p.num_rows; r += kUnroll) {
    const T* row[kUnroll];
    const T* next[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      row[u] = weight + p.rows[r + u] * p.row_stride;
      next[u] = weight + p.rows[std::min(r + kUnroll + u, p.num_rows - 1)] * p.row_stride;
    }
    const float* coefficient = p.coefficients + r * Tokens;
    constexpr int64_t kPerLine = 64 / sizeof(T);
    for (int64_t c = 0; c < vector_columns; c += kLanes) {
      if (c % kPerLine == 0) {
#pragma GCC unroll 8
        for (int u = 0; u < kUnroll; ++u)
          __builtin_prefetch(next[u] + c, 0, 2);  // to L2: by the time they are used, up to 128 KiB have been read
      }
      Vec sum[Tokens];
      for (int t = 0; t < Tokens; ++t) sum[t] = zero();
#pragma GCC unroll 8
      for (int u = 0; u < kUnroll; ++u) {
        const Vec w = load(row[u] + c);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) sum[t] = fma(broadcast(coefficient[t * kUnroll + u]), w, sum[t]);
      }
      for (int t = 0; t < Tokens; ++t) store(acc[t] + c, add(load(acc[t] + c), sum[t]));
    }
    for (int64_t c = vector_columns; c < columns; ++c) {
      for (int t = 0; t < Tokens; ++t) {
        float sum = 0.0f;
        for (int u = 0; u < kUnroll; ++u) sum += coefficient[t * kUnroll + u] * to_float(row[u][c]);
        acc[t][c] += sum;
      }
    }
  }

  for (int t = 0; t < Tokens; ++t) {
    T* y = static_cast<T*>(p.y) + t * p.out_features + begin;
    for (int64_t c = 0; c < columns; ++c) y[c] = finish<T>(acc[t][c], p.epilogue, t, begin + c);
  }
}

template <class T, int Tokens>
void gather_columns(const GatherParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = block_columns(Tokens);
  for (int64_t c = begin; c < end; c += kBlock) gather_block<T, Tokens>(p, c, std::min(c + kBlock, end));
}

template <class T>
void gather_tokens(const GatherParams& p, int64_t begin, int64_t end) {
  switch (p.tokens) {
    case 1: return gather_columns<T, 1>(p, begin, end);
    case 2: return gather_columns<T, 2>(p, begin, end);
    case 3: return gather_columns<T, 3>(p, begin, end);
    case 4: return gather_columns<T, 4>(p, begin, end);
  }
}

}  // namespace

void gather(const GatherParams& p, int64_t column_begin, int64_t column_end) {
  switch (p.dtype) {
    case ElementType::kFloat32: return gather_tokens<float>(p, column_begin, column_end);
    case ElementType::kBFloat16: return gather_tokens<BFloat16>(p, column_begin, column_end);
    default: return gather_tokens<Float16>(p, column_begin, column_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
