// Checks csrc/kernels/prune/window_select.h against the greedy set that a bipartite matching defines: features in
// descending order of their keys, the lowest index first among equals, each accepted if all accepted ones still fit
// into the windows, two to a window. 2:4+1 and 2:4+2 for every choice of extra columns, on all 65536 units of two key
// values and on random ones with few and with many values, 2:4+1 in the 16-bit and the 32-bit form. Prints "N checks, 0
// failed"; exits 1 on a mismatch.
#include "kernels/prune/window_select.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "matching.h"
#include "random_bits.h"

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;

void check(bool ok, const char* what, uint32_t a, uint32_t b) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAILED %s: %04x %04x\n", what, a, b);
}

uint32_t greedy(const uint32_t (&key)[kUnit], Pattern pattern) {
  std::array<int, kUnit> order;
  for (int i = 0; i < kUnit; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key[a] > key[b]; });
  Matching matching(pattern);
  uint32_t mask = 0;
  for (int feature : order) {
    if (matching.accept(feature)) mask |= 1u << feature;
  }
  return mask;
}

bool is_byte_mask(uint32_t mask) { return mask == (mask & 0x01010101u) * 0xFFu; }

// The features that the windows of 2:4+1 hold; ~0 if two windows hold one, or one does not hold two.
uint32_t held_features(const WindowSlots& windows, ExtraColumns extra) {
  uint32_t mask = 0;
  for (int window = 0; window < kWindows; ++window) {
    const uint32_t held = windows.held[window];
    if (!is_byte_mask(held) || count_bits(held) != 16) return ~0u;
    for (int slot = 0; slot < 4; ++slot) {
      const uint32_t feature = 1u << window_feature(extra, window, slot);
      if ((held >> 8 * slot & 1u) == 0) continue;
      if ((mask & feature) != 0) return ~0u;
      mask |= feature;
    }
  }
  return mask;
}

uint32_t survivors(const WindowSlots& windows, int e) {
  uint32_t mask = 0;
  for (int i = 0; i < kUnit; ++i) {
    if (quad_survivors(windows, e, i / 4) >> 8 * (i % 4) & 1u) mask |= 1u << i;
  }
  return mask;
}

void check_extra(const uint32_t (&key)[kUnit], uint32_t what) {
  uint32_t word[8];
  for (int i = 0; i < 8; ++i) word[i] = key[2 * i] | key[2 * i + 1] << 16 | (random_bits() & 0x80008000u);
  for (int e = 0; e < 4; ++e) {
    const Pattern pattern{2, 4, {1, {e, 0}}};
    const uint32_t expected = greedy(key, pattern);
    const WindowSlots bits16 = plus_one_16(word, 0x7FFF7FFFu, removal_of(e)), keyed = plus_one_of_keys(key, e);
    check(held_features(bits16, pattern.extra) == expected, "2:4+1 in 16 bits", what, expected);
    check(held_features(keyed, pattern.extra) == expected, "2:4+1 of keys", what, expected);
    check(survivors(bits16, e) == expected, "2:4+1 survivors", what, expected);
    for (int f = 0; f < 4; ++f) {
      if (f == e) continue;
      const Pattern both{2, 4, {2, {e, f}}};
      const uint32_t twelve = greedy(key, both);
      check(plus_two_of_keys(key, e, f) == twelve && count_bits(twelve) == 12, "2:4+2 of keys", what, twelve);
    }
  }
}

}  // namespace

int main() {
  uint32_t key[kUnit];
  for (uint32_t mask = 0; mask < 65536; ++mask) {
    for (int i = 0; i < kUnit; ++i) key[i] = mask >> i & 1u;
    check_extra(key, mask);
  }
  for (uint32_t i = 0; i < 30000; ++i) {
    const uint32_t values = i % 3 == 0 ? 3 : i % 3 == 1 ? 6 : 0x7FFF;
    for (uint32_t& k : key) k = random_bits() % values;
    check_extra(key, i);
  }
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
