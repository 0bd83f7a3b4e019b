// Prunes or compresses rows: shift, keys, ranks, output and per-token statistics, one row at a time in L1 and L2.
//
//   Z = round(X - eta),  key = |Z| * channel_scale,  P = the N of every M of Z with the largest keys
//   nu = sqrt(Var(Z) / Var(P)), sums in float64
//
// A row is converted to float32 once; without a shift the bits of the output are those of the input. A 16-bit operand
// that is selected by magnitude alone is pruned as one long row: rows are short in small models, and padding each to
// whole vectors would cost up to half of the time.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/isa/select.h"
#include "cpu/isa/table.h"

namespace nm_act::cpu::NM_ACT_ISA {
namespace {

struct Scratch {
  std::vector<float> z;          // [in] float32 of the row
  std::vector<float> sorted;     // [in] for the median
  std::vector<int32_t> keys;     // [in rounded up]
  std::vector<uint32_t> mask;    // one bit an element
  std::vector<uint8_t> shifted;  // [in] of the row's dtype, when a shift changes the bits
};

float mean_of(const float* z, int64_t n) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int s = 0; s < kSums; ++s) sums[s] += z[i + s];
  for (; i < n; ++i) sums[0] += z[i];
  double total = 0;
  for (double sum : sums) total += sum;
  return float(total / double(n)) + 0.0f;
}

float lower_median_of(const float* z, int64_t n, std::vector<float>& sorted) {
  sorted.assign(z, z + n);
  if (std::any_of(sorted.begin(), sorted.end(), [](float v) { return std::isnan(v); }))
    return std::numeric_limits<float>::quiet_NaN();
  auto middle = sorted.begin() + (n - 1) / 2;
  std::nth_element(sorted.begin(), middle, sorted.end());
  return *middle + 0.0f;
}

bool survives(const uint32_t* mask, int64_t k) { return mask[k / 32] >> (k % 32) & 1; }

// Sums in float64, where no square of a float32 feature overflows. The dense features are taken about the first of
// them: with one of the n features as the origin, cancellation costs at most log2(n) of the 53 bits, however far the
// mean is from zero. The pruned row needs no origin: its zeros make its variance a fixed share of its mean square.
float variance_ratio(const float* z, const uint32_t* mask, int64_t n) {
  constexpr int kSums = 8;
  typedef float Floats __attribute__((vector_size(kSums * 4)));
  typedef double Doubles __attribute__((vector_size(kSums * 8)));
  typedef int64_t Masks __attribute__((vector_size(kSums * 8)));
  const Doubles origin = Doubles{} + double(z[0]);
  const Masks lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
  Doubles all{}, all2{}, kept{}, kept2{};
  const auto add = [&](const Floats& features, int64_t bits) {
    const Doubles value = __builtin_convertvector(features, Doubles), difference = value - origin;
    const Doubles p = (Doubles)((Masks)value & ((lane_bit & bits) != 0));
    all += difference;
    all2 += difference * difference;
    kept += p;
    kept2 += p * p;
  };
  int64_t k = 0;
  for (; k + kSums <= n; k += kSums) {
    Floats features;
    std::memcpy(&features, z + k, sizeof(features));  // of a constant size: no call
    add(features, mask[k / 32] >> (k % 32));
  }
  if (k < n) {  // missing features equal the origin, and did not survive
    Floats features = Floats{} + z[0];
    std::memcpy(&features, z + k, (n - k) * sizeof(float));
    add(features, mask[k / 32] >> (k % 32) & ((1 << (n - k)) - 1));
  }
  const auto total = [](const Doubles& sums) {
    double result = 0;
    for (int s = 0; s < kSums; ++s) result += sums[s];
    return result;
  };
  const auto variance = [&](const Doubles& sums, const Doubles& squares) {
    return total(squares) - total(sums) * total(sums) / double(n);
  };
  const double var_all = variance(all, all2), var_kept = variance(kept, kept2);
  return var_kept == 0 ? 1.0f : float(std::sqrt((var_all < 0 ? 0 : var_all) / var_kept));
}

template <class T>
void emit_dense(const T* z, const uint32_t* mask, int64_t n, T* out) {
  int64_t k = 0;
#if defined(__AVX512BW__)
  for (; k + 32 <= n; k += 32) {
    if constexpr (sizeof(T) == 2) {
      _mm512_storeu_si512(out + k, _mm512_maskz_loadu_epi16(mask[k / 32], z + k));
    } else {
      _mm512_storeu_ps(out + k, _mm512_maskz_loadu_ps(__mmask16(mask[k / 32]), z + k));
      _mm512_storeu_ps(out + k + 16, _mm512_maskz_loadu_ps(__mmask16(mask[k / 32] >> 16), z + k + 16));
    }
  }
#endif
  for (; k < n; ++k) out[k] = survives(mask, k) ? z[k] : T{};
}

template <class T>
void emit_compressed(const T* z, const uint32_t* mask, int64_t n, T* values, uint8_t* metadata) {
  for (int64_t g = 0; g < n / 4; ++g) {
    const uint32_t bits = mask[g / 8] >> (g % 8 * 4) & 15;
    const int first = __builtin_ctz(bits), second = 31 - __builtin_clz(bits);
    values[2 * g] = z[4 * g + first];
    values[2 * g + 1] = z[4 * g + second];
    const uint8_t nibble = uint8_t(first | second << 2);
    metadata[g / 2] = g % 2 ? uint8_t(metadata[g / 2] | nibble << 4) : nibble;
  }
}

