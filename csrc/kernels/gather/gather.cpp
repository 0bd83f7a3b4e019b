// Dispatch of gather: what is supported, and the launch.
#include "instances.h"

namespace nm_act {
namespace {

bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool types_fit(const GatherParams& params) {
  const bool half = params.x_type == ElementType::kBFloat16 || params.x_type == ElementType::kFloat16;
  return half && (params.weight_type == params.x_type || weight_bytes(params.weight_type) == 1);
}

// RMSNorm and SiLU * up read whole chunks.
bool producer_fits(const GatherParams& params) {
  const bool whole = is_aligned(params.x_weight, 16) && is_aligned(params.x_residual, 16) &&
                     is_aligned(params.hidden, 16) && params.x_residual != nullptr && params.hidden != nullptr;
  if (params.x_weight != nullptr && (params.norm_weight == nullptr || !whole)) return false;
  if (params.up == nullptr && params.norm_weight == nullptr) return true;
  return (params.up == nullptr || params.norm_weight == nullptr) && params.in_features % 8 == 0 &&
         params.x_stride % 8 == 0 && is_aligned(params.x, 16) && is_aligned(params.up, 16) &&
         is_aligned(params.norm_weight, 16) && is_aligned(params.channel_scale, 16) && is_aligned(params.shift, 16);
}

bool pattern_fits(const GatherParams& params) {
  if (params.pattern.keep == 0) return true;
  return is_supported(params.pattern) && params.pattern.extra.count == 0 &&
         params.in_features % params.pattern.group == 0;
}

}  // namespace

bool gather_supports(const GatherParams& params, GemmDevice device) {
  return types_fit(params) && pattern_fits(params) && is_aligned(params.weight, kGatherVector) &&
         is_aligned(params.y, 4) &&
         choose_gather_config(params.weight_type, params.pattern, params.tokens, params.out_features,
                              params.in_features, params.weight_stride, device)
                 .splits > 0;
}

cudaError_t launch_gather(const GatherParams& params, GemmDevice device, const GatherConfig& config,
                          cudaStream_t stream) {
  const GatherProblem problem{params.tokens,      params.out_features, params.in_features,
                              params.weight_type, params.pattern,      device};
  if (!types_fit(params) || !pattern_fits(params) || !producer_fits(params) || !is_aligned(params.residual, 4) ||
      !is_valid(problem, config)) {
    return cudaErrorInvalidValue;
  }
  GatherLaunch launch{};
  launch.config = config;
  launch.shape = {static_cast<unsigned>(block_count(problem, config)), config.threads,
                  static_cast<unsigned>(config.splits), shared_bytes(problem, config)};
  launch.shape.one_block = blocks_fit_apart(problem, config);
  launch.vector = is_aligned(params.x, 16) && params.x_stride % 8 == 0 && is_aligned(params.channel_scale, 16) &&
                  is_aligned(params.shift, 16);
  launch.stream = stream;
  switch (params.weight_type) {
    case ElementType::kE4M3: return launch_gather_e4m3(params, launch);
    case ElementType::kInt8: return launch_gather_int8(params, launch);
    default: return launch_gather_bits16(params, launch);
  }
}

}  // namespace nm_act
