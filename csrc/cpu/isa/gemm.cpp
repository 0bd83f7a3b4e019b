// Gemm: y = X W^T for many tokens and a weight stored [in, out], which is read as it lies.
//
// A tile of up to kTileTokens tokens by kTileVectors vectors of columns is summed in registers. The tiles of kBlockTokens
// tokens and a panel of columns come one after another: the first reads the panel's rows from memory and leaves them in
// float32 in a buffer that fits L2, where the others read them (rows that are 4 KiB apart would share a few sets of a
// cache). Rows beyond kRows are added in another pass, to sums in scratch memory. The order of a sum depends neither on
// the tiles nor on how the columns are divided among threads.
#include <algorithm>
#include <vector>

#include "cpu/isa/epilogue.h"
#include "cpu/isa/table.h"

namespace nm_act::cpu::NM_ACT_ISA {
namespace {

constexpr int kTileVectors = kGemmColumns / kLanes;
constexpr int kTileTokens = 8;
constexpr int64_t kBlockTokens = 256;
// A panel of so many rows takes 192 KiB.
constexpr int64_t kRows = 1024;
// Rows that are summed at once: rounding errors grow with the root of the longest chain of additions.
constexpr int64_t kChain = 128;
// Rows from the one that is multiplied to the one that is prefetched: they are far apart, where hardware does not help.
constexpr int64_t kAhead = 16;

// Rows of a weight, all columns of which lie side by side.
template <class T>
struct Rows {
  const T* first;
  int64_t stride, count;
  float* copy;  // [count, kGemmColumns], receives them, or null
};

// sums[t][c] += sum over the rows of x[t][row] * row[c], for Tokens tokens and Vectors vectors of columns.
template <class T, int Tokens, int Vectors>
inline void chain(const float* x, int64_t x_stride, const Rows<T>& rows, int64_t begin, int64_t end, float* sums) {
  Vec acc[Tokens][Vectors];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) acc[t][v] = zero();
  for (int64_t k = begin; k < end; ++k) {
    const T* const row = rows.first + k * rows.stride;
    Vec w[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) w[v] = load(row + v * kLanes);
    if (rows.copy != nullptr) {
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t c = 0; c < Vectors * kLanes; c += kLine) __builtin_prefetch(row + kAhead * rows.stride + c, 0, 3);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) store(rows.copy + k * kGemmColumns + v * kLanes, w[v]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Vec value = broadcast(x[t * x_stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) acc[t][v] = fma(value, w[v], acc[t][v]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      float* const sum = sums + t * kGemmColumns + v * kLanes;
      store(sum, add(load(sum), acc[t][v]));
    }
}

template <class T, int Tokens, int Vectors>
void tile(const float* x, int64_t x_stride, const Rows<T>& rows, float* sums) {
  for (int64_t k = 0; k < rows.count; k += kChain)
    chain<T, Tokens, Vectors>(x, x_stride, rows, k, std::min(k + kChain, rows.count), sums);
}

template <class T, int Vectors>
void tile_of(int64_t tokens, const float* x, int64_t x_stride, const Rows<T>& rows, float* sums) {
  switch (tokens) {
    case 1: return tile<T, 1, Vectors>(x, x_stride, rows, sums);
    case 2: return tile<T, 2, Vectors>(x, x_stride, rows, sums);
    case 3: return tile<T, 3, Vectors>(x, x_stride, rows, sums);
    case 4: return tile<T, 4, Vectors>(x, x_stride, rows, sums);
    case 5: return tile<T, 5, Vectors>(x, x_stride, rows, sums);
    case 6: return tile<T, 6, Vectors>(x, x_stride, rows, sums);
    case 7: return tile<T, 7, Vectors>(x, x_stride, rows, sums);
    default: return tile<T, kTileTokens, Vectors>(x, x_stride, rows, sums);
  }
}

// The last columns of a weight, fewer than a panel.
template <class T>
void narrow_tile(int64_t tokens, const float* x, int64_t x_stride, const Rows<T>& rows, int64_t columns, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    tile_of<T, 1>(tokens, x, x_stride, {rows.first + c, rows.stride, rows.count, nullptr}, sums + c);
  }
  for (; c < columns; ++c) {
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = sums[t * kGemmColumns + c];
      for (int64_t k = 0; k < rows.count; ++k) sum += x[t * x_stride + k] * to_float(rows.first[k * rows.stride + c]);
      sums[t * kGemmColumns + c] = sum;
    }
  }
}

struct Scratch {
  std::vector<float> sums = std::vector<float>(kBlockTokens * kGemmColumns);
  std::vector<float> panel = std::vector<float>(kRows * kGemmColumns);
};

// Columns [column, column + columns) of tokens [begin, end).
template <class T>
void gemm_panel(const GemmParams& p, int64_t column, int64_t columns, int64_t begin, int64_t end, Scratch& scratch) {
  float* const sums = scratch.sums.data();
  std::fill_n(sums, (end - begin) * kGemmColumns, 0.0f);
  for (int64_t k = 0; k < p.in_features; k += kRows) {
    const T* const weight = static_cast<const T*>(p.weight) + k * p.row_stride + column;
    const Rows<T> rows{weight, p.row_stride, std::min(kRows, p.in_features - k), scratch.panel.data()};
    const Rows<float> copied{rows.copy, kGemmColumns, rows.count, nullptr};
    for (int64_t t = begin; t < end; t += kTileTokens) {
      const int64_t tokens = std::min<int64_t>(kTileTokens, end - t);
      const float* const x = p.x + t * p.in_features + k;
      float* const sum = sums + (t - begin) * kGemmColumns;
      if (columns < kGemmColumns) {
        narrow_tile(tokens, x, p.in_features, rows, columns, sum);
      } else if (t == begin) {
        tile_of<T, kTileVectors>(tokens, x, p.in_features, rows, sum);
      } else {
        tile_of<float, kTileVectors>(tokens, x, p.in_features, copied, sum);
      }
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    T* const y = static_cast<T*>(p.y) + t * p.out_features + column;
    const float* const sum = sums + (t - begin) * kGemmColumns;
    for (int64_t c = 0; c < columns; ++c) y[c] = finish<T>(sum[c], p.epilogue, t, column + c);
  }
}

template <class T>
void gemm_type(const GemmParams& p, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  for (int64_t column = begin; column < end; column += kGemmColumns) {
    const int64_t columns = std::min(kGemmColumns, end - column);
    for (int64_t t = 0; t < p.tokens; t += kBlockTokens)
      gemm_panel<T>(p, column, columns, t, std::min(t + kBlockTokens, p.tokens), scratch);
  }
}

}  // namespace

void gemm(const GemmParams& p, int64_t column_begin, int64_t column_end) {
  switch (p.dtype) {
    case ElementType::kFloat32: return gemm_type<float>(p, column_begin, column_end);
    case ElementType::kBFloat16: return gemm_type<BFloat16>(p, column_begin, column_end);
    default: return gemm_type<Float16>(p, column_begin, column_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
