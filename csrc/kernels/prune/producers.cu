// The producers (producers.cuh) that write a packed 2:4 operand.
#include "producers.cuh"

namespace nm_act {
namespace {

bool is_compressible(const CompressOutput& out, int in_features, ElementType type) {
  return channels_vectorise(out) && layout_fits(type, out, in_features);
}

}  // namespace

cudaError_t launch_rmsnorm_compress(const RmsNormInput& input, const CompressOutput& out, cudaStream_t stream) {
  if (!is_compressible(out, input.in_features, input.x_type)) return cudaErrorInvalidValue;
  return launch_produced(input, [&](auto element) {
    const auto launch = [&](const auto& producer) {
      return launch_compress_row(producer, out, input.tokens, input.in_features, true, stream);
    };
    return input.residual != nullptr ? launch(producer_of<true>(input, element))
                                     : launch(producer_of<false>(input, element));
  });
}

cudaError_t launch_silu_mul_compress(const SiluMulInput& input, const CompressOutput& out, cudaStream_t stream) {
  if (!is_compressible(out, input.in_features, input.x_type)) return cudaErrorInvalidValue;
  return launch_produced(input, [&](auto element) {
    return launch_compress_row(producer_of(input, element), out, input.tokens, input.in_features, true, stream);
  });
}

}  // namespace nm_act
