// Temporary: the prune launchers without torch, for benchmarks/tmp_compress.py.
#include "kernels/nm_act.h"
using namespace nm_act;
extern "C" int run_prune(const void* x, long long stride, void* out, const float* scale, long long tokens, int in,
                         int keep, int group, int type, void* stream) {
  PruneParams p{};
  p.x = x, p.x_stride = stride, p.out = out, p.channel_scale = scale, p.tokens = tokens, p.in_features = in;
  p.pattern = {keep, group, {}};
  p.x_type = ElementType(type);
  return launch_prune(p, static_cast<cudaStream_t>(stream));
}
extern "C" int run_compress(const void* x, long long stride, long long tokens, int in, int type, void* values,
                            void* metadata, float* row_scale, float* eta, const float* scale, int token_shift,
                            int variance, int value_type, int layout, void* stream) {
  CompressOutput out{values,
                     static_cast<uint8_t*>(metadata),
                     row_scale,
                     eta,
                     scale,
                     nullptr,
                     TokenShift(token_shift),
                     variance != 0,
                     ElementType(value_type),
                     MetadataLayout(layout)};
  CompressParams p{x, stride, tokens, in, ElementType(type), out};
  return launch_compress(p, static_cast<cudaStream_t>(stream));
}
extern "C" int run_statistics(const void* x, long long stride, long long tokens, int in, int type, const void* pruned,
                              float* result, int kind, void* stream) {
  TokenStatisticsParams p{x, stride, tokens, in, ElementType(type)};
  if (kind == 0) return launch_variance_ratio(p, pruned, nullptr, nullptr, result, static_cast<cudaStream_t>(stream));
  return launch_token_shift(p, TokenShift(kind), result, static_cast<cudaStream_t>(stream));
}
