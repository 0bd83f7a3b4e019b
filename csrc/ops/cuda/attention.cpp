// The operators after the q/k/v product on CUDA: the rotary embedding, the cache's update, and attention of a decode
// step.
#include <torch/library.h>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {
namespace {

// Heads [batch, tokens, heads, dim] as the kernel reads them: a token's heads side by side, aligned rows.
at::Tensor heads_of(const at::Tensor& x) {
  const bool readable = x.stride(3) == 1 && x.stride(2) == x.size(3) && x.stride(1) % 8 == 0 && x.stride(0) % 8 == 0;
  return readable ? (is_aligned(x) ? x : x.clone(at::MemoryFormat::Contiguous)) : aligned(x);
}

void check_heads(const at::Tensor& q, const at::Tensor& other, const char* name, const char* op) {
  check_same_device(q, other, name, op);
  TORCH_CHECK_TYPE(other.scalar_type() == q.scalar_type(), "nm_act::", op, " expected ", name, " in ", dtype_text(q),
                   ", got ", dtype_text(other), "; convert it");
  TORCH_CHECK_VALUE(
      other.dim() == 4 && other.size(0) == q.size(0) && other.size(1) == q.size(1) && other.size(3) == q.size(3),
      "nm_act::", op, " expected ", name, " of shape [", q.size(0), ", ", q.size(1), ", heads, ", q.size(3), "], got ",
      other.sizes(), "; give q, k and v one batch, length and head size");
}

void check_rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
                  const char* op) {
  TORCH_CHECK_TYPE(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, "nm_act::", op,
                   " expected q in bfloat16 or float16, got ", dtype_text(q), "; convert it first");
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) % 16 == 0 && q.size(3) > 0, "nm_act::", op,
                    " expected q of shape [batch, tokens, heads, head_dim] with head_dim divisible by 16, got ",
                    q.sizes(), "; use the unfused embedding");
  check_heads(q, k, "k", op);
  for (const auto& [name, angle] : {std::pair{"cos", &cos}, std::pair{"sin", &sin}}) {
    check_same_device(q, *angle, name, op);
    TORCH_CHECK_TYPE(angle->scalar_type() == q.scalar_type(), "nm_act::", op, " expected ", name, " in ", dtype_text(q),
                     ", got ", dtype_text(*angle), "; convert it");
    TORCH_CHECK_VALUE(angle->dim() == 3 && (angle->size(0) == 1 || angle->size(0) == q.size(0)) &&
                          angle->size(1) == q.size(1) && angle->size(2) == q.size(3),
                      "nm_act::", op, " expected ", name, " of shape [1 or ", q.size(0), ", ", q.size(1), ", ",
                      q.size(3), "], got ", angle->sizes(), "; give one angle a position and feature");
  }
  TORCH_CHECK_VALUE(cos.size(0) == sin.size(0), "nm_act::", op, " expected cos and sin of one shape, got ", cos.sizes(),
                    " and ", sin.sizes(), "; expand one of them");
}

// keys and values [batch, heads, max_tokens, head_dim] of a static cache, and the lengths [batch] of its sequences.
void check_cache(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cached_keys,
                 const at::Tensor& cached_values, const at::Tensor& lengths, const char* op) {
  check_heads(q, v, "v", op);
  TORCH_CHECK_VALUE(v.size(2) == k.size(2), "nm_act::", op, " expected v with the ", k.size(2), " heads of k, got ",
                    v.size(2), "; give one value head a key head");
  for (const auto& [name, cache] : {std::pair{"keys", &cached_keys}, std::pair{"values", &cached_values}}) {
    check_same_device(q, *cache, name, op);
    const bool fits = cache->scalar_type() == q.scalar_type() && cache->dim() == 4 && cache->size(0) == q.size(0) &&
                      cache->size(1) == k.size(2) && cache->size(2) >= q.size(1) && cache->size(3) == q.size(3) &&
                      cache->is_contiguous() && is_aligned(*cache);
    TORCH_CHECK_VALUE(fits, "nm_act::", op, " expected contiguous ", name, " of shape [", q.size(0), ", ", k.size(2),
                      ", at least ", q.size(1), ", ", q.size(3), "] in ", dtype_text(q), ", got ", cache->sizes(),
                      " in ", dtype_text(*cache), "; allocate the cache so");
  }
  check_same_device(q, lengths, "lengths", op);
  TORCH_CHECK_VALUE(lengths.scalar_type() == at::kInt && lengths.dim() == 1 && lengths.size(0) == q.size(0) &&
                        lengths.is_contiguous(),
                    "nm_act::", op, " expected lengths as int32 [", q.size(0), "], got ", dtype_text(lengths), " ",
                    lengths.sizes(), "; give the tokens of each sequence, the new ones included");
}

