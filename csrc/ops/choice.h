// The path that sparse_linear and the products around it take: a pure function of sizes, types and strides, used for
// dispatch by the operators and by nm_act.explain and explain_calls, which report it. It queries no device, so all can
// be tested anywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cpu/config.h"
#include "kernels/gather/config.h"
#include "kernels/latest.h"
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
  ElementType type;             // of x and the lifted weight
  ElementType weight_type;      // of the weight: that of x, or 8 bits
  ElementType activation_type;  // that of x, or kE4M3 for the fp8 tensor cores
  Pattern pattern;
  WeightFacts weight;
  std::optional<WeightFacts> lifted;
  bool variance_correction;
};

// A call of sparse_gemm or sparse_gemm_silu_mul.
struct PackedFacts {
  int64_t tokens;
  ElementType value_type, y_type;
  WeightFacts weight;
  bool shifted;   // by eta or a shift's image
  bool scaled;    // by rows or columns
  bool residual;  // added
  bool gated;     // sparse_gemm_silu_mul
};

enum class LinearPath : int { kGather = 0, kSparse = 1, kLifted = 2, kDense = 3, kPrepacked = 4 };

enum class Why : int {
  kFewTokens = 0,     // gather
  kEnoughTokens,      // sparse, lifted
  kManyTokens,        // too many to gather
  kFullUnion,         // the tokens together need nearly every row
  kStoredOutIn,       // gather needs a weight stored [in, out]
  kFloat32,           // the tensor cores need 16 bits
  kTooFewTokens,      // too few for the sparse tensor cores to gain
  kUnmeasured,        // whether they pay on this device was never measured
  kNoSparsePath,      // neither 2:4 nor 2:4+1
  kNoLiftedWeight,    // 2:4+1, but the weight was not lifted
  kLiftedDoesNotPay,  // 2:4+1 and a lifted weight, but slower
  kLongRow,           // more features than a compression kernel can hold
  kShape,             // sizes, strides or alignment that no GEMM supports
  kE4M3,              // sparse, in e4m3
  kE4M3Dense,         // dense, in e4m3
  kE4M3Shape,         // a pattern, type, size, stride or device that the fp8 tensor cores do not support
  kGatherShape,       // sizes, strides or alignment that the gather kernel does not support
  kPrepacked,         // prepacked: skipping rows does not pay over oneDNN's product
  kPacked,            // sparse, for a packed operand
  kPackedAdds,        // the same, and the kernel adds the residual
  kPackedThenAdds,    // the same, and the residual takes a pass of its own
};

// The path, with the configuration of its CUDA kernel.
struct LinearChoice {
  LinearPath path;
  Why why;
  GatherConfig gather{};
  GemmPlan gemm{};
};

// What select_plan or select_residual_plan chooses. The search takes 15 to 40 us of the host's time, so each thread
// keeps its latest results.
inline GemmPlan remembered_plan(const GemmProblem& problem, bool residual = false) {
  using Key = std::pair<GemmProblem, bool>;
  thread_local Latest<Key, GemmPlan, 7> latest;  // no problem has 0 multiprocessors
  const uint64_t hash = hash_of(problem.tokens, problem.out_features, problem.in_features, problem.value_type,
                                problem.weight_in_out, residual);
  const Key key{problem, residual};
  return latest.find(
      key, hash, [&](const Key& other) { return other == key; },
      [&] { return residual ? select_residual_plan(problem) : select_plan(problem); });
}

// The pattern by which the gather kernel selects. For the variance ratio, which needs the whole token, and for windows,
// the selection is a separate kernel, and the gather kernel skips the resulting zeros.
inline Pattern gather_pattern(Pattern pattern, bool variance_correction) {
  return variance_correction || pattern.extra.count > 0 ? Pattern{} : pattern;
}

// The 16-bit copy of an 8-bit weight, in its stride order.
inline WeightFacts dequantised_facts(const WeightFacts& w) {
  const bool in_out = w.stored_in_out();
  return {w.out_features, w.in_features, in_out ? 1 : w.in_features, in_out ? w.out_features : 1, true};
}

// Whether skipping rows beats pruning followed by oneDNN's product with a prepacked weight: if the tokens leave at
// least one row in ten unread, in float32 one in five (three and two tokens of a 50 % pattern;
// docs/kernels/cpu_decode.md).
inline bool gather_pays_over_prepacked(ElementType type, Pattern pattern, int64_t tokens) {
  const double most = type == ElementType::kFloat32 ? 0.8 : 0.9;
  return tokens <= cpu::kGatherTokens && union_fraction(pattern, static_cast<int>(tokens)) <= most;
}

