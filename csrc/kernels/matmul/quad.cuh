// Exchange among the four lanes that hold a row of a wgmma accumulator.
#pragma once

#include <cstdint>

namespace nm_act {
namespace sm90 {

// The words of four lanes as a 4 x 4 matrix, transposed: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? word[i] : word[i | bit], bit);
      if (upper) {
        word[i] = received;
      } else {
        word[i | bit] = received;
      }
    }
  }
}

}  // namespace sm90
}  // namespace nm_act
