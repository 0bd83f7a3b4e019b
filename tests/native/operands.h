// Operands and oracles of the emulated kernels: memory between unreadable pages, element types in float64, the
// selection and the statistics in their plain form (nm_act/reference.py states the contract). Include it after
// emulate_cuda.h.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "kernels/nm_act.h"
#include "matching.h"

namespace operands {

using namespace nm_act;

inline long checks = 0;
inline long failures = 0;
inline std::string current;  // the case that runs
inline std::mt19937 engine(7);

inline constexpr ElementType kBf16 = ElementType::kBFloat16, kFp16 = ElementType::kFloat16,
                             kFp32 = ElementType::kFloat32, kFp8 = ElementType::kE4M3;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures < 20) std::printf("FAILED %s, %s\n", what.c_str(), current.c_str());
}

inline float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(engine); }
inline float normal() { return std::normal_distribution<float>()(engine); }

// ---- element types ------------------------------------------------------------------------------------------------

struct Format {
  int mantissa, min_exponent;
  uint32_t sign, largest, infinity, nan;  // infinity is largest where values saturate
};

inline const Format& format_of(ElementType type) {
  static const Format bf16{7, -126, 0x8000, 0x7F7F, 0x7F80, 0x7FC0}, fp16{10, -14, 0x8000, 0x7BFF, 0x7C00, 0x7E00},
      fp32{23, -126, 0x80000000u, 0x7F7FFFFF, 0x7F800000, 0x7FC00000}, fp8{3, -6, 0x80, 0x7E, 0x7E, 0x7F};
  return type == kBf16 ? bf16 : type == kFp16 ? fp16 : type == kFp32 ? fp32 : fp8;
}

inline int bytes_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : type == ElementType::kE4M3 ? 1 : 2; }

// To nearest even; beyond the largest value infinity, or for e4m3 that value.
inline uint32_t encode(double value, ElementType type) {
  const Format& f = format_of(type);
  const uint32_t sign = std::signbit(value) ? f.sign : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return f.nan;
  if (std::isinf(value)) return sign | f.infinity;
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), f.min_exponent);
  const double steps = std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent));
  const double bits = std::ldexp(exponent - f.min_exponent, f.mantissa) + steps;
  return sign | (bits > f.largest ? f.infinity : static_cast<uint32_t>(bits));
}

inline float decode_slowly(uint32_t bits, const Format& f) {
  const uint32_t magnitude = bits & (f.sign - 1), field = magnitude >> f.mantissa, one = 1u << f.mantissa;
  double value = field == 0 ? std::ldexp(magnitude, f.min_exponent - f.mantissa)
                            : std::ldexp((magnitude & (one - 1)) + one, int(field) - 1 + f.min_exponent - f.mantissa);
  if (magnitude == f.infinity && f.infinity != f.largest) value = INFINITY;
  if (magnitude > f.infinity) value = NAN;
  return static_cast<float>(bits & f.sign ? -value : value);
}

inline float decode(uint32_t bits, ElementType type) {
  if (type == ElementType::kFloat32) return __uint_as_float(bits);
  static std::vector<float> tables[5];
  std::vector<float>& table = tables[static_cast<int>(type)];
  for (uint32_t i = static_cast<uint32_t>(table.size()); i < 65536; ++i) {
    table.push_back(decode_slowly(i, format_of(type)));
  }
  return table[bits];
}

