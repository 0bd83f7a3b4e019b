// Checks of a selection's arguments and of the vectors that belong to it.
#include "ops/selection.h"

#include "kernels/nm_act.h"

namespace nm_act {

Selection check_selection(const at::Tensor& x, int64_t n, int64_t m, const OptionalTensor& channel_scale,
                          const OptionalTensor& shift, std::string_view token_shift, const char* op,
                          at::IntArrayRef extra_columns) {
  Selection s;
  check_features(x, op);
  s.type = check_dtype(x, op);
  s.in_features = x.size(-1);
  check_pattern(n, m, s.in_features, op);
  s.token_shift = check_token_shift(token_shift, shift.has_value() && shift->defined(), op);
  s.channel_scale = check_vector(channel_scale, x, s.in_features, "channel_scale", op);
  s.shift = check_vector(shift, x, s.in_features, "shift", op);
  s.tokens = x.numel() / s.in_features;
  TORCH_CHECK_VALUE(!x.is_cuda() || (s.tokens <= kMaxTokens && s.in_features <= kMaxFeatures), "nm_act::", op,
                    " expected at most ", kMaxTokens, " tokens of ", kMaxFeatures, " features on CUDA, got ", s.tokens,
                    " of ", s.in_features, "; split x");
  s.pattern = {int(n), int(m), check_extra_columns(extra_columns, n, m, s.in_features, op)};
  return s;
}

at::Tensor check_lifted_weight(const OptionalTensor& lifted_weight, const Selection& selection, const at::Tensor& x,
                               const at::Tensor& weight, const char* op) {
  if (!lifted_weight.has_value() || !lifted_weight->defined()) return {};
  const Pattern& pattern = selection.pattern;
  TORCH_CHECK_VALUE(is_lifted(pattern), "nm_act::", op, " expected lifted_weight with 2:4+1 only, got it with ",
                    pattern_text(pattern), "; leave lifted_weight out");
  check_same_device(x, *lifted_weight, "lifted_weight", op);
  TORCH_CHECK_TYPE(lifted_weight->scalar_type() == x.scalar_type(), "nm_act::", op,
                   " expected lifted_weight in the dtype of x, ", dtype_text(x), ", got ", dtype_text(*lifted_weight),
                   "; lift the weight that is passed along");
  const int64_t lifted = lifted_features(selection.in_features);
  TORCH_CHECK_VALUE(
      lifted_weight->dim() == 2 && lifted_weight->size(0) == weight.size(0) && lifted_weight->size(1) == lifted,
      "nm_act::", op, " expected lifted_weight of shape [", weight.size(0), ", ", lifted, "] for this pattern, got ",
      lifted_weight->sizes(), "; use nm_act.lift_weight(weight, pattern)");
  return *lifted_weight;
}

at::Tensor check_shift_out(const OptionalTensor& shift_out, const Selection& selection, const at::Tensor& x,
                           int64_t out_features, const char* op) {
  at::Tensor vector = check_vector(shift_out, x, out_features, "shift_out", op);
  TORCH_CHECK_VALUE(selection.has_shift() || !vector.defined(), "nm_act::", op,
                    " expected shift or token_shift along with shift_out, got shift_out alone; ",
                    "add the shift or pass the vector as bias");
  return vector;
}

bool is_e4m3(std::optional<at::ScalarType> activation_dtype, const at::Tensor& x, const char* op) {
  if (!activation_dtype.has_value() || *activation_dtype == x.scalar_type()) return false;
  TORCH_CHECK_TYPE(*activation_dtype == at::kFloat8_e4m3fn, "nm_act::", op,
                   " expected activation_dtype float8_e4m3fn or the dtype of x, ", dtype_text(x), ", got ",
                   dtype_text(*activation_dtype), "; choose one of those");
  return true;
}

bool check_activation_dtype(std::optional<at::ScalarType> activation_dtype, const at::Tensor& x,
                            const at::Tensor& weight, const char* op) {
  if (!is_e4m3(activation_dtype, x, op)) return false;
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "nm_act::", op,
                   " expected weight in float8_e4m3fn along with activation_dtype float8_e4m3fn, got ",
                   dtype_text(weight), "; quantise it per output channel");
  return true;
}

namespace {

// The number of tokens of a product of a few of them.
int64_t check_few(const at::Tensor& x, const char* op) {
  const int64_t tokens = x.numel() / x.size(-1);
  constexpr int64_t kMost = 8;
  TORCH_CHECK_VALUE(tokens <= kMost, "nm_act::", op, " expected at most ", kMost, " tokens, got ", tokens,
                    "; use torch.nn.functional.linear for more");
  return tokens;
}

}  // namespace

GatherArguments check_gather_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& weight_scale, const char* op) {
  check_features(x, op);
  check_dtype(x, op);
  const at::Tensor scale = check_scaled_weight(x, weight, weight_scale, bias, op);
  const int64_t tokens = check_few(x, op);
  TORCH_CHECK_VALUE(stored_in_out(weight), "nm_act::", op,
                    " expected a weight stored [in_features, out_features], got strides ", weight.strides(),
                    "; store it with weight.t().contiguous().t()");
  return {tokens, scale};
}

int64_t check_dense_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const char* op) {
  check_features(x, op);
  check_dtype(x, op);
  check_weight(x, weight, bias, op);
  const int64_t tokens = check_few(x, op);
  TORCH_CHECK_VALUE(weight.stride(1) == 1, "nm_act::", op,
                    " expected a weight stored [out_features, in_features], got strides ", weight.strides(),
                    "; store it with weight.contiguous()");
  return tokens;
}

}  // namespace nm_act
