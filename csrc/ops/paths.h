// Which way sparse_linear goes: pure rules of sizes, types and strides, for the operators that dispatch by them and for
// nm_act.explain, which tells them. No device is asked, so both can be tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "kernels/gather/config.h"
#include "kernels/matmul/config.h"

namespace nm_act {

struct WeightFacts {
  int64_t out_features, in_features;
  int64_t out_stride, in_stride;  // elements
  bool aligned;                   // to 16 bytes

  // Storage is [in, out], rows possibly padded.
  bool stored_in_out() const { return out_stride == 1 && in_stride >= std::max<int64_t>(out_features, 1); }
  bool rows_contiguous() const { return in_stride == 1 || stored_in_out(); }
  int64_t row_stride() const { return in_stride == 1 ? out_stride : in_stride; }
};

struct LinearFacts {
  int64_t tokens;
  ElementType type;         // of x and the lifted weight
  ElementType weight_type;  // of the weight: that of x, or 8 bits
  Pattern pattern;
  WeightFacts weight;
  std::optional<WeightFacts> lifted;
};

enum class LinearPath : int { kGather = 0, kSparse = 1, kLifted = 2, kDense = 3 };

enum class Why : int {
  kFewTokens = 0,     // gather
  kEnoughTokens,      // sparse, lifted
  kManyTokens,        // too many to gather
  kFullUnion,         // the tokens need nearly every row
  kStoredOutIn,       // gather would need [in, out]
  kFloat32,           // tensor cores take 16 bits
  kTooFewTokens,      // too few for the sparse tensor cores to pay
  kNoSparsePath,      // neither 2:4 nor 2:4+1
  kNoLiftedWeight,    // 2:4+1, but the weight was not lifted
  kLiftedDoesNotPay,  // 2:4+1 and a lifted weight, but slower
  kLongRow,           // more features than a compression kernel holds
  kShape,             // sizes, strides or alignment that no GEMM takes
  kDecodeShape,       // sizes, strides or alignment that the decode kernel does not take
};

struct LinearChoice {
  LinearPath path;
  Why why;
};

// Two passes over the weight still beat torch's float32 GEMM, but not its 16-bit one (docs/kernels/cpu_decode.md).
constexpr int64_t cpu_decode_tokens(bool is_float32) {
  return is_float32 ? 2 * cpu::kGatherTokens : cpu::kGatherTokens;
}

inline LinearChoice choose_on_cpu(const LinearFacts& facts) {
  if (facts.tokens > cpu_decode_tokens(facts.type == ElementType::kFloat32))
    return {LinearPath::kDense, Why::kManyTokens};
  if (!facts.weight.stored_in_out()) return {LinearPath::kDense, Why::kStoredOutIn};
  return {LinearPath::kGather, Why::kFewTokens};
}

inline bool gemm_takes(const LinearFacts& facts, const WeightFacts& weight, int compute_capability_major) {
  return weight.aligned && weight.rows_contiguous() &&
         gemm_shape_fits(facts.type, weight.out_features, weight.in_features, weight.row_stride(),
                         compute_capability_major);
}

// A few tokens: the decode kernel or the dense product, the sparse tensor cores need more.
inline LinearChoice choose_decode_on_cuda(const LinearFacts& facts, GemmDevice device) {
  const auto dense = [](Why why) { return LinearChoice{LinearPath::kDense, why}; };
  const WeightFacts& weight = facts.weight;
  if (facts.type == ElementType::kFloat32) return dense(Why::kFloat32);
  if (!weight.stored_in_out()) return dense(Why::kStoredOutIn);
  const int tokens = static_cast<int>(facts.tokens);
  if (!gather_pays(facts.weight_type, facts.pattern, tokens)) return dense(Why::kFullUnion);
  const bool fits = weight.aligned && gather_shape_fits(facts.weight_type, facts.pattern, tokens, weight.out_features,
                                                        weight.in_features, weight.row_stride(), device);
  return fits ? LinearChoice{LinearPath::kGather, Why::kFewTokens} : dense(Why::kDecodeShape);
}

inline LinearChoice choose_on_cuda(const LinearFacts& facts, GemmDevice device) {
  if (facts.tokens <= kMaxDecodeTokens) return choose_decode_on_cuda(facts, device);
  const auto dense = [](Why why) { return LinearChoice{LinearPath::kDense, why}; };
  const bool plain = is_2_4(facts.pattern);
  if (!plain && !is_lifted(facts.pattern)) return dense(Why::kNoSparsePath);
  if (facts.type == ElementType::kFloat32) return dense(Why::kFloat32);
  if (!plain && !facts.lifted) return dense(Why::kNoLiftedWeight);
  const WeightFacts& weight = plain ? facts.weight : *facts.lifted;
  if (facts.weight.in_features > kMaxRowFeatures) return dense(Why::kLongRow);
  if (!gemm_takes(facts, weight, device.compute_capability_major)) return dense(Why::kShape);
  const GemmProblem problem{facts.tokens, weight.out_features, facts.weight.in_features, facts.type,
                            device.multiprocessors};
  if (!sparse_gemm_pays(problem)) return dense(Why::kTooFewTokens);
  if (plain) return {LinearPath::kSparse, Why::kEnoughTokens};
  if (!lifted_path_pays(problem)) return dense(Why::kLiftedDoesNotPay);
  return {LinearPath::kLifted, Why::kEnoughTokens};
}

// The sentence of nm_act.explain.
std::string text_of(const LinearChoice& choice, const LinearFacts& facts);

}  // namespace nm_act
