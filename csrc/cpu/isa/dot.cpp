// Dot: y[t] = W x[t] for a few tokens and a weight stored [out, in], which is read once and in order.
//
// Several rows of the weight are multiplied together, so that their sums are independent chains of additions. The order
// of a sum depends neither on the number of these rows nor on how rows are divided among threads.
#include "cpu/isa/epilogue.h"
#include "cpu/isa/table.h"

namespace nm_act::cpu::NM_ACT_ISA {
namespace {

// 2 * kLanes elements of a row, and the matching ones of a token.
struct Pair {
  Vec first, second;
};

template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

template <class T>
inline Pair load_token(const float* x) {
  return {load(x), load(x + kLanes)};
}

#if defined(__AVX512F__)
// Splits elements into those of even and odd index, which takes only a shift and a mask; a sum may have any order.
template <>
inline Pair load_pair<BFloat16>(const BFloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))))};
}

template <>
inline Pair load_token<BFloat16>(const float* x) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const Vec low = load(x), high = load(x + kLanes);
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}
#endif

inline float total(Vec sum) {
  float lane[kLanes];
  store(lane, sum);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

template <class T, int Rows, int Tokens>
void dot_rows(const DotParams& p, int64_t first) {
  constexpr int kStep = 2 * kLanes;
  const int64_t in = p.in_features, vectors = in / kStep * kStep;
  const T* weight = static_cast<const T*>(p.weight) + first * p.row_stride;
  const int64_t ahead = Rows * p.row_stride;  // the rows of the next call, to L2
  Vec sum[Rows][Tokens];
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) sum[r][t] = zero();
  for (int64_t k = 0; k < vectors; k += kStep) {
    Pair x[Tokens];
    for (int t = 0; t < Tokens; ++t) x[t] = load_token<T>(p.x + t * in + k);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const T* const row = weight + r * p.row_stride + k;
      for (int64_t line = 0; line < kStep; line += 64 / sizeof(T)) __builtin_prefetch(row + ahead + line, 0, 2);
      const Pair w = load_pair(row);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) sum[r][t] = fma(w.second, x[t].second, fma(w.first, x[t].first, sum[r][t]));
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int t = 0; t < Tokens; ++t) {
      float acc = total(sum[r][t]);
      for (int64_t k = vectors; k < in; ++k) acc += to_float(weight[r * p.row_stride + k]) * p.x[t * in + k];
      static_cast<T*>(p.y)[t * p.out_features + first + r] = finish<T>(acc, p.epilogue, t, first + r);
    }
  }
}

template <class T, int Tokens>
void dot_tokens(const DotParams& p, int64_t begin, int64_t end) {
  constexpr int kRows = Tokens == 1 ? 8 : 4;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) dot_rows<T, kRows, Tokens>(p, row);
  for (; row < end; ++row) dot_rows<T, 1, Tokens>(p, row);
}

template <class T>
void dot_type(const DotParams& p, int64_t begin, int64_t end) {
  switch (p.tokens) {
    case 1: return dot_tokens<T, 1>(p, begin, end);
    case 2: return dot_tokens<T, 2>(p, begin, end);
    case 3: return dot_tokens<T, 3>(p, begin, end);
    case 4: return dot_tokens<T, 4>(p, begin, end);
  }
}

}  // namespace

void dot(const DotParams& p, int64_t row_begin, int64_t row_end) {
  switch (p.dtype) {
    case ElementType::kFloat32: return dot_type<float>(p, row_begin, row_end);
    case ElementType::kBFloat16: return dot_type<BFloat16>(p, row_begin, row_end);
    default: return dot_type<Float16>(p, row_begin, row_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
