// The texts with which nm_act.explain reports a choice.
#include "ops/choice.h"

namespace nm_act {

std::string text_of(const LinearChoice& choice, const LinearFacts& facts) {
  const bool one = facts.tokens == 1;
  const std::string tokens = std::to_string(facts.tokens) + (one ? " token" : " tokens");
  const int64_t few = cpu::most_gathered_tokens(facts.type == ElementType::kFloat32);
  switch (choice.why) {
    case Why::kFewTokens: return tokens + " over a weight stored [in, out]: only the rows of surviving inputs are read";
    case Why::kEnoughTokens:
      return tokens + " are enough for the sparse tensor cores" +
             (choice.path == LinearPath::kLifted ? ", and the lifted weight costs less than it saves" : "");
    case Why::kManyTokens:
      return tokens + " need nearly every weight row; rows are skipped up to " + std::to_string(few) + " tokens";
    case Why::kFullUnion:
      return tokens + " of this pattern need nearly every weight row between them, so skipping rows does not pay";
    case Why::kStoredOutIn:
      return "the weight is stored [out, in], so no row of it can be skipped; store it with "
             "weight.t().contiguous().t()";
    case Why::kFloat32: return "float32 has no kernel on CUDA that gains; use bfloat16 or float16";
    case Why::kTooFewTokens:
      return tokens + (one ? " is" : " are") + " too few for the sparse tensor cores to pay; they do from " +
             std::to_string(facts.weight.stored_in_out() && facts.weight.out_features >= kSparseGemmOutputsInOut
                                ? kSparseGemmTokensInOut
                                : kSparseGemmTokens) +
             " on";
    case Why::kUnmeasured:
      return "the sparse GEMM was measured on compute capability 9.0 alone, and others keep the dense product; "
             "nm_act.sparse_gemm runs it";
    case Why::kNoSparsePath: return "this pattern has no sparse tensor-core path; 2:4 and 2:4+1 do";
    case Why::kNoLiftedWeight:
      return "no lifted_weight was given, which this pattern needs on the sparse tensor cores; "
             "nm_act.lift_weight makes it";
    case Why::kLiftedDoesNotPay:
      return tokens + " over a lifted weight do not pay; that is expected from " + std::to_string(kLiftedTokens) +
             " tokens on";
    case Why::kLongRow:
      return std::to_string(facts.weight.in_features) + " in_features are more than the " +
             std::to_string(kMaxRowFeatures) + " that a compression kernel takes";
    case Why::kE4M3: return "e4m3 activations run on the fp8 tensor cores for any number of tokens";
    case Why::kE4M3Dense:
      return "e4m3 activations of this pattern run on the dense fp8 tensor cores, without a channel scale, shift, "
             "variance correction or column scale";
    case Why::kE4M3Shape:
      return "e4m3 activations need x in 16 bits (bfloat16 for other patterns than 2:4), an e4m3 weight stored "
             "[out, in] with in_features divisible by 32 and out_features by 16, and compute capability 9.0";
    case Why::kGatherShape:
      return "the sizes, strides or alignment of the weight do not fit the gather kernel, which takes out_features "
             "divisible by 8 (16 in 8 bits) in rows aligned to 16 bytes, and inputs that fit its shared memory";
    case Why::kPrepacked:
      return tokens +
             " of this pattern leave so few weight rows unread that oneDNN's product of the whole prepacked "
             "weight is faster";
    case Why::kPacked: return "a packed operand runs on the sparse tensor cores for any number of tokens";
    case Why::kPackedAdds: return "a packed operand runs on the sparse tensor cores, and its kernel adds the residual";
    case Why::kPackedThenAdds:
      return "a packed operand runs on the sparse tensor cores, and a pass of its own adds the residual";
    default:
      return "the sizes, strides or alignment of the weight fit no sparse GEMM; (lifted) in_features divisible by 32 "
             "and out_features by 8 do, in rows aligned to 16 bytes";
  }
}

namespace {

std::string gemm_text(const GemmConfig& config) {
  return std::string(facts_of(config.tile).name) + ", swizzle " + std::to_string(config.swizzle) +
         (config.raster == GemmRaster::kAlongTokens ? " along tokens" : " along outputs") +
         (config.splits > 1 ? ", " + std::to_string(config.splits) + " splits" : "") +
         (config.splits == kStreamed ? ", streamed" : "") + (config.overlapped ? ", overlapped" : "") +
         (config.paced ? ", paced" : "");
}

}  // namespace

std::string kernel_text(const LinearChoice& choice) {
  if (choice.path == LinearPath::kGather && choice.gather.splits > 0) {
    const GatherConfig& config = choice.gather;
    return std::to_string(config.lanes) + " lanes, " + std::to_string(config.splits) + " splits, " +
           std::to_string(config.threads) + " threads" + (config.ahead ? ", ahead" : "");
  }
  if (choice.path != LinearPath::kSparse && choice.path != LinearPath::kLifted) return "";
  const GemmPlan& plan = choice.gemm;
  if (plan.first.swizzle == 0) return "";
  if (plan.cut == GemmCut::kNone) return gemm_text(plan.first);
  return std::to_string(plan.at) + (plan.cut == GemmCut::kTokens ? " tokens: " : " outputs: ") + gemm_text(plan.first) +
         "; the rest: " + gemm_text(plan.second);
}

}  // namespace nm_act
