// Pruning fused with a token's producer (producers.cuh) or with its conversion to e4m3: one block per token, whose
// features stay in registers from the producer to the stores.
//
//   P = the n of every m of producer(token) with the largest magnitudes, zeros elsewhere
//   16 bits:  values = P
//   e4m3:     row_scale = max(amax |P| * (1 / 448), 2^-126),  values = e4m3(P * (1 / row_scale))
//
// Chunks are mapped as in compress_row.cuh, which is also the mapping of group_select.cuh: groups longer than a chunk
// are selected across lanes. A token that contains a NaN or an infinity gets a NaN scale or NaN values in e4m3. Limits:
// whole aligned chunks, in_features % m == 0, no channel scale and no shift; RMSNorm of at most kMaxNormFeatures; e4m3
// from bf16 alone and on devices that have e4m3 products. These limits keep the library small.
#include "group_select.cuh"
#include "producers.cuh"

namespace nm_act {
namespace {

constexpr int kSteps = 4;  // of survivors_of_steps

// Zeros the pruned features. kGroup: 4 for groups of two and four, else the group.
template <class E, int kGroup, int kChunks>
__device__ __forceinline__ void prune_chunks(Chunk<E> (&z)[kChunks], Pattern pattern) {
#pragma unroll
  for (int first = 0; first < kChunks; first += kSteps) {
    ChunkMask kept[kSteps];
    if constexpr (kGroup < kChunk) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) kept[step] = survivors_of_short<E>(z[first + step].word, pattern);
    } else {
      uint32_t word[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) word[step][i] = z[first + step].word[i];
      }
      survivors_of_steps<E, kGroup>(word, pattern.keep, kept);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) clear_pruned(z[first + step], kept[step]);
  }
}

template <class Producer, bool kE4M3, int kGroup, int kChunks>
__global__ void __launch_bounds__(kMaxRowThreads)
    prune_row_kernel(const __grid_constant__ Producer producer, const __grid_constant__ PruneOutput out,
                     const int in_features) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  if constexpr (kE4M3) return;
#endif
  using E = typename Producer::Element;
  __shared__ RowReducer::Slots slots;
  RowReducer reducer(slots);
  const int64_t token = blockIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  Chunk<E> z[kChunks];
  producer.template produce<RowKind::kVector, kChunks>(z, token, in_features, reducer);
  prune_chunks<E, kGroup>(z, out.pattern);

  const int64_t first = token * in_features + row_chunk<kChunks>(0) * kChunk;
  const auto exists = [in_features](int i) { return row_chunk<kChunks>(i) < in_features / kChunk; };
  if constexpr (kE4M3) {
    uint32_t largest = 0;  // magnitudes, one in each half
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = max_halves(largest, z[i].word[j] & 0x7FFF7FFFu);
    }
    const float scale = e4m3_scale<E>(largest, reducer), inverse = 1.0f / scale;
    auto* values = static_cast<uint8_t*>(out.values) + first;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (!exists(i)) continue;
      const uint32_t low = pair_to_e4m3<E>(z[i].word[0], inverse) | pair_to_e4m3<E>(z[i].word[1], inverse) << 16;
      const uint32_t high = pair_to_e4m3<E>(z[i].word[2], inverse) | pair_to_e4m3<E>(z[i].word[3], inverse) << 16;
      *reinterpret_cast<uint2*>(values + i * 32 * kChunk) = make_uint2(low, high);
    }
    if (threadIdx.x == 0) out.row_scale[token] = scale;
  } else {
    auto* values = static_cast<typename E::Raw*>(out.values) + first;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (exists(i)) store_chunk<E, true>(values + i * 32 * kChunk, z[i], kChunk);
    }
  }
}

template <bool kE4M3, bool kLong, class Producer>
cudaError_t launch_row(const Producer& producer, const PruneOutput& out, int64_t tokens, int in_features,
                       cudaStream_t stream) {
  const int total = in_features / kChunk;
  const bool long_row = total > 4 * kMaxRowThreads;
  if (long_row && !kLong) return cudaErrorInvalidValue;
  const int threads = static_cast<int>(round_up(long_row ? (total + 7) / 8 : (total + 3) / 4, 32));
  const auto launch = [&](auto group) {
    constexpr int kGroup = decltype(group)::value;
    const auto run = [&](auto kernel) {
      return launch_kernel(kernel, static_cast<unsigned>(tokens), threads, stream, producer, out, in_features);
    };
    if constexpr (kLong) {
      if (long_row) return run(prune_row_kernel<Producer, kE4M3, kGroup, 8>);
    }
    return run(prune_row_kernel<Producer, kE4M3, kGroup, 4>);
  };
  switch (out.pattern.group) {
    case 2:
    case 4: return launch(std::integral_constant<int, 4>{});
    case 8: return launch(std::integral_constant<int, 8>{});
    case 16: return launch(std::integral_constant<int, 16>{});
    default: return launch(std::integral_constant<int, 32>{});
  }
}

// Values of the producer's type or of e4m3.
template <bool kLong, class Producer>
cudaError_t launch_either(const Producer& producer, const PruneOutput& out, int64_t tokens, int in_features,
                          cudaStream_t stream) {
  if (out.value_type != ElementType::kE4M3) return launch_row<false, kLong>(producer, out, tokens, in_features, stream);
  if constexpr (std::is_same_v<typename Producer::Element, BFloat16>) {
    return launch_row<true, kLong>(producer, out, tokens, in_features, stream);
  }
  return cudaErrorInvalidValue;
}

bool is_prunable(const PruneOutput& out, int64_t tokens, int in_features, ElementType type) {
  return is_supported(out.pattern) && out.pattern.extra.count == 0 && in_features % out.pattern.group == 0 &&
         in_features <= kMaxRowFeatures && tokens <= kMaxTokens && is_aligned(out.values, 16) &&
         (out.value_type == type || (out.value_type == ElementType::kE4M3 && out.row_scale != nullptr));
}

}  // namespace

cudaError_t launch_rmsnorm_prune(const RmsNormInput& input, const PruneOutput& out, cudaStream_t stream) {
  static_assert(kMaxNormFeatures == 4 * kChunk * kMaxRowThreads);
  if (!is_prunable(out, input.tokens, input.in_features, input.x_type)) return cudaErrorInvalidValue;
  return launch_produced(input, [&](auto element) {
    return launch_either<false>(producer_of<true>(input, element), out, input.tokens, input.in_features, stream);
  });
}

cudaError_t launch_silu_mul_prune(const SiluMulInput& input, const PruneOutput& out, cudaStream_t stream) {
  if (!is_prunable(out, input.tokens, input.in_features, input.x_type)) return cudaErrorInvalidValue;
  return launch_produced(input, [&](auto element) {
    return launch_either<true>(producer_of(input, element), out, input.tokens, input.in_features, stream);
  });
}

cudaError_t launch_prune_e4m3(const RowsInput& input, const PruneOutput& out, cudaStream_t stream) {
  if (out.value_type != ElementType::kE4M3 || input.x_type != ElementType::kBFloat16 ||
      !is_prunable(out, input.tokens, input.in_features, input.x_type)) {
    return cudaErrorInvalidValue;
  }
  return launch_produced(input, [&](auto element) {
    return launch_either<true>(producer_of(input, element), out, input.tokens, input.in_features, stream);
  });
}

}  // namespace nm_act
