// y = round(y * row_scale * column_scale + bias) in place, in bfloat16: the epilogue of an e4m3 product of a few tokens
// that cuBLAS computes with one scale (nm_act.h). A thread owns eight outputs of a token.
#include "../launch.cuh"
#include "../nm_act.h"
#include "../prune/element.cuh"

namespace nm_act {
namespace {

constexpr int kThreads = 256;

__device__ const float kOne = 1.0f;

__global__ void __launch_bounds__(kThreads) scale_product_kernel(const __grid_constant__ ScaleProductParams params) {
  const int chunks = params.out_features / kChunk;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (index >= params.tokens * chunks) return;
  const int64_t token = index / chunks;
  const int first = static_cast<int>(index % chunks) * kChunk;
  auto* y = static_cast<uint16_t*>(params.y) + token * params.out_features + first;
  Chunk<BFloat16> chunk = load_chunk<BFloat16, true>(y, kChunk), bias = zero_chunk<BFloat16>();
  if (params.bias != nullptr) {
    bias = load_chunk<BFloat16, true>(static_cast<const uint16_t*>(params.bias) + first, kChunk);
  }
  const float row_scale = params.row_scale[token];
  const float* scale = params.column_scale + first;
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const int at = 2 * i;
    chunk.set_pair(i, fmaf(chunk.get(at) * row_scale, scale[at], bias.get(at)),
                   fmaf(chunk.get(at + 1) * row_scale, scale[at + 1], bias.get(at + 1)));
  }
  store_chunk<BFloat16, true>(y, chunk, kChunk);
}

}  // namespace

cudaError_t launch_scale_product(const ScaleProductParams& params, cudaStream_t stream) {
  constexpr auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (params.out_features % kChunk != 0 || params.tokens > kMaxTokens || !aligned(params.y) || !aligned(params.bias)) {
    return cudaErrorInvalidValue;
  }
  const int64_t chunks = params.tokens * (params.out_features / kChunk);
  if (chunks == 0) return cudaSuccess;
  return launch_kernel(scale_product_kernel, static_cast<unsigned>((chunks + kThreads - 1) / kThreads), kThreads,
                       stream, params);
}

cudaError_t device_one(const float** one) {
  void* address = nullptr;
  const cudaError_t status = cudaGetSymbolAddress(&address, kOne);
  *one = static_cast<const float*>(address);
  return forget(status);
}

}  // namespace nm_act
