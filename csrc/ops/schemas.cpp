// The one place where the operators of nm_act are declared. Fakes (shape functions) are in nm_act/ops, beside the
// functions that call them.
//
// Shapes: x [..., in_features], weight [out_features, in_features] with either stride order, y [..., out_features];
// "tokens" is the product of the leading dimensions and may be 0. x, weight and bias share one dtype of float32,
// bfloat16, float16; channel_scale and shift [in_features], shift_out and column_scale [out_features] are float32 or
// that dtype.
//
// With a weight_scale, float32 [out_features], the weight is float8_e4m3fn or int8 and W = weight * weight_scale per
// output channel; otherwise W = weight.
//
//   Z = X - eta          eta: `shift`, one value per channel, or `token_shift` ("mean", "median"), one value per token
//   P = the n of every m consecutive values of a token's Z with the largest |Z| * |channel_scale|, zeros elsewhere
//   Y = (nu * (P @ W^T) + shift term) * column_scale + bias
//       nu: with variance_correction, sqrt(Var(Z) / Var(P)) per token (1 where Var(P) is 0); otherwise 1
//       shift term: shift_out with `shift`, eta (x) shift_out with `token_shift`. shift_out is W @ shift or W @ 1, and
//       is computed from the weight in every call if it is not given
//
// Selection contract, deterministic and bitwise equal on every device (nm_act/reference.py is the oracle):
//   * groups start at feature 0 and never cross tokens; exactly n of every m survive;
//   * with extra_columns (one or two distinct columns of 0 to 3; n:m must be 2:4; written 2:4+1 or 2:4+2), five or six
//     windows with room for two features each cover every 16 features: the four quads, and {e, 4 + e, 8 + e, 12 + e}
//     for each e in extra_columns. Features are kept by descending score while the windows can hold all kept ones: ten
//     or twelve of 16 survive;
//   * Z is rounded to the dtype of X; the score is one float32 product of |Z| and |channel_scale|;
//   * ties go to the lowest index; -0.0 equals 0.0 in the comparison and keeps its sign if it survives;
//   * an infinite Z ranks above every finite one and NaN above infinity, whatever the scale; a finite Z whose score
//     overflows or is NaN counts as the largest finite float32;
//   * so a NaN in a token gives NaN outputs, as in dense arithmetic, and no infinity is pruned for a finite value;
//   * pruned entries are +0.0; without a shift the survivors keep their bits.
// Weights must be finite: the row of a pruned input may not be read at all.
#include <torch/library.h>