RotaryPart read_part(const at::Tensor& heads) {
  RotaryPart part{};
  part.data = heads.const_data_ptr();
  part.batch_stride = heads.stride(0);
  part.token_stride = heads.stride(1);
  part.heads = int(heads.size(2));
  return part;
}

void write_to(RotaryPart& part, const at::Tensor& out, int batch_at, int token_at, int head_at) {
  part.out = out.mutable_data_ptr();
  part.out_batch_stride = out.stride(batch_at);
  part.out_token_stride = out.stride(token_at);
  part.out_head_stride = out.stride(head_at);
  part.out_tokens = int(out.size(token_at));
}

// The norms of the heads after checking, aligned.
struct HeadNormTensors {
  at::Tensor q, k;
  HeadNorms norms{};
};

HeadNormTensors head_norms(const at::Tensor& q, const OptionalTensor& q_norm, const OptionalTensor& k_norm,
                           std::optional<double> eps, bool unit_offset, const char* op) {
  HeadNormTensors tensors;
  const bool normed = (q_norm.has_value() && q_norm->defined()) || (k_norm.has_value() && k_norm->defined());
  tensors.norms.epsilon = check_norm_options(normed, eps, unit_offset, "q_norm or k_norm", op);
  tensors.norms.unit_offset = unit_offset;
  for (const auto& [name, weight, kept, pointer] : {std::tuple{"q_norm", &q_norm, &tensors.q, &tensors.norms.q},
                                                    std::tuple{"k_norm", &k_norm, &tensors.k, &tensors.norms.k}}) {
    if (!weight->has_value() || !(*weight)->defined()) continue;
    check_norm_weight(q, **weight, q.size(3), name, op);
    TORCH_CHECK_VALUE(head_norms_support(q.size(3)), "nm_act::", op,
                      " expected head_dim 16, 32, 64, 128, 256 or 512 with ", name, ", got ", q.size(3),
                      "; apply the norm before");
    *kept = aligned(**weight);
    *pointer = kept->const_data_ptr();
  }
  return tensors;
}

RotaryParams rotary_params(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  RotaryParams params{};
  params.q = read_part(q);
  params.k = read_part(k);
  params.cos = cos.const_data_ptr();
  params.sin = sin.const_data_ptr();
  params.cos_batch = int(cos.size(0));
  params.batch = int(q.size(0));
  params.tokens = int(q.size(1));
  params.dim = int(q.size(3));
  params.type = element_type(q.scalar_type());
  return params;
}

std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                          const at::Tensor& sin, const OptionalTensor& q_norm,
                                          const OptionalTensor& k_norm, std::optional<double> eps, bool unit_offset) {
  constexpr const char* kOp = "rotary";
  check_rotary(q, k, cos, sin, kOp);
  const HeadNormTensors norms = head_norms(q, q_norm, k_norm, eps, unit_offset, kOp);
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor queries = heads_of(q), keys = heads_of(k), cosines = aligned(cos), sines = aligned(sin);
  const at::Tensor q_out = at::empty(q.sizes(), q.options()), k_out = at::empty(k.sizes(), k.options());
  RotaryParams params = rotary_params(queries, keys, cosines, sines);
  params.norms = norms.norms;
  write_to(params.q, q_out, 0, 1, 2);
  write_to(params.k, k_out, 0, 1, 2);
  check_status(launch_rotary(params, current_stream(q)), kOp);
  return {q_out, k_out};
}