inline LinearChoice choose_on_cpu(const LinearFacts& facts, bool prepacked = false) {
  const LinearPath otherwise = prepacked ? LinearPath::kPrepacked : LinearPath::kDense;
  if (prepacked && !gather_pays_over_prepacked(facts.type, facts.pattern, facts.tokens))
    return {otherwise, Why::kPrepacked};
  if (facts.tokens > cpu::most_gathered_tokens(facts.type == ElementType::kFloat32))
    return {otherwise, Why::kManyTokens};
  if (!facts.weight.stored_in_out()) return {otherwise, Why::kStoredOutIn};
  return {LinearPath::kGather, Why::kFewTokens};
}

// value_type: of the compressed activation and of the weight.
inline bool gemm_takes(ElementType value_type, const WeightFacts& weight, int compute_capability_major) {
  return weight.aligned && (value_type == ElementType::kE4M3 ? weight.in_stride == 1 : weight.rows_contiguous()) &&
         gemm_shape_fits(value_type, weight.out_features, weight.in_features, weight.row_stride(),
                         compute_capability_major);
}

// e4m3 activations have no other path: for them the operator turns kE4M3Shape into an error.
inline LinearChoice choose_e4m3_on_cuda(const LinearFacts& facts, GemmDevice device) {
  const WeightFacts& weight = facts.weight;
  if (!is_2_4(facts.pattern)) {
    const bool multiplies = facts.pattern.extra.count == 0 && facts.type == ElementType::kBFloat16 &&
                            weight.in_features <= kMaxRowFeatures && weight.in_features % 16 == 0 &&
                            weight.out_features % 16 == 0 && weight.in_stride == 1 &&
                            weight.out_stride == weight.in_features && weight.aligned &&
                            device.compute_capability_major == 9;
    return {LinearPath::kDense, multiplies ? Why::kE4M3Dense : Why::kE4M3Shape};
  }
  const bool fits = facts.type != ElementType::kFloat32 && weight.in_features <= kMaxRowFeatures &&
                    gemm_takes(ElementType::kE4M3, weight, device.compute_capability_major);
  if (!fits) return {LinearPath::kDense, Why::kE4M3Shape};
  return {LinearPath::kSparse,
          Why::kE4M3,
          {},
          remembered_plan(
              {facts.tokens, weight.out_features, weight.in_features, ElementType::kE4M3, device.multiprocessors})};
}

// The choice for a few tokens: the gather kernel or the dense product; the sparse tensor cores need more.
inline LinearChoice choose_few_on_cuda(const LinearFacts& facts, GemmDevice device) {
  const auto dense = [](Why why) { return LinearChoice{LinearPath::kDense, why}; };
  const WeightFacts& weight = facts.weight;
  if (facts.type == ElementType::kFloat32) return dense(Why::kFloat32);
  if (!weight.stored_in_out()) return dense(Why::kStoredOutIn);
  const int tokens = static_cast<int>(facts.tokens);
  if (!gather_pays(facts.weight_type, facts.pattern, tokens)) return dense(Why::kFullUnion);
  if (!weight.aligned) return dense(Why::kGatherShape);
  const GatherConfig config =
      choose_gather_config(facts.weight_type, gather_pattern(facts.pattern, facts.variance_correction), tokens,
                           weight.out_features, weight.in_features, weight.row_stride(), device);
  return config.splits > 0 ? LinearChoice{LinearPath::kGather, Why::kFewTokens, config} : dense(Why::kGatherShape);
}

// The choice of decode_linear and sandwich_linear, which have the gather kernel alone: they refuse a call for which the
// path is another one.
inline LinearChoice choose_in_layer(const LinearFacts& facts, GemmDevice device) {
  const WeightFacts& weight = facts.weight;
  const bool fits = facts.type != ElementType::kFloat32 && weight.stored_in_out() && weight.aligned &&
                    facts.tokens >= 1 && facts.tokens <= kFewTokens && weight.in_features % 8 == 0;
  const GatherConfig config =
      fits ? choose_gather_config(facts.weight_type, facts.pattern, static_cast<int>(facts.tokens), weight.out_features,
                                  weight.in_features, weight.row_stride(), device, /*in_layer=*/true)
           : GatherConfig{};
  return config.splits > 0 ? LinearChoice{LinearPath::kGather, Why::kFewTokens, config}
                           : LinearChoice{LinearPath::kDense, Why::kGatherShape};
}