TORCH_LIBRARY(nm_act, m) {
  m.def(
      "prune(Tensor x, int n, int m, *, Tensor? channel_scale=None, Tensor? shift=None, str token_shift=\"none\", "
      "int[] extra_columns=[]) -> Tensor");

  // 2:4 in the device-neutral format: values [..., in_features / 2] in the dtype of x, two survivors per group in index
  // order; metadata uint8 [..., ceil(in_features / 8)], one nibble per group (first index | second index << 2), the
  // lower group in the low nibble. The physical layouts of the tensor cores are in csrc/kernels/format/metadata.h.
  m.def(
      "compress(Tensor x, *, Tensor? channel_scale=None, Tensor? shift=None, str token_shift=\"none\") "
      "-> (Tensor values, Tensor metadata)");
  m.def("decompress(Tensor values, Tensor metadata) -> Tensor");

  // activation_dtype: float8_e4m3fn casts the survivors of each token to e4m3 with one dynamic scale per token, for the
  // fp8 tensor cores (2:4 on CUDA, an e4m3 weight stored [out, in] with its weight_scale); otherwise the dtype of x.
  // lifted_weight: the result of nm_act.lift_weight for 2:4+1, which the sparse tensor cores use if that is faster. It
  // must be made from `weight`, which is used otherwise.
  m.def(
      "sparse_linear(Tensor x, Tensor weight, Tensor? bias=None, int n=2, int m=4, *, Tensor? channel_scale=None, "
      "Tensor? shift=None, str token_shift=\"none\", Tensor? shift_out=None, bool variance_correction=False, "
      "Tensor? column_scale=None, Tensor? weight_scale=None, int[] extra_columns=[], Tensor? lifted_weight=None, "
      "ScalarType? activation_dtype=None) -> Tensor");

  // CPU only, without a gradient. prepacked_weight is `weight` in the layout that oneDNN's product reads, as made by
  // mkldnn::_reorder_linear_weight, and is used where skipping rows does not pay.
  m.def(
      "sparse_linear_prepacked(Tensor x, Tensor weight, Tensor prepacked_weight, Tensor? bias=None, int n=2, int m=4, "
      "*, Tensor? channel_scale=None, Tensor? shift=None, str token_shift=\"none\", Tensor? shift_out=None, "
      "bool variance_correction=False, Tensor? column_scale=None, int[] extra_columns=[]) -> Tensor");
  // For the vLLM plug-in only: layer is the address, int64, of a torch.classes.nm_act.PackedLayer.
  m.def("_packed_layer(Tensor x, Tensor layer, int out_features, Tensor? bias=None) -> Tensor");

  // Y = X @ W^T + bias for a weight stored [in, out], reading only the rows whose input is not zero in some token: the
  // gather kernel of sparse_linear without the selection. At most 8 tokens. With a weight_scale, four at a time on
  // CUDA; on a CPU and where no kernel fits, the weight is dequantised at every call.
  m.def("gather_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? weight_scale=None) -> Tensor");

  // CPU only. Y = X @ W^T + bias for a weight stored [out, in], faster than torch's product for up to 8 tokens.
  m.def("dense_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");

  // CUDA only. compress_packed and the producers write the layout that this device's sparse GEMM reads: values
  // [tokens, in_features / 2] in the dtype of x, or with activation_dtype float8_e4m3fn scaled per token by its largest
  // |Z| / 448, metadata uint8 [bytes], row_scale [tokens] (nu times the e4m3 scale) and eta [tokens], float32, empty if
  // not requested. The producers support 2:4; compress_packed also 2:4+1, whose operand has the in_features of the
  // lifted weight (csrc/kernels/format/windows.h).
  m.def(
      "compress_packed(Tensor x, int n=2, int m=4, *, Tensor? channel_scale=None, Tensor? shift=None, str "
      "token_shift=\"none\", "
      "bool variance_correction=False, ScalarType? activation_dtype=None, int[] extra_columns=[]) "
      "-> (Tensor values, Tensor metadata, Tensor row_scale, Tensor eta)");
  // x' = norm(hidden, weight), then compress_packed. hidden = x + residual, or norm(x, x_weight) + residual with
  // x_weight; it is returned only with a residual, otherwise an empty tensor, and hidden is x. norm(x, weight) =
  // RMSNorm(x) * weight, rounded before the product too; with unit_offset RMSNorm(x) * (1 + weight), rounded once, as
  // Gemma's module rounds.
  m.def(
      "rms_norm_compress(Tensor x, Tensor weight, float eps, Tensor? residual=None, *, Tensor? channel_scale=None, "
      "Tensor? shift=None, str token_shift=\"none\", bool variance_correction=False, ScalarType? "
      "activation_dtype=None, bool unit_offset=False, Tensor? x_weight=None) "
      "-> (Tensor values, Tensor metadata, Tensor row_scale, Tensor eta, Tensor hidden)");
  // x' = activation(gate) * up, rounded before the product too, then compress_packed. activation is "silu" or
  // "gelu_tanh".
  m.def(
      "silu_mul_compress(Tensor gate, Tensor up, *, Tensor? channel_scale=None, Tensor? shift=None, "
      "str token_shift=\"none\", bool variance_correction=False, ScalarType? activation_dtype=None, "
      "str activation=\"silu\") "
      "-> (Tensor values, Tensor metadata, Tensor row_scale, Tensor eta)");
  // The same producers for any n:m: values [tokens, in_features], dense with zeros, in the dtype of x, or in
  // float8_e4m3fn (from bfloat16) with one row_scale per token, max|Z| / 448; row_scale is empty otherwise.
  m.def(
      "rms_norm_prune(Tensor x, Tensor weight, float eps, Tensor? residual=None, int n=2, int m=4, *, "
      "ScalarType? activation_dtype=None, bool unit_offset=False, Tensor? x_weight=None) "
      "-> (Tensor values, Tensor row_scale, Tensor hidden)");
  m.def(
      "silu_mul_prune(Tensor gate, Tensor up, int n=2, int m=4, *, ScalarType? activation_dtype=None, "
      "str activation=\"silu\") -> (Tensor values, Tensor row_scale)");
  // values @ weight^T, both float8_e4m3fn, [tokens, in_features] and [out_features, in_features], times row_scale and
  // weight_scale, plus bias, in bfloat16. A few tokens are multiplied by cuBLAS with one scale, and scaled by a kernel
  // of their own; more tokens take torch's row-wise scaled product.
  m.def(
      "e4m3_product(Tensor values, Tensor row_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor");
  // norm(x, weight) + residual, for layers with a norm after attention and MLP.
  m.def("rms_norm_add(Tensor x, Tensor weight, float eps, Tensor residual, *, bool unit_offset=False) -> Tensor");
  // sparse_linear for one to four tokens over a weight stored [in, out], in one launch with the operators before and
  // after it: its input is norm(x, norm_weight), activation(x) * up, or x; the residual [..., out_features] is added to
  // the rounded Y. eps and unit_offset belong to norm_weight, activation to up: one without the other is an error.
  m.def(
      "decode_linear(Tensor x, Tensor weight, Tensor? bias=None, int n=2, int m=4, *, Tensor? up=None, "
      "Tensor? norm_weight=None, float? eps=None, Tensor? residual=None, Tensor? channel_scale=None, "
      "Tensor? weight_scale=None, str? activation=None, bool unit_offset=False) -> Tensor");
  // decode_linear of norm(hidden, norm_weight) with hidden = norm(x, x_weight) + residual, for layers with norms before
  // and after their parts.
  m.def(
      "sandwich_linear(Tensor x, Tensor x_weight, Tensor residual, Tensor norm_weight, float eps, Tensor weight, "
      "Tensor? bias=None, int n=2, int m=4, *, Tensor? channel_scale=None, Tensor? weight_scale=None, "
      "bool unit_offset=False) -> (Tensor y, Tensor hidden)");
  // Rotary position embedding, round(round(x * cos) + round(rotate_half(x) * sin)), of q and k [batch, tokens, heads,
  // head_dim] with cos and sin [1 or batch, tokens, head_dim]. rotary_cache writes the keys and v into a static cache
  // [batch, heads, max_tokens, head_dim], at the last places before lengths [batch], int32, which count the new tokens.
  // With q_norm and k_norm [head_dim], each head is norm(head, q_norm or k_norm) first; eps and unit_offset are theirs.
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, Tensor? q_norm=None, Tensor? k_norm=None, "
      "float? eps=None, bool unit_offset=False) -> (Tensor, Tensor)");
  m.def(
      "rotary_cache(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor lengths, *, Tensor? q_norm=None, Tensor? k_norm=None, float? eps=None, bool unit_offset=False) -> "
      "Tensor");
  // Attention of one new token per sequence over a static cache, with rotary_cache in the same launch:
  // softmax(scaling * q K^T) V over the last `window` tokens, the new one included, or all of them with window 0. A
  // sequence whose length is outside 1 to max_tokens writes nothing and its result is NaN.
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor lengths, float scaling, int window=0, *, Tensor? q_norm=None, Tensor? k_norm=None, float? eps=None, "
      "bool unit_offset=False) -> Tensor");

  // Y = (row_scale * P @ W^T + eta (x) shift_out) * column_scale + bias from a packed P; accumulated in float32. layout
  // names the metadata's layout, which must be the one that the device's GEMM reads. The residual
  // [tokens, out_features] is added to the rounded Y.
  m.def(
      "sparse_gemm(Tensor values, Tensor metadata, str layout, Tensor weight, Tensor? bias=None, *, "
      "Tensor? row_scale=None, Tensor? eta=None, Tensor? shift_out=None, Tensor? column_scale=None, ScalarType? "
      "out_dtype=None, Tensor? residual=None) -> Tensor");

  // The packed 2:4 operand of activation(gate) * up with [gate, up] = sparse_gemm over a merged weight [2 * outputs,
  // in_features] stored [in, out]: 16-bit values, bit for bit equal to silu_mul_compress.
  m.def(
      "sparse_gemm_silu_mul(Tensor values, Tensor metadata, str layout, Tensor weight, *, str activation=\"silu\") "
      "-> (Tensor values, Tensor metadata)");

  // Private, for benchmarks/tune_decode.py, tune_decode_layers.py and tune.py: decode_linear, sandwich_linear (with
  // x_weight; x_residual is its residual) and sparse_gemm with the caller's configuration. For the gather kernel:
  // lanes, splits, threads, ahead (csrc/kernels/gather/config.h); for the GEMM on sm_90: tile, raster, swizzle, splits,
  // overlapped, paced, or two such with cut (1: along the tokens, 2: along the outputs) and at between them
  // (csrc/kernels/matmul/config.h). Without x_weight, hidden is empty.
  m.def(
      "_tune_gather(Tensor x, Tensor weight, Tensor? bias, int n, int m, int[] config, *, Tensor? up=None, "
      "Tensor? norm_weight=None, float? eps=None, Tensor? residual=None, Tensor? channel_scale=None, "
      "Tensor? weight_scale=None, str? activation=None, bool unit_offset=False, Tensor? x_weight=None, "
      "Tensor? x_residual=None) -> (Tensor y, Tensor hidden)");
  m.def(
      "_tune_sparse_gemm(Tensor values, Tensor metadata, str layout, Tensor weight, int[] config, *, "
      "Tensor? row_scale=None, Tensor? eta=None, Tensor? shift_out=None, Tensor? column_scale=None, "
      "ScalarType? out_dtype=None) -> Tensor");
}