at::Tensor rotary_cache(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos,
                        const at::Tensor& sin, const at::Tensor& cached_keys, const at::Tensor& cached_values,
                        const at::Tensor& lengths, const OptionalTensor& q_norm, const OptionalTensor& k_norm,
                        std::optional<double> eps, bool unit_offset) {
  constexpr const char* kOp = "rotary_cache";
  check_rotary(q, k, cos, sin, kOp);
  check_cache(q, k, v, cached_keys, cached_values, lengths, kOp);
  const HeadNormTensors norms = head_norms(q, q_norm, k_norm, eps, unit_offset, kOp);
  const c10::cuda::CUDAGuard guard(q.device());
  const at::Tensor queries = heads_of(q), keys = heads_of(k), values = heads_of(v);
  const at::Tensor cosines = aligned(cos), sines = aligned(sin), q_out = at::empty(q.sizes(), q.options());
  RotaryParams params = rotary_params(queries, keys, cosines, sines);
  params.v = read_part(values);
  params.norms = norms.norms;
  params.lengths = lengths.const_data_ptr<int32_t>();
  write_to(params.q, q_out, 0, 1, 2);
  write_to(params.k, cached_keys, 0, 2, 1);
  write_to(params.v, cached_values, 0, 2, 1);
  check_status(launch_rotary(params, current_stream(q)), kOp);
  return q_out;
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos,
                            const at::Tensor& sin, const at::Tensor& cached_keys, const at::Tensor& cached_values,
                            const at::Tensor& lengths, double scaling, int64_t window, const OptionalTensor& q_norm,
                            const OptionalTensor& k_norm, std::optional<double> eps, bool unit_offset) {
  constexpr const char* kOp = "decode_attention";
  check_rotary(q, k, cos, sin, kOp);
  check_cache(q, k, v, cached_keys, cached_values, lengths, kOp);
  TORCH_CHECK_VALUE(q.size(1) == 1, "nm_act::", kOp, " expected one new token per sequence, got ", q.size(1),
                    "; use rotary_cache and another attention for prompts");
  TORCH_CHECK_VALUE(window >= 0 && window <= INT32_MAX, "nm_act::", kOp, " expected a window of tokens or 0, got ",
                    window, "; use 0 to attend to all");
  const HeadNormTensors norms = head_norms(q, q_norm, k_norm, eps, unit_offset, kOp);
  const c10::cuda::CUDAGuard guard(q.device());
  const GemmDevice device = gemm_device(q, kOp);
  TORCH_CHECK_NOT_IMPLEMENTED(
      device.compute_capability_major == 9 && decode_attention_supports(q.size(2), k.size(2), q.size(3)),
      "nm_act::", kOp,
      " expected compute capability 9.0, at most 8 query heads a key head and head_dim 64, 128 or 256, got ",
      device.compute_capability_major, ".x, ", q.size(2), " and ", k.size(2), " heads of ", q.size(3),
      "; use rotary_cache and another attention");
  const at::Tensor queries = heads_of(q), keys = heads_of(k), values = heads_of(v);
  const at::Tensor cosines = aligned(cos), sines = aligned(sin), y = at::empty(q.sizes(), q.options());
  DecodeAttentionParams params{};
  params.q = queries.const_data_ptr();
  params.k = keys.const_data_ptr();
  params.v = values.const_data_ptr();
  params.q_stride = queries.stride(0);
  params.k_stride = keys.stride(0);
  params.v_stride = values.stride(0);
  params.cos = cosines.const_data_ptr();
  params.sin = sines.const_data_ptr();
  params.cos_batch = int(cosines.size(0));
  params.keys = cached_keys.mutable_data_ptr();
  params.values = cached_values.mutable_data_ptr();
  params.lengths = lengths.const_data_ptr<int32_t>();
  params.y = y.mutable_data_ptr();
  params.scaling = float(scaling);
  params.window = int(window);
  params.batch = int(q.size(0));
  params.q_heads = int(q.size(2));
  params.k_heads = int(k.size(2));
  params.max_tokens = int(cached_keys.size(2));
  params.dim = int(q.size(3));
  params.type = element_type(q.scalar_type());
  params.norms = norms.norms;
  check_status(launch_decode_attention(params, device, current_stream(q)), kOp);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("decode_attention", decode_attention);
  m.impl("rotary", rotary);
  m.impl("rotary_cache", rotary_cache);
}

}  // namespace nm_act::cuda_ops
