// y = round(norm(x, weight) + residual): a norm after attention or MLP, with the residual (nm_act.h). One block per
// token, whose features stay in registers; chunks are mapped as in row_stats.cuh.
#include "../launch.cuh"
#include "activations.cuh"
#include "row_stats.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 512;
constexpr int kChunks = 4;  // per thread

template <class E>
__global__ void __launch_bounds__(kThreads) rms_norm_add_kernel(const __grid_constant__ RmsNormAddParams params) {
  __shared__ RowReducer::Slots slots;
  RowReducer reducer(slots);
  const int chunks = params.in_features / kChunk;
  const int64_t first = int64_t{blockIdx.x} * params.in_features;
  const auto* x = static_cast<const uint16_t*>(params.x) + first;
  const auto* residual = static_cast<const uint16_t*>(params.residual) + first;
  wait_for_previous_kernel();
  allow_next_kernel();
  Chunk<E> h[kChunks], addend[kChunks];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = row_chunk<kChunks>(i);
    h[i] = at < chunks ? load_chunk<E, true>(x + at * kChunk, kChunk) : zero_chunk<E>();
    if (at < chunks) addend[i] = load_chunk<E, true>(residual + at * kChunk, kChunk);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) squares = add_squares(h[i], squares);
  const float inverse = inverse_rms(reducer.sum(squares), params.in_features, params.epsilon);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = row_chunk<kChunks>(i);
    if (at >= chunks) continue;
    normalise(h[i], inverse, __ldg(static_cast<const uint4*>(params.weight) + at), params.unit_offset);
    add(h[i], addend[i]);
    store_chunk<E, true>(static_cast<uint16_t*>(params.y) + first + at * kChunk, h[i], kChunk);
  }
}

}  // namespace

cudaError_t launch_rmsnorm_add(const RmsNormAddParams& params, cudaStream_t stream) {
  static_assert(kMaxNormFeatures == kThreads * kChunks * kChunk);
  constexpr auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (params.in_features % kChunk != 0 || params.in_features > kMaxNormFeatures || params.tokens > kMaxTokens ||
      !aligned(params.x) || !aligned(params.residual) || !aligned(params.weight) || !aligned(params.y)) {
    return cudaErrorInvalidValue;
  }
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  const int threads = static_cast<int>(round_up((params.in_features / kChunk + kChunks - 1) / kChunks, 32));
  const auto launch = [&](auto kernel) {
    return launch_kernel(kernel, static_cast<unsigned>(params.tokens), threads, stream, params);
  };
  switch (params.x_type) {
    case ElementType::kBFloat16: return launch(rms_norm_add_kernel<BFloat16>);
    case ElementType::kFloat16: return launch(rms_norm_add_kernel<Float16>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace nm_act
