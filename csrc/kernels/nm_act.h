// The complete interface of the torch-free kernel library. Callers check shapes and pointers; nothing here allocates or
// synchronises. Launchers (declared if NM_ACT_CUDA is defined, or under nvcc) enqueue on `stream` and return the first
// CUDA error, or cudaErrorInvalidValue for a combination that no kernel supports.
#pragma once

#include <cstdint>

#include "format/metadata.h"
#include "format/pattern.h"
#include "format/types.h"
#include "format/windows.h"

#if defined(NM_ACT_CUDA) || defined(__CUDACC__)
#include <cuda_runtime_api.h>
#endif

namespace nm_act {

// Host functions, for any compiler. in_features must be a multiple of 4.

// neutral [tokens, ceil(in_features / 8)] -> physical [metadata_bytes(layout, tokens, in_features)]. Writes every byte
// of `physical`; the nibbles of padding tokens and features become kPaddingNibble.
void pack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* neutral,
                   uint8_t* physical);

// The inverse. If in_features % 8 == 4, the unused high nibble at the end of a row becomes 0, as nm_act::compress
// writes it.
void unpack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* physical,
                     uint8_t* neutral);

inline constexpr int kMaxRowFeatures = 32768;   // limit of the kernels that hold a whole row on chip
inline constexpr int kMaxNormFeatures = 16384;  // and of RMSNorm fused with pruning
// Limits of all kernels, which count in 32 bits.
inline constexpr int64_t kMaxTokens = int64_t{1} << 30;
inline constexpr int64_t kMaxFeatures = int64_t{1} << 30;

// Facts about the device, passed in by the caller: querying the driver at every call costs more than the launch.
struct GemmDevice {
  int compute_capability_major;  // 9 runs the sm_90a kernels; 8 and anything after 9 run the sm_80 ones
  int multiprocessors;
};
// Largest number of tokens of a gather: with a selection or 8-bit weights (kFewTokens), or with neither
// (kMaxGatherTokens).
inline constexpr int kFewTokens = 4;
inline constexpr int kMaxGatherTokens = 8;
// Heads that launch_decode_attention supports.
inline bool decode_attention_supports(int64_t q_heads, int64_t k_heads, int64_t dim) {
  return k_heads > 0 && q_heads % k_heads == 0 && q_heads / k_heads <= 8 && (dim == 64 || dim == 128 || dim == 256);
}
// Heads whose RMSNorm the rotary kernels compute.
inline bool head_norms_support(int64_t dim) { return dim >= 16 && dim <= 512 && (dim & (dim - 1)) == 0; }

#if defined(NM_ACT_CUDA) || defined(__CUDACC__)

// What a compression computes and where it writes it. Shared by every kernel that compresses.
struct CompressOutput {
  void* values;                // [tokens, in_features / 2] of value_type, contiguous, 16-byte aligned
  uint8_t* metadata;           // [metadata_bytes(layout, tokens, in_features)], 16-byte aligned; every byte is written
  float* row_scale;            // [tokens]: variance ratio times e4m3 scale; null if neither is computed
  float* eta;                  // [tokens]: the per-token shift; null if and only if token_shift is kNone
  const float* channel_scale;  // [in_features] or null
  const float* shift;          // [in_features] or null; not with a token_shift
  TokenShift token_shift;
  bool variance_correction;
  ElementType value_type;  // the input's type, or kE4M3 (with per-token scales) for a 16-bit input
  MetadataLayout layout;
};

// compress: P(x - eta) for 2:4, as values and metadata. in_features must be a multiple of 4 for the neutral layout,
// else of what the GEMM needs (16 for 16-bit values, 32 for e4m3). kFloat32 inputs: neutral layout only.
struct CompressParams {
  const void* x;  // [tokens, in_features], rows x_stride elements apart, any alignment (fastest at 16 bytes)
  int64_t x_stride;
  int64_t tokens;
  int in_features;  // at most kMaxRowFeatures if a row statistic is needed (e4m3, token shift, variance)
  ElementType x_type;
  CompressOutput out;
};
cudaError_t launch_compress(const CompressParams& params, cudaStream_t stream);

// compress for 2:4+1 (format/windows.h): the lifted 2:4 operand, to be multiplied with the lifted weight. out.values
// and out.metadata are those of lifted_features(in_features) features.
// x in kBFloat16 or kFloat16, its rows, channel_scale and shift are 16-byte aligned; in_features is a multiple of 64,
// of 128 for kE4M3 values and on sm80.
cudaError_t launch_compress_windows(const CompressParams& params, const Pattern& pattern, cudaStream_t stream);