inline bool is_nan(uint32_t bits, ElementType type) {
  return (bits & (format_of(type).sign - 1)) > format_of(type).infinity;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Bytes that end at an unreadable page, or as far from it as the alignment asks: `offset` bytes beyond a multiple
// of 16. They start out as 0xFF, which is a NaN and illegal metadata; what lies around them must stay as it is.
class Buffer {
 public:
  explicit Buffer(size_t size, size_t offset = 0) : size_(size) {
    pages_ = (size + 16 + kPage - 1) / kPage;
    base_ =
        static_cast<unsigned char*>(mmap(nullptr, (pages_ + 2) * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(first(), length(), PROT_READ | PROT_WRITE) != 0) {
      std::printf("FAILED: no memory\n");
      std::exit(1);
    }
    std::memset(first(), kGuard, length());
    data_ = last() - size - ((reinterpret_cast<uintptr_t>(last() - size) - offset) % 16);
    std::memset(data_, 0xFF, size);
    all().insert(this);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    all().erase(this);
    munmap(base_, (pages_ + 2) * kPage);
  }

  template <class T = unsigned char>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }
  bool guards_are_intact() const {
    const auto is_guard = [](unsigned char byte) { return byte == kGuard; };
    return std::all_of(first(), data_, is_guard) && std::all_of(data_ + size_, last(), is_guard);
  }
  std::vector<unsigned char> copy() const { return {data_, data_ + size_}; }

  // Little-endian elements of 1, 2 or 4 bytes.
  void put(size_t index, uint32_t bits, int bytes) { std::memcpy(data_ + index * bytes, &bits, bytes); }
  uint32_t get(size_t index, int bytes) const {
    uint32_t bits = 0;
    std::memcpy(&bits, data_ + index * bytes, bytes);
    return bits;
  }

  static void set_visible(bool visible) {
    for (const Buffer* buffer : all()) {
      mprotect(buffer->first(), buffer->length(), visible ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
  }

 private:
  static constexpr size_t kPage = 4096;
  static constexpr unsigned char kGuard = 0xA5;
  static std::set<const Buffer*>& all() {
    static std::set<const Buffer*> buffers;
    return buffers;
  }
  unsigned char* first() const { return base_ + kPage; }
  unsigned char* last() const { return first() + length(); }
  size_t length() const { return pages_ * kPage; }

  size_t size_, pages_;
  unsigned char *base_, *data_;
};

inline void report_fault(int signal) {
  std::printf("FAILED: %s, %s\n",
              signal == SIGSEGV ? "memory outside of the operands, or before the kernel before has ended"
                                : "an address that is not aligned, an index or a number out of range",
              current.c_str());
  std::fflush(stdout);
  _exit(1);
}

// A main program of checks.
template <class Run>
int run_checks(const Run& run) {
  for (int fault : {SIGSEGV, SIGILL, SIGTRAP}) signal(fault, report_fault);
  emulation::set_memory_visible = Buffer::set_visible;
  run();
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

// At the end of a program: `compiled` different kernels have run.
inline void check_every_kernel_ran(size_t compiled) {
  current = "coverage";
  check(emulation::kernels.size() == compiled, "every kernel ran: " + std::to_string(emulation::kernels.size()));
}

inline std::string name_of(const Pattern& pattern) {
  return std::to_string(pattern.keep) + ":" + std::to_string(pattern.group) + "+" +
         std::to_string(pattern.extra.count) + "@" + std::to_string(pattern.extra.column[0]) +
         std::to_string(pattern.extra.column[1]);
}

// ---- rows of activations ------------------------------------------------------------------------------------------

enum class Content { kHard, kFinite };  // kFinite: no NaN, infinity or square beyond float32

// Of any sign and payload: all of them are one key.
inline uint32_t any_nan(ElementType type) {
  const Format& f = format_of(type);
  return f.infinity + 1 + engine() % ((1u << f.mantissa) - 1) + (engine() % 2 == 0 ? f.sign : 0);
}

// One feature. Rows take turns: random, ties, -0.0, non-finite, infinite, zero, any bits.
inline uint32_t draw(int64_t row, int feature, int in_features, ElementType type, Content content) {
  switch (row % 7) {
    case 1: return encode(std::round(2 * uniform()), type);
    case 2: return feature % 3 == 0 ? format_of(type).sign : encode(normal(), type);
    case 5:
      // A mean of float32 may round to -0.0, which is read as 0.0.
      if (type != ElementType::kFloat32 || content == Content::kFinite || feature > 0) return 0;
      return format_of(type).sign | 1;
    default: break;
  }
  if (content == Content::kHard) {
    if (row % 7 == 3 && (feature == 1 || engine() % 6 == 0)) return any_nan(type);
    if (row % 7 == 3 && feature == in_features / 2) return format_of(type).infinity;
    if (row % 7 == 3 && feature == in_features - 1) return format_of(type).infinity | format_of(type).sign;
    if (row % 7 == 4) return format_of(type).infinity;
    if (row % 7 == 6) return engine() & (2 * format_of(type).sign - 1);
  }
  return encode((row % 7 == 6 ? 0x1p-12 : 1) * normal() + 0.25, type);
}

// x [tokens, in_features] of a type, `gap` elements of NaN between its rows, at `offset` elements from an aligned
// place.
struct Rows {
  Rows(int64_t tokens, int in_features, ElementType type, int gap, int offset)
      : tokens(tokens),
        in_features(in_features),
        stride(in_features + gap),
        type(type),
        memory(size_t(tokens > 0 ? (tokens - 1) * stride + in_features : 0) * bytes_of(type),
               size_t(offset) * bytes_of(type)) {}

  void fill(Content content) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int k = 0; k < in_features; ++k) set(t, k, draw(t, k, in_features, type, content));
    }
  }
  void set(int64_t token, int feature, uint32_t bits) { memory.put(token * stride + feature, bits, bytes_of(type)); }
  uint32_t bits(int64_t token, int feature) const { return memory.get(token * stride + feature, bytes_of(type)); }
  std::vector<uint32_t> row(int64_t token) const {
    std::vector<uint32_t> result(in_features);
    for (int k = 0; k < in_features; ++k) result[k] = bits(token, k);
    return result;
  }

  int64_t tokens;
  int in_features;
  int64_t stride;
  ElementType type;
  Buffer memory;
};

// One float a channel, some of them special; none of them: an empty vector.
struct Channels {
  Channels(bool wanted, int size, bool special, int offset) : wanted(wanted), memory(size_t(size) * 4, offset * 4) {
    const float odd[] = {0.0f, INFINITY, NAN, -1.5f, 1e-45f, 3e38f};
    for (int i = 0; wanted && i < size; ++i) {
      const float value = special && engine() % 8 == 0 ? odd[engine() % 6] : normal();
      memory.data<float>()[i] = value;
    }
  }
  const float* pointer() const { return wanted ? memory.data<float>() : nullptr; }
  bool wanted;
  Buffer memory;
};

// ---- the contract -------------------------------------------------------------------------------------------------

// One token: what is selected from, in bits of the type and as floats.
struct Token {
  std::vector<uint32_t> bits;
  std::vector<float> z;
};

inline Token token_of(const std::vector<uint32_t>& x, ElementType type, const float* shift, const float* eta) {
  Token token{x, std::vector<float>(x.size())};
  for (size_t k = 0; k < x.size(); ++k) {
    float value = decode(x[k], type);
    const float* subtrahend = eta != nullptr ? eta : shift != nullptr ? shift + k : nullptr;
    if (subtrahend != nullptr) {
      value -= *subtrahend;
      token.bits[k] = encode(value, type);
      value = decode(token.bits[k], type);
    }
    token.z[k] = value;
  }
  return token;
}

// Is a ahead of b in the selection?
struct Key {
  int kind;  // finite, infinite, NaN
  float score;
  int index;
  bool operator<(const Key& b) const {
    return kind != b.kind ? kind > b.kind : score != b.score ? score > b.score : index < b.index;
  }
};

inline Key key_of(float z, float scale, int index) {
  if (std::isnan(z)) return {2, 0, index};
  if (std::isinf(z)) return {1, 0, index};
  const float largest = 0x1.fffffep127f;
  const float score = std::fabs(z * scale);
  return {0, std::isnan(score) ? largest : std::min(score, largest), index};
}

inline std::vector<bool> survivors_of(const std::vector<float>& z, Pattern pattern, const float* scale) {
  std::vector<bool> kept(z.size());
  const int span = span_of(pattern);
  std::vector<Key> keys(span);
  for (size_t begin = 0; begin < z.size(); begin += span) {
    for (int i = 0; i < span; ++i) keys[i] = key_of(z[begin + i], scale == nullptr ? 1.0f : scale[begin + i], i);
    std::sort(keys.begin(), keys.end());
    Matching matching(pattern);
    for (int i = 0; i < span; ++i) {
      const bool fits = pattern.extra.count == 0 ? i < pattern.keep : matching.accept(keys[i].index);
      if (fits) kept[begin + keys[i].index] = true;
    }
  }
  return kept;
}

// Is `eta` the token's mean or median? A mean may differ from the exact one in its last place.
inline bool is_token_shift(float eta, TokenShift kind, const std::vector<float>& x) {
  if (std::any_of(x.begin(), x.end(), [](float value) { return std::isnan(value); })) return std::isnan(eta);
  if (std::signbit(eta) && eta == 0.0f) return false;
  if (kind == TokenShift::kMedian) {
    std::vector<float> sorted(x);
    std::nth_element(sorted.begin(), sorted.begin() + (x.size() - 1) / 2, sorted.end());
    return eta == sorted[(x.size() - 1) / 2];
  }
  long double sum = 0, size = 0;
  for (float value : x) sum += value, size += std::fabs(value);
  const double mean = sum / x.size(), allowed = std::fabs(mean) * 0x1p-23 + size / x.size() * 0x1p-45 + 0x1p-150;
  return std::isfinite(mean) ? std::fabs(eta - mean) <= allowed : std::isnan(mean) ? std::isnan(eta) : eta == mean;
}

// Is `nu` sqrt(Var(z) / Var(p)), to float32's last places?
inline bool is_variance_ratio(float nu, const std::vector<float>& z, const std::vector<bool>& kept) {
  double mean_z = 0, mean_p = 0, variance_z = 0, variance_p = 0, size_z = 0;
  const double n = static_cast<double>(z.size());
  for (size_t k = 0; k < z.size(); ++k) {
    const double value = z[k], p = kept[k] ? value : 0;
    mean_z += value / n, mean_p += p / n, size_z += value * value / n;
  }
  for (size_t k = 0; k < z.size(); ++k) {
    const double value = z[k] - mean_z, p = (kept[k] ? z[k] : 0.0) - mean_p;
    variance_z += value * value / n, variance_p += p * p / n;
  }
  if (variance_p == 0) return nu == 1.0f;
  const double ratio = variance_z / variance_p;
  if (!std::isfinite(ratio)) return std::isnan(nu);
  const double allowed =
      0x1p-21 * ratio + 1e-12 * size_z / variance_p;  // of a token without spread only size_z is left
  return std::fabs(double(nu) * nu - ratio) <= allowed;
}

// The scale of a token's e4m3 survivors.
inline float e4m3_scale_of(const Token& token, const std::vector<bool>& kept) {
  float largest = 0;
  for (size_t k = 0; k < token.z.size(); ++k) {
    if (kept[k] && !(std::fabs(token.z[k]) <= largest) && !std::isnan(largest)) largest = std::fabs(token.z[k]);
  }
  const float scale = largest * (1.0f / 448.0f);
  return scale < 0x1p-126f ? 0x1p-126f : scale;
}

inline uint32_t to_e4m3_of(float z, float scale) { return encode(z * (1.0f / scale), ElementType::kE4M3); }

inline bool same_bits(uint32_t actual, uint32_t expected, ElementType type, bool any_nan) {
  return actual == expected || (any_nan && is_nan(actual, type) && is_nan(expected, type));
}

}  // namespace operands
