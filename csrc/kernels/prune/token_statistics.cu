// Per-token statistics as kernels of their own: the D-PTS shift of a token, and the variance ratio of a token that
// another kernel has pruned. One block per token, its features in registers (row_stats.cuh); x and `pruned` are read
// once.
#include "compress_row.cuh"

namespace nm_act {
namespace {

template <class E, bool kVector, int kChunks>
__global__ void __launch_bounds__(kMaxRowThreads)
    token_shift_kernel(const __grid_constant__ TokenStatisticsParams params, const TokenShift kind, float* const eta) {
  __shared__ RowReducer::Slots slots;
  RowReducer reducer(slots);
  const int64_t token = blockIdx.x;
  Chunk<E> x[kChunks];
  const auto* row = static_cast<const typename E::Raw*>(params.x) + token * params.x_stride;
  load_row<E, kVector ? RowKind::kVector : RowKind::kScalar>(x, row, params.in_features);
  const auto count_of = [&](int i) { return chunk_count<kVector>(params.in_features, row_chunk<kChunks>(i)); };
  const float value = kind == TokenShift::kMean ? row_mean(x, params.in_features, reducer)
                                                : row_median(x, params.in_features, count_of);
  if (threadIdx.x == 0) eta[token] = value;
}

template <class E, bool kVector, int kChunks>
__global__ void __launch_bounds__(kMaxRowThreads)
    variance_ratio_kernel(const __grid_constant__ TokenStatisticsParams params, const typename E::Raw* const pruned,
                          const float* const shift, const float* const eta, float* const nu) {
  const int64_t token = blockIdx.x;
  const int in_features = params.in_features;
  const auto* row = static_cast<const typename E::Raw*>(params.x) + token * params.x_stride;
  VarianceSums sums{};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = row_chunk<kChunks>(i);
    const int count = chunk_count<kVector>(in_features, chunk);
    if (count == 0) break;
    Chunk<E> z = load_chunk<E, kVector>(row + chunk * kChunk, count);
    if (eta != nullptr) subtract(z, __ldg(eta + token));
    if (shift != nullptr) subtract(z, load_channels<kVector>(shift + chunk * kChunk, count, 0.0f));
    if (i == 0) sums.start_at(z.get(0));
    sums.add_dense(z, count);
    sums.add_kept(load_chunk<E, kVector>(pruned + token * in_features + chunk * kChunk, count));
  }
  const float ratio = sums.ratio(in_features);
  if (threadIdx.x == 0) nu[token] = ratio;
}

// One block per token; no overlap with the previous kernel.
LaunchShape in_order(const TokenStatisticsParams& params, int threads) {
  return {static_cast<unsigned>(params.tokens), threads, 1, 0, /*overlaps=*/false};
}

// Four chunks per thread, or eight for rows of more than kMaxRowThreads x 4 chunks.
template <class Launch>
cudaError_t launch_rows(const TokenStatisticsParams& params, bool vector, const Launch& launch) {
  if (params.in_features > kMaxRowFeatures || params.tokens > kMaxTokens) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.in_features == 0) return cudaSuccess;
  const int total = (params.in_features + kChunk - 1) / kChunk;
  const auto of_element = [&](auto element) {
    using E = decltype(element);
    const auto of_chunks = [&](auto chunks) {
      constexpr int kChunks = decltype(chunks)::value;
      const int threads = static_cast<int>(round_up((total + kChunks - 1) / kChunks, 32));
      return vector ? launch(E{}, std::true_type{}, chunks, threads) : launch(E{}, std::false_type{}, chunks, threads);
    };
    return total <= 4 * kMaxRowThreads ? of_chunks(std::integral_constant<int, 4>{})
                                       : of_chunks(std::integral_constant<int, 8>{});
  };
  return with_element(params.x_type, of_element);
}

}  // namespace

cudaError_t launch_token_shift(const TokenStatisticsParams& params, TokenShift kind, float* eta, cudaStream_t stream) {
  if (kind == TokenShift::kNone) return cudaErrorInvalidValue;
  const bool vector = rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type);
  return launch_rows(params, vector, [&](auto element, auto is_vector, auto chunks, int threads) {
    return launch_kernel(token_shift_kernel<decltype(element), decltype(is_vector)::value, decltype(chunks)::value>,
                         in_order(params, threads), stream, params, kind, eta);
  });
}

cudaError_t launch_variance_ratio(const TokenStatisticsParams& params, const void* pruned, const float* shift,
                                  const float* eta, float* nu, cudaStream_t stream) {
  const bool vector = rows_vectorise(params.x, params.x_stride, params.in_features, params.x_type) &&
                      is_aligned(pruned, 16) && is_aligned(shift, 16);
  return launch_rows(params, vector, [&](auto element, auto is_vector, auto chunks, int threads) {
    using E = decltype(element);
    return launch_kernel(variance_ratio_kernel<E, decltype(is_vector)::value, decltype(chunks)::value>,
                         in_order(params, threads), stream, params, static_cast<const typename E::Raw*>(pruned), shift,
                         eta, nu);
  });
}

}  // namespace nm_act