// prune: P(x - eta) for any N:M, as a dense tensor of x's type.
struct PruneParams {
  const void* x;  // [tokens, in_features], rows x_stride elements apart
  int64_t x_stride;
  void* out;                   // [tokens, in_features], contiguous
  const float* channel_scale;  // [in_features] or null
  const float* shift;          // [in_features] or null
  const float* eta;            // [tokens] or null: the per-token shift that launch_token_shift wrote
  int64_t tokens;
  int in_features;  // a multiple of span_of(pattern)
  Pattern pattern;
  ElementType x_type;
};
cudaError_t launch_prune(const PruneParams& params, cudaStream_t stream);
// launch_prune calls this for 2:4+r.
cudaError_t launch_prune_windows(const PruneParams& params, cudaStream_t stream);

// Per-token statistics, for the patterns and paths whose selection kernel does not compute them itself.
struct TokenStatisticsParams {
  const void* x;  // [tokens, in_features], rows x_stride elements apart
  int64_t x_stride;
  int64_t tokens;
  int in_features;  // at most kMaxRowFeatures
  ElementType x_type;
};
// eta [tokens]: the per-token mean or median of x.
cudaError_t launch_token_shift(const TokenStatisticsParams& params, TokenShift kind, float* eta, cudaStream_t stream);
// nu [tokens]: sqrt(Var(x - eta) / Var(pruned)), or 1 where Var(pruned) is 0. At most one of shift [in_features] and
// eta [tokens] is not null; pruned [tokens, in_features] is contiguous and of x's type.
cudaError_t launch_variance_ratio(const TokenStatisticsParams& params, const void* pruned, const float* shift,
                                  const float* eta, float* nu, cudaStream_t stream);

// The producers of a fused selection's operand, token by token. Rows are 16-byte aligned; in_features is a multiple of
// 8, at most kMaxRowFeatures; x_type is kBFloat16 or kFloat16.

// norm(x, weight) = round(round(x * rsqrt(mean(x^2) + epsilon)) * weight), or with unit_offset, as in Gemma, round(x *
// rsqrt(mean(x^2) + epsilon) * (1 + weight)).

// x' = norm(h, weight), with h = round(x + residual), round(norm(x, x_weight) + residual), or x without a residual.
struct RmsNormInput {
  const void* x;         // [tokens, in_features], contiguous
  const void* residual;  // like x, or null
  void* residual_out;    // h, like x; may alias residual; null if residual is
  const void* weight;    // [in_features] of x's type
  float epsilon;
  int64_t tokens;
  int in_features;
  ElementType x_type;
  bool unit_offset = false;
  const void* x_weight = nullptr;  // like weight, or null; with a residual alone
};

// y = round(norm(x, weight) + residual), rows of whole 16-byte chunks, at most kMaxNormFeatures.
struct RmsNormAddParams {
  const void* x;         // [tokens, in_features], contiguous, 16-byte aligned, as everything here
  const void* residual;  // like x
  const void* weight;    // [in_features] of x's type
  void* y;               // like x; may alias x or residual
  float epsilon;
  bool unit_offset;
  int64_t tokens;
  int in_features;  // a multiple of 8
  ElementType x_type;
};
cudaError_t launch_rmsnorm_add(const RmsNormAddParams& params, cudaStream_t stream);

// x' = round(round(activation(gate)) * up).
struct SiluMulInput {
  const void* gate;  // [tokens, in_features], rows stride elements apart
  const void* up;    // like gate; gate + in_features for a merged projection
  int64_t stride;
  int64_t tokens;
  int in_features;
  ElementType x_type;
  Activation activation = Activation::kSilu;
};

// x' = x.
struct RowsInput {
  const void* x;  // [tokens, in_features], rows x_stride elements apart
  int64_t x_stride;
  int64_t tokens;
  int in_features;
  ElementType x_type;
};

// Then compress. in_features is a multiple of 16 (32 for kE4M3).
cudaError_t launch_rmsnorm_compress(const RmsNormInput& input, const CompressOutput& out, cudaStream_t stream);
cudaError_t launch_silu_mul_compress(const SiluMulInput& input, const CompressOutput& out, cudaStream_t stream);

// Or prune to any N:M, as a dense tensor.
struct PruneOutput {
  void* values;            // [tokens, in_features] of value_type, contiguous, 16-byte aligned
  float* row_scale;        // [tokens]: the scale of each token's kE4M3 values; not written otherwise
  Pattern pattern;         // without extra columns; its group divides in_features
  ElementType value_type;  // x_type, or kE4M3 if that is kBFloat16
};
cudaError_t launch_rmsnorm_prune(const RmsNormInput& input, const PruneOutput& out, cudaStream_t stream);
cudaError_t launch_silu_mul_prune(const SiluMulInput& input, const PruneOutput& out, cudaStream_t stream);
cudaError_t launch_prune_e4m3(const RowsInput& input, const PruneOutput& out, cudaStream_t stream);  // kE4M3 only

