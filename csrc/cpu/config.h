// How many tokens the gather kernel of the CPU takes: read by its launches, and by the choice of a path (ops/choice.h).
#pragma once

#include <cstdint>

namespace nm_act::cpu {

// Most tokens that the gather kernel handles in one pass over the weight.
constexpr int kGatherTokens = 4;

// Most tokens for which sparse_linear gathers. Two passes over the weight are faster than torch's float32 GEMM, but not
// than its 16-bit one (docs/kernels/cpu_decode.md).
constexpr int64_t most_gathered_tokens(bool is_float32) { return is_float32 ? 2 * kGatherTokens : kGatherTokens; }

}  // namespace nm_act::cpu