template <class T>
void prune_row(const PruneParams& p, int64_t token, Scratch& scratch) {
  const int64_t n = p.in_features;
  const T* z = static_cast<const T*>(p.x) + token * n;
  float* converted = scratch.z.data();
  const float* wide = converted;
  if constexpr (std::is_same_v<T, float>) {
    wide = z;
  } else {
    for (int64_t k = 0; k < n; ++k) converted[k] = to_float(z[k]);
  }

  if (p.token_shift != TokenShift::kNone || p.shift != nullptr) {
    float eta = 0.0f;
    if (p.token_shift == TokenShift::kMean) eta = mean_of(wide, n);
    if (p.token_shift == TokenShift::kMedian) eta = lower_median_of(wide, n, scratch.sorted);
    if (p.eta != nullptr) p.eta[token] = eta;
    T* shifted = reinterpret_cast<T*>(scratch.shifted.data());
    for (int64_t k = 0; k < n; ++k) {
      shifted[k] = from_float<T>(wide[k] - (p.shift != nullptr ? p.shift[k] : eta));
      converted[k] = to_float(shifted[k]);
    }
    z = shifted;
    wide = converted;
  }

  int32_t* keys = scratch.keys.data();
  for (int64_t k = 0; k < n; ++k)
    keys[k] = selection_key(wide[k], p.channel_scale != nullptr ? p.channel_scale[k] : 1.0f);
  uint32_t* mask = scratch.mask.data();
  select_row(keys, n, p.pattern, mask);

  if (p.nu != nullptr) p.nu[token] = variance_ratio(wide, mask, n);
  if (p.out != nullptr) emit_dense(z, mask, n, static_cast<T*>(p.out) + token * n);
  if (p.values != nullptr) {
    emit_compressed(z, mask, n, static_cast<T*>(p.values) + token * (n / 2), p.metadata + token * ((n + 7) / 8));
  }
}

template <class T>
void prune_rows(const PruneParams& p, int64_t token_begin, int64_t token_end) {
  const int64_t block = int64_t(kBlockGroups) * span_of(p.pattern);
  const int64_t padded = (p.in_features + block - 1) / block * block;
  // Kept between calls: for one token, allocating fresh pages costs more than the selection.
  static thread_local Scratch scratch;
  scratch.z.resize(p.in_features);
  scratch.keys.resize(padded);
  std::fill(scratch.keys.begin() + p.in_features, scratch.keys.end(), 0);
  scratch.mask.resize(padded / 32 + 1);
  scratch.shifted.resize(p.in_features * sizeof(T));
  for (int64_t token = token_begin; token < token_end; ++token) prune_row<T>(p, token, scratch);
}

// 16-bit elements selected by magnitude, M of 2 to 16; `count` is a multiple of M.
template <int M, class T>
void prune_magnitudes(const T* x, T* out, int64_t count, int keep) {
  constexpr int64_t kBlock = int64_t(Groups<int16_t>::kCount) * M;
  constexpr int16_t kInfinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  uint32_t mask[(kBlock + 31) / 32];
  alignas(64) int16_t bits[kBlock];
  int64_t k = 0;
  for (; k + kBlock <= count; k += kBlock) {
    std::memcpy(bits, x + k, sizeof(bits));
    select_magnitudes<M>(bits, kInfinity, keep, mask);
    emit_dense(x + k, mask, kBlock, out + k);
  }
  if (k == count) return;
  std::memset(bits, 0, sizeof(bits));
  std::memcpy(bits, x + k, (count - k) * sizeof(T));
  select_magnitudes<M>(bits, kInfinity, keep, mask);
  emit_dense(x + k, mask, count - k, out + k);
}

template <class T>
void prune_16_bits(const PruneParams& p, int64_t token_begin, int64_t token_end) {
  const bool magnitudes = p.channel_scale == nullptr && p.shift == nullptr && p.token_shift == TokenShift::kNone &&
                          p.nu == nullptr && p.values == nullptr && p.pattern.extra.count == 0;
  const T* const x = static_cast<const T*>(p.x) + token_begin * p.in_features;
  T* const out = static_cast<T*>(p.out) + token_begin * p.in_features;
  const int64_t count = (token_end - token_begin) * p.in_features;
  switch (magnitudes ? p.pattern.group : 0) {
    case 2: return prune_magnitudes<2>(x, out, count, p.pattern.keep);
    case 4: return prune_magnitudes<4>(x, out, count, p.pattern.keep);
    case 8: return prune_magnitudes<8>(x, out, count, p.pattern.keep);
    case 16: return prune_magnitudes<16>(x, out, count, p.pattern.keep);
    default: return prune_rows<T>(p, token_begin, token_end);
  }
}

}  // namespace

void prune(const PruneParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case ElementType::kFloat32: return prune_rows<float>(p, token_begin, token_end);
    case ElementType::kBFloat16: return prune_16_bits<BFloat16>(p, token_begin, token_end);
    default: return prune_16_bits<Float16>(p, token_begin, token_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
