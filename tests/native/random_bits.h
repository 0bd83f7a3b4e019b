// The random numbers of the native checks, the same on every machine.
#pragma once

#include <cstdint>

inline uint32_t random_bits() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 16);
}
