// Checks the branch-free selection of csrc/kernels/prune/select.h against a plain sort that follows the contract's
// words: every quadruple of a list of special values (both zeros, subnormals, largest finite, infinities, NaNs of
// several payloads and signs) and random ones, in bf16 and fp16, without and with channel scales. The device runs the
// same functions. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "kernels/prune/select.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <vector>

#include "random_bits.h"

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float bf16_to_float(uint32_t bits) { return bits_to_float(bits << 16); }

float fp16_to_float(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const float mantissa = static_cast<float>(bits & 1023);
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25));
}

// The contract in words: a class (finite, infinite, NaN), then the score; the first of equals wins.
struct Rank {
  int kind;
  double score;
  int index;
};

Rank rank_of(float z, float scale, int index) {
  if (std::isnan(z)) return {2, 0, index};
  if (std::isinf(z)) return {1, 0, index};
  const float largest = std::numeric_limits<float>::max();
  const float score = std::fabs(z * scale);
  return {0, std::isnan(score) ? largest : std::min(score, largest), index};
}

int expected_mask(const float* z, const float* scale) {
  std::vector<Rank> order;
  for (int i = 0; i < 4; ++i) order.push_back(rank_of(z[i], scale[i], i));
  std::stable_sort(order.begin(), order.end(),
                   [](const Rank& a, const Rank& b) { return a.kind != b.kind ? a.kind > b.kind : a.score > b.score; });
  return 1 << order[0].index | 1 << order[1].index;
}

void check(bool ok, const char* what, const uint32_t* bits) {
  ++checks;
  if (!ok && ++failures <= 20)
    std::printf("FAILED %s: %04x %04x %04x %04x\n", what, bits[0], bits[1], bits[2], bits[3]);
}

uint32_t mask_bytes(int mask) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= (mask >> i & 1 ? 0xFFu : 0u) << 8 * i;
  return bytes;
}

void check_consequences(int mask, const uint32_t* bits) {
  const int first = mask & 1 ? 0 : mask & 2 ? 1 : 2;
  const int second = mask & 8 ? 3 : mask & 4 ? 2 : 1;
  const uint32_t nibble = static_cast<uint32_t>(first | second << 2);
  const uint32_t bytes = mask_bytes(mask);
  check(metadata_byte(bytes, 0xFFFFu) == (nibble | 0x40), "low nibble", bits);
  check(metadata_byte(0xFFFFu, bytes) == (nibble << 4 | 0x4), "high nibble", bits);
  const uint32_t gathered = gather_16(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bytes);
  check(gathered == (bits[first] | bits[second] << 16), "gather", bits);
}

template <class ToFloat>
void check_bare(const uint32_t* bits, uint32_t nan_key, ToFloat to_float) {
  const float ones[4] = {1, 1, 1, 1};
  float z[4];
  for (int i = 0; i < 4; ++i) z[i] = to_float(bits[i]);
  const int expected = expected_mask(z, ones);
  const uint32_t bytes = survivors_16(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, nan_key * 0x10001u);
  check(bytes == mask_bytes(expected), "survivors_16", bits);
  const uint32_t keyed =
      survivors_key(scaled_key(z[0], 1), scaled_key(z[1], 1), scaled_key(z[2], 1), scaled_key(z[3], 1));
  check(survivors_key(magnitude_key(z[0]), magnitude_key(z[1]), magnitude_key(z[2]), magnitude_key(z[3])) == bytes,
        "magnitude_key", bits);
  check(keyed == bytes, "survivors_key", bits);
  check_consequences(expected, bits);
}

void check_scaled(const uint32_t* bits, const float* scale) {
  float z[4];
  uint32_t key[4];
  for (int i = 0; i < 4; ++i) {
    z[i] = bf16_to_float(bits[i]);
    key[i] = scaled_key(z[i], scale[i]);
  }
  check(survivors_key(key[0], key[1], key[2], key[3]) == mask_bytes(expected_mask(z, scale)), "scaled", bits);
}

}  // namespace

int main() {
  const uint32_t bf16_special[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x3F80, 0xBF80, 0x3F81, 0x7F7F,
                                   0xFF7F, 0x7F80, 0xFF80, 0x7F81, 0x7FFF, 0xFFC0, 0xFF81, 0x7FC0};
  const uint32_t fp16_special[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x3C00, 0xBC00, 0x3C01, 0x7BFF,
                                   0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7FFF, 0xFE00, 0xFC01, 0x7E00};
  const float infinity = std::numeric_limits<float>::infinity();
  const float scale_special[] = {0.0f, -0.0f, 1.0f, 0.5f, -1.0f, 1e-45f, 3e38f, infinity, -infinity, std::nanf("")};
  for (int i = 0; i < 17 * 17 * 17 * 17; ++i) {
    const int at[4] = {i % 17, i / 17 % 17, i / 289 % 17, i / 4913};
    uint32_t bf16[4], fp16[4];
    float scale[4];
    for (int j = 0; j < 4; ++j) {
      bf16[j] = bf16_special[at[j]];
      fp16[j] = fp16_special[at[j]];
    }
    check_bare(bf16, 0x7F81, bf16_to_float);
    check_bare(fp16, 0x7C01, fp16_to_float);
    for (int repeat = 0; repeat < 4; ++repeat) {
      for (float& s : scale) s = scale_special[random_bits() % 10];
      check_scaled(bf16, scale);
    }
  }
  for (int i = 0; i < 2000000; ++i) {
    uint32_t bits[4];
    float scale[4];
    const uint32_t mask = i % 3 == 0 ? 0xFFFF : i % 3 == 1 ? 0x8003 : 0xC0FF;  // many ties in two thirds
    for (int j = 0; j < 4; ++j) {
      bits[j] = random_bits() & mask;
      scale[j] = static_cast<float>(random_bits() % 4) * 0.75f * (i % 2 ? 1.0f : -1.0f);
    }
    check_bare(bits, 0x7F81, bf16_to_float);
    check_bare(bits, 0x7C01, fp16_to_float);
    check_scaled(bits, scale);
  }
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