// The most tokens that one launch of gather_linear takes; more tokens are several launches.
inline int64_t gather_linear_tokens(ElementType weight_type) {
  return weight_bytes(weight_type) == 1 ? kFewTokens : kMaxGatherTokens;
}

// The choice of gather_linear on CUDA, with the configuration of its first launch. Nothing is selected: the pattern
// counts no survivors.
inline LinearChoice choose_gather_linear(const LinearFacts& facts, GemmDevice device) {
  const WeightFacts& weight = facts.weight;
  if (facts.type == ElementType::kFloat32) return {LinearPath::kDense, Why::kFloat32};
  if (!weight.aligned) return {LinearPath::kDense, Why::kGatherShape};
  const int64_t tokens = std::min(facts.tokens, gather_linear_tokens(facts.weight_type));
  const GatherConfig config = choose_gather_config(facts.weight_type, {}, tokens, weight.out_features,
                                                   weight.in_features, weight.row_stride(), device);
  return config.splits > 0 ? LinearChoice{LinearPath::kGather, Why::kFewTokens, config}
                           : LinearChoice{LinearPath::kDense, Why::kGatherShape};
}

// The configuration of sparse_gemm and sparse_gemm_silu_mul, which compute capability 9.0 alone has a choice of.
inline LinearChoice choose_packed(const PackedFacts& facts, GemmDevice device) {
  const WeightFacts& weight = facts.weight;
  const GemmProblem problem{facts.tokens,     weight.out_features,    weight.in_features,
                            facts.value_type, device.multiprocessors, weight.stored_in_out()};
  const bool sm90 = device.compute_capability_major == 9;
  const bool can_add =
      facts.residual && sm90 && has_plain_epilogue(facts.value_type, facts.shifted, facts.scaled) &&
      compiles_residual(facts.value_type, facts.y_type, weight.in_stride != 1, wide_tile(facts.value_type));
  const GemmPlan plan = !sm90         ? GemmPlan{}
                        : facts.gated ? GemmPlan{gated_config(problem)}
                                      : remembered_plan(problem, can_add);
  const bool adds = can_add && plan.cut == GemmCut::kNone && plan.first.tile == wide_tile(facts.value_type);
  const Why why = !facts.residual ? Why::kPacked : adds ? Why::kPackedAdds : Why::kPackedThenAdds;
  return {LinearPath::kSparse, why, {}, plan};
}

inline LinearChoice choose_on_cuda(const LinearFacts& facts, GemmDevice device) {
  if (facts.activation_type == ElementType::kE4M3) return choose_e4m3_on_cuda(facts, device);
  if (facts.tokens <= kFewTokens) return choose_few_on_cuda(facts, device);
  const auto dense = [](Why why) { return LinearChoice{LinearPath::kDense, why}; };
  const bool plain = is_2_4(facts.pattern);
  if (!plain && !is_lifted(facts.pattern)) return dense(Why::kNoSparsePath);
  if (facts.type == ElementType::kFloat32) return dense(Why::kFloat32);
  if (!plain && !facts.lifted) return dense(Why::kNoLiftedWeight);
  const bool bits8 = weight_bytes(facts.weight_type) == 1;
  const WeightFacts weight = !plain ? *facts.lifted : bits8 ? dequantised_facts(facts.weight) : facts.weight;
  if (facts.weight.in_features > kMaxRowFeatures) return dense(Why::kLongRow);
  if (!gemm_takes(facts.type, weight, device.compute_capability_major)) return dense(Why::kShape);
  GemmProblem problem{facts.tokens, weight.out_features,    facts.weight.in_features,
                      facts.type,   device.multiprocessors, weight.stored_in_out()};
  if (device.compute_capability_major != 9) return dense(Why::kUnmeasured);
  if (!sparse_gemm_pays(problem)) return dense(Why::kTooFewTokens);
  if (!plain && !lifted_path_pays(problem)) return dense(Why::kLiftedDoesNotPay);
  problem.in_features = weight.in_features;
  return {plain ? LinearPath::kSparse : LinearPath::kLifted, Why::kEnoughTokens, {}, remembered_plan(problem)};
}

// The sentence of nm_act.explain.
std::string text_of(const LinearChoice& choice, const LinearFacts& facts);

// The configuration of the path's CUDA kernel, in the words of GatherConfig and GemmConfig; empty for any other path.
std::string kernel_text(const LinearChoice& choice);

}  // namespace nm_act
