// How many tokens the CPU's gather kernel takes, for its launches and for the choice of a path (ops/choice.h).
#pragma once

#include <cstdint>

namespace nm_act::cpu {

// Largest number of tokens that the gather and dot kernels handle in one pass over the weight.
constexpr int kGatherTokens = 4;

// Largest number of tokens for which sparse_linear gathers. Two passes over the weight are faster than torch's float32
// GEMM, but not than its 16-bit one (docs/kernels/cpu_decode.md).
constexpr int64_t most_gathered_tokens(bool is_float32) { return is_float32 ? 2 * kGatherTokens : kGatherTokens; }

}  // namespace nm_act::cpu
