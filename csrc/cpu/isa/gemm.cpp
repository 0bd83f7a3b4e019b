// Gemm: y = X W^T for many tokens and a weight stored [in, out], which is read in place.
//
// A tile of up to kTileTokens tokens by kTileVectors vectors of columns is summed in registers. The tiles of
// kBlockTokens tokens and a panel of columns run one after another: the first tile reads the panel's rows from memory
// and copies them, as float32, to a buffer that fits L2, from which the others read them (in place, rows that are 4 KiB
// apart would share a few sets of a cache). Rows beyond kRows are added in another pass, to sums in scratch memory. The
// order of a sum depends neither on the tiles nor on how the columns are divided among threads.
//
// Processors that multiply pairs of bfloat16 take two rows of the weight at a time: the buffer then holds the two
// elements of a column side by side.
#include <algorithm>
#include <cstring>
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
// Rows in one chain of additions: rounding errors grow with the root of the longest chain.
constexpr int64_t kChain = 128;
// Distance in rows between the row being multiplied and the row being prefetched. Hardware does not prefetch rows,
// which are far apart.
constexpr int64_t kAhead = 16;

// Rows of a weight, whose columns are contiguous.
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
      const float* const x = static_cast<const float*>(p.x) + t * p.in_features + k;
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

#if defined(__AVX512BF16__)
constexpr int64_t kPairColumns = 64;
constexpr int kPairTokens = 6;
static_assert(kPairColumns * kRows * sizeof(BFloat16) <= kGemmColumns * kRows * sizeof(float));

// Two rows of 32 columns, as pairs of 16 columns: of every eight columns, `low` holds the first four.
struct Pairs {
  __m512i low, high;
};

inline Pairs interleave(const BFloat16* row, int64_t stride, __mmask32 columns) {
  const __m512i first = _mm512_maskz_loadu_epi16(columns, row),
                second = _mm512_maskz_loadu_epi16(columns, row + stride);
  return {_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second)};
}

// sums[t][c] += sum over the rows of x[t][row] * row[c], of kPairColumns columns. From memory they are read with masks
// and copied, otherwise they come from the copy.
template <int Tokens, bool FromMemory>
void pair_tile(const BFloat16* x, int64_t x_stride, const BFloat16* weight, int64_t stride, int64_t rows,
               const __mmask32 (&masks)[2], BFloat16* copy, float* sums) {
  Vec acc[Tokens][4];
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[t][v] = zero();
  for (int64_t k = 0; k < rows; k += 2) {
    BFloat16* const pairs = copy + k * kPairColumns;
    __m512i w[4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if constexpr (FromMemory) {
        const BFloat16* const row = weight + k * stride + half * 32;
        __builtin_prefetch(row + kAhead * stride, 0, 3);
        __builtin_prefetch(row + (kAhead + 1) * stride, 0, 3);
        const Pairs both = interleave(row, stride, masks[half]);
        w[2 * half] = both.low, w[2 * half + 1] = both.high;
        _mm512_storeu_si512(pairs + 64 * half, both.low);
        _mm512_storeu_si512(pairs + 64 * half + 32, both.high);
      } else {
        w[2 * half] = _mm512_loadu_si512(pairs + 64 * half);
        w[2 * half + 1] = _mm512_loadu_si512(pairs + 64 * half + 32);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      int32_t two;
      std::memcpy(&two, x + t * x_stride + k, sizeof(two));
      const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[t][v] = _mm512_dpbf16_ps(acc[t][v], value, (__m512bh)w[v]);
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const sum = sums + t * kPairColumns + half * 32;
      const Vec low = acc[t][2 * half], high = acc[t][2 * half + 1];
      store(sum, add(load(sum), _mm512_permutex2var_ps(low, first, high)));
      store(sum + 16, add(load(sum + 16), _mm512_permutex2var_ps(low, last, high)));
    }
  }
}

template <bool FromMemory, class... Arguments>
void pair_tile_of(int64_t tokens, Arguments&&... arguments) {
  switch (tokens) {
    case 1: return pair_tile<1, FromMemory>(arguments...);
    case 2: return pair_tile<2, FromMemory>(arguments...);
    case 3: return pair_tile<3, FromMemory>(arguments...);
    case 4: return pair_tile<4, FromMemory>(arguments...);
    case 5: return pair_tile<5, FromMemory>(arguments...);
    default: return pair_tile<kPairTokens, FromMemory>(arguments...);
  }
}

// Columns [column, column + columns) of tokens [begin, end); in_features is even.
void pair_panel(const GemmParams& p, int64_t column, int64_t columns, int64_t begin, int64_t end, Scratch& scratch) {
  const __mmask32 masks[2] = {__mmask32((uint64_t(1) << std::min<int64_t>(columns, 32)) - 1),
                              __mmask32((uint64_t(1) << std::max<int64_t>(columns - 32, 0)) - 1)};
  float* const sums = scratch.sums.data();
  BFloat16* const copy = reinterpret_cast<BFloat16*>(scratch.panel.data());
  std::fill_n(sums, (end - begin) * kPairColumns, 0.0f);
  for (int64_t k = 0; k < p.in_features; k += kRows) {
    const BFloat16* const weight = static_cast<const BFloat16*>(p.weight) + k * p.row_stride + column;
    const int64_t rows = std::min(kRows, p.in_features - k);
    for (int64_t t = begin; t < end; t += kPairTokens) {
      const int64_t tokens = std::min<int64_t>(kPairTokens, end - t);
      const BFloat16* const x = static_cast<const BFloat16*>(p.x) + t * p.in_features + k;
      float* const sum = sums + (t - begin) * kPairColumns;
      if (t == begin) {
        pair_tile_of<true>(tokens, x, p.in_features, weight, p.row_stride, rows, masks, copy, sum);
      } else {
        pair_tile_of<false>(tokens, x, p.in_features, weight, p.row_stride, rows, masks, copy, sum);
      }
    }
  }
  for (int64_t t = begin; t < end; ++t) {
    BFloat16* const y = static_cast<BFloat16*>(p.y) + t * p.out_features + column;
    const float* const sum = sums + (t - begin) * kPairColumns;
    for (int64_t c = 0; c < columns; ++c) y[c] = finish<BFloat16>(sum[c], p.epilogue, t, column + c);
  }
}

void gemm_pairs(const GemmParams& p, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  constexpr int64_t kTokens = kBlockTokens * kGemmColumns / kPairColumns;
  for (int64_t column = begin; column < end; column += kPairColumns) {
    const int64_t columns = std::min(kPairColumns, end - column);
    for (int64_t t = 0; t < p.tokens; t += kTokens)
      pair_panel(p, column, columns, t, std::min(t + kTokens, p.tokens), scratch);
  }
}
#endif

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
#if defined(__AVX512BF16__)
    case ElementType::kBFloat16: return gemm_pairs(p, column_begin, column_end);
#else
    case ElementType::kBFloat16: return gemm_type<BFloat16>(p, column_begin, column_end);
#endif
    default: return gemm_type<Float16>(p, column_begin, column_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
