// How many tokens the gather kernel of the CPU takes: read by its launches, and by the choice of a path (ops/choice.h).
#pragma once

#include <cstdint>

namespace nm_act::cpu {

// Most tokens that the gather kernel handles in one pass over the weight.
constexpr int kGatherTokens = 4;

// Most tokens for which sparse_linear gathers: three passes over the weight are faster than torch's GEMM over a weight
// stored [in, out] (docs/kernels/cpu_decode.md).
constexpr int64_t kMostGatheredTokens = 3 * kGatherTokens;

}  // namespace nm_act::cpu