// y = round(y * row_scale * column_scale + bias): the epilogue of a dense e4m3 product that was computed with the scale
// to which device_one points. bfloat16; out_features is a multiple of 8.
struct ScaleProductParams {
  void* y;                    // [tokens, out_features], contiguous, 16-byte aligned
  const float* row_scale;     // [tokens]
  const float* column_scale;  // [out_features]
  const void* bias;           // [out_features] of y's type, 16-byte aligned, or null
  int64_t tokens;
  int out_features;
};
cudaError_t launch_scale_product(const ScaleProductParams& params, cudaStream_t stream);

// 1.0f in the memory of the current device.
cudaError_t device_one(const float** one);

// sparse_gemm: y = (row_scale * acc + eta (x) shift_out) * column_scale + bias, where acc = decompress(values,
// metadata) @ weight^T in float32. A null vector omits its factor or term; without eta, shift_out itself is added.
struct SparseGemmParams {
  const void* values;       // [tokens, in_features / 2] of value_type, contiguous, 16-byte aligned
  const uint8_t* metadata;  // of the first token, in gemm_metadata_layout(value_type, arch), 16-byte aligned
  int metadata_tokens;      // of the operand; more than `tokens` on sm_90 alone, where these begin at a multiple of 64
  const void* weight;  // of value_type, 16-byte aligned: [out_features, in_features], or if weight_in_out (16-bit only)
                       // [in_features, out_features]; rows weight_stride elements apart
  int64_t weight_stride;      // a multiple of 16 bytes
  void* y;                    // [tokens, out_features] of y_type, 16-byte aligned, rows y_stride elements apart
  int64_t y_stride;           // a multiple of 16 bytes
  const float* row_scale;     // [tokens] or null
  const float* eta;           // [tokens] or null
  const float* shift_out;     // [out_features] or null
  const float* column_scale;  // [out_features] or null
  const void* bias;           // [out_features] of y_type, or null
  const void* residual;       // of y's shape, type and strides, or null: added to the rounded y
  int tokens;
  int out_features;  // a multiple of 8 (of 16 for kE4M3)
  int in_features;   // a multiple of 16, 32 for kE4M3 and on sm80
  ElementType value_type;
  ElementType y_type;  // value_type; kBFloat16 or kFloat16 for kE4M3
  bool weight_in_out;
};
// gated_gemm: the packed 2:4 operand of z = activation(gate) * up with [gate, up] = product, over a merged weight
// stored [in, out] whose first out_features / 2 outputs are the gate's; bit for bit equal to silu_mul_compress. Needs
// 16-bit values, compute capability 9.0 and out_features a multiple of 32, without scales, terms or residual. product.y
// receives the operand's values [tokens, out_features / 4].
struct GatedGemmParams {
  SparseGemmParams product;
  uint8_t* metadata;  // [metadata_bytes(kSm90Bits16T64, tokens, out_features / 2)]
  Activation activation;
};
bool gated_gemm_supports(const GatedGemmParams& params, GemmDevice device);
cudaError_t query_gemm_device(int device, GemmDevice* result);
const char* cuda_error_text(cudaError_t status);
MetadataLayout gemm_metadata_layout(ElementType value_type, GemmDevice device);
bool sparse_gemm_supports(const SparseGemmParams& params, GemmDevice device);

// gather: y = (row_scale * weight_scale * (P @ W) + shift term) * column_scale + bias for a few tokens, in one launch.
// P is the selection of x - shift, or x itself without a pattern. A row of W is read only if its feature survives
// (without a pattern: is not zero) in some token. The shift term is eta (x) shift_out, or shift_out without eta; with a
// pattern, eta and shift are also subtracted before the selection. A null vector omits its factor or term.
struct GatherParams {
  const void* x;  // [tokens, in_features] of x_type, rows x_stride elements apart, any alignment
  int64_t x_stride;
  const void* weight;          // W [in_features, out_features] of weight_type, 16-byte aligned
  int64_t weight_stride;       // elements from one row to the next, a multiple of 16 bytes
  void* y;                     // [tokens, out_features] of x_type, contiguous, 4-byte aligned
  const float* channel_scale;  // [in_features] or null
  const float* shift;          // [in_features] or null
  const float* eta;            // [tokens] or null: what launch_token_shift wrote
  const float* row_scale;      // [tokens] or null
  const float* weight_scale;   // [out_features] or null
  const float* shift_out;      // [out_features] or null
  const float* column_scale;   // [out_features] or null
  const void* bias;            // [out_features] of x_type, or null
  // The operators before the selection and after the product, which are computed in the same launch. At most one of up
  // and norm_weight is not null; it and x must then be 16-byte aligned, and in_features a multiple of 8.
  const void* up;           // [tokens, in_features], rows x_stride apart, or null: x becomes activation(x) * up
  const void* norm_weight;  // [in_features] of x_type, or null: x becomes RMSNorm(x) * norm_weight
  float epsilon;
  // For a layer with norms before and after its parts, together with norm_weight: x first becomes RMSNorm(x) * x_weight
  // + x_residual, and that sum is written to `hidden`.
  const void* x_weight;     // like norm_weight, or null
  const void* x_residual;   // [tokens, in_features] of x_type, contiguous, 16-byte aligned, with x_weight
  void* hidden;             // like x_residual
  const void* residual;     // [tokens, out_features] of x_type, contiguous, or null: added to the rounded y
  int tokens;               // at most kMaxGatherTokens; kFewTokens with a pattern or 8-bit weights
  int in_features;          // a multiple of pattern.group
  int out_features;         // a multiple of 8, or of 16 with 8-bit weights
  Pattern pattern;          // keep 0: no selection
  ElementType x_type;       // kBFloat16 or kFloat16
  ElementType weight_type;  // x_type, kE4M3 or kInt8
  Activation activation;    // with up
  bool unit_offset;         // with norm_weight: 1 is added to it, and to x_weight
};
// config: one of for_each_gather_config, such as choose_gather_config's.
struct GatherConfig;  // gather/config.h
bool gather_supports(const GatherParams& params, GemmDevice device);
cudaError_t launch_gather(const GatherParams& params, GemmDevice device, const GatherConfig& config,
                          cudaStream_t stream);

// RMSNorm of each head's features before the rotary embedding, for dims of head_norms_support.
struct HeadNorms {
  const void* q;  // [dim], 16-byte aligned, or null: no norm of the queries
  const void* k;  // like q, of the keys
  float epsilon;
  bool unit_offset;
};

// rotary: queries and keys turned by their positions, and keys and values written into a cache.
struct RotaryPart {
  const void* data;  // [batch, tokens, heads, dim]: heads are dim elements apart; null for absent values
  int64_t batch_stride, token_stride;
  void* out;  // any order of batch, tokens and heads, unit stride within a head
  int64_t out_batch_stride, out_token_stride, out_head_stride;
  int out_tokens;  // tokens that `out` has room for; none is written beyond
  int heads;
};
// All strides are multiples of 8 elements and all pointers 16-byte aligned; dim is a multiple of 16.
struct RotaryParams {
  RotaryPart q, k, v;
  const void* cos;  // [cos_batch, tokens, dim], contiguous
  const void* sin;  // like cos
  int cos_batch;    // 1 or batch
  // [batch] or null: tokens in the cache, including the new ones, whose keys and values go to the last places. Null:
  // they go to the same token.
  const int32_t* lengths;
  int batch, tokens, dim;
  ElementType type;  // of everything; kBFloat16 or kFloat16
  HeadNorms norms;
};
cudaError_t launch_rotary(const RotaryParams& params, cudaStream_t stream);

// decode_attention: attention of one new token per sequence over a static cache, with the rotary embedding of q and k
// and the write of k and v into the cache, at lengths - 1. A sequence whose length is outside 1 to max_tokens writes
// nothing and its y is NaN. Needs compute capability 9.0.
struct DecodeAttentionParams {
  const void* q;                         // [batch, q_heads, dim], sequences q_stride elements apart; so are k and v
  const void* k;                         // [batch, k_heads, dim]
  const void* v;                         // like k
  int64_t q_stride, k_stride, v_stride;  // multiples of 8
  const void* cos;                       // [cos_batch, dim], contiguous
  const void* sin;                       // like cos
  int cos_batch;                         // 1 or batch
  void* keys;                            // [batch, k_heads, max_tokens, dim], contiguous
  void* values;                          // like keys
  const int32_t* lengths;                // [batch]: tokens, the new one included
  void* y;                               // [batch, q_heads, dim], contiguous
  float scaling;
  int window;  // tokens to attend to, the new one included; 0: all
  int batch, q_heads, k_heads, max_tokens, dim;
  ElementType type;  // of everything; kBFloat16 or kFloat16
  HeadNorms norms;
};
cudaError_t launch_decode_attention(const DecodeAttentionParams& params, GemmDevice device, cudaStream_t stream);

#endif  // NM_ACT_CUDA

}  // namespace nm_act
