// nm_act::gather_linear and decode_linear on CUDA, and sparse_linear for few tokens.
#include "ops/cuda/gather.h"

#include <algorithm>

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "ops/choice.h"

namespace nm_act::cuda_ops {
namespace {

// Pointers to vectors and to y stay null.
GatherParams operand_params(const Rows& x, const at::Tensor& weight, Pattern pattern, int64_t tokens) {
  GatherParams params{};
  params.x = x.tensor.const_data_ptr();
  params.x_stride = x.stride;
  params.weight = weight.const_data_ptr();
  params.weight_stride = weight.stride(1);
  params.tokens = int(tokens);
  params.in_features = int(weight.size(1));
  params.out_features = int(weight.size(0));
  params.pattern = pattern;
  params.x_type = element_type(x.tensor.scalar_type());
  params.weight_type = element_type(weight.scalar_type());
  return params;
}

void set_epilogue(GatherParams& params, const GatherEpilogueTensors& epilogue, const at::Tensor& contiguous_bias) {
  params.weight_scale = data_or_null(epilogue.weight_scale);
  params.shift_out = data_or_null(epilogue.shift_out);
  params.column_scale = data_or_null(epilogue.column_scale);
  params.bias = contiguous_bias.defined() ? contiguous_bias.const_data_ptr() : nullptr;
}

at::Tensor contiguous_or_undefined(const at::Tensor& tensor) { return tensor.defined() ? tensor.contiguous() : tensor; }

}  // namespace

at::Tensor gather_product(const at::Tensor& x, const at::Tensor& weight, const Selection& selection,
                          bool variance_correction, const GatherEpilogueTensors& epilogue, const GatherConfig& config,
                          GemmDevice device, const char* op) {
  const Pattern pattern = gather_pattern(selection.pattern, variance_correction);
  const bool selects = pattern.keep > 0;
  DenseOperand operand;
  Rows rows;
  if (selects) {
    rows = rows_of(x);
    operand.eta = token_shift_of(rows, selection, op);
  } else {
    operand = prune_dense(x, selection, variance_correction, op);
    rows = {operand.values, selection.in_features};
  }
  const at::Tensor y = at::empty({selection.tokens, weight.size(0)}, x.options());
  const at::Tensor bias = contiguous_or_undefined(epilogue.bias);
  GatherParams params = operand_params(rows, weight, pattern, selection.tokens);
  set_epilogue(params, epilogue, bias);
  params.y = y.mutable_data_ptr();
  params.channel_scale = selects ? data_or_null(selection.channel_scale) : nullptr;
  params.shift = selects ? data_or_null(selection.shift) : nullptr;
  params.row_scale = data_or_null(operand.nu);
  params.eta = data_or_null(operand.eta);
  check_status(launch_gather(params, device, config, current_stream(x)), op);
  return y;
}

namespace {

at::Tensor gather_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& weight_scale) {
  constexpr const char* kOp = "gather_linear";
  const auto [tokens, scale] = check_gather_linear(x, weight, bias, weight_scale, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<int64_t> sizes = with_last(x.sizes(), weight.size(0));
  if (tokens == 0 || weight.size(0) == 0) return at::empty(sizes, x.options());
  const GemmDevice device = gemm_device(x, kOp);
  const ElementType type = element_type(x.scalar_type()), weight_type = element_type(weight.scalar_type());
  const WeightFacts facts = facts_of(weight);
  const auto choice_of = [&](int64_t count) {
    return choose_gather_linear({count, type, weight_type, type, {}, facts, {}, false}, device);
  };
  if (choice_of(tokens).path != LinearPath::kGather)
    return at::linear(x, scale.defined() ? dequantised(weight, scale, x.scalar_type()) : weight, bias);
  const int64_t most = gather_linear_tokens(weight_type);
  const Rows rows = rows_of(x);
  const at::Tensor y = at::empty(sizes, x.options());
  const at::Tensor bias_vector = contiguous_or_undefined(bias.value_or(at::Tensor()));
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t count = std::min(most, tokens - first);
    GatherParams params = operand_params(rows, weight, {}, count);
    set_epilogue(params, {scale, {}, {}, {}}, bias_vector);
    params.x = static_cast<const char*>(params.x) + first * rows.stride * x.element_size();
    params.y = static_cast<char*>(y.mutable_data_ptr()) + first * weight.size(0) * y.element_size();
    check_status(launch_gather(params, device, choice_of(count).gather, current_stream(x)), kOp);
  }
  return y;
}

// The configuration that was given to _tune_gather.
GatherConfig given_config(at::IntArrayRef given, const GatherProblem& problem) {
  const bool four = given.size() == 4;
  const GatherConfig config =
      four ? GatherConfig{int(given[0]), int(given[1]), int(given[2]), given[3] != 0} : GatherConfig{};
  TORCH_CHECK_VALUE(four && is_valid(problem, config),
                    "nm_act::_tune_gather expected a configuration (lanes, splits, threads, ahead) that the gather ",
                    "kernel has for ", problem.tokens, " tokens, ", problem.out_features, " outputs and ",
                    problem.in_features, " inputs, got ", given, "; see csrc/kernels/gather/config.h");
  return config;
}

bool is_given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// The operators around a layer: RMSNorm or activation * up before, a residual after. With x_weight, the input is hidden
// = norm(x, x_weight) + x_residual.
struct Around {
  OptionalTensor up, norm_weight, residual, x_weight, x_residual;
  std::optional<double> eps;
  std::optional<c10::string_view> activation;
  bool unit_offset;
};

// y, and with x_weight hidden, otherwise undefined.
std::pair<at::Tensor, at::Tensor> gather_around(const at::Tensor& x, const at::Tensor& weight,
                                                const OptionalTensor& bias, int64_t n, int64_t m, const Around& around,
                                                const OptionalTensor& channel_scale, const OptionalTensor& weight_scale,
                                                at::OptionalIntArrayRef given, const char* op) {
  Selection selection = check_selection(x, n, m, channel_scale, {}, "none", op);
  const at::Tensor scale = check_scaled_weight(x, weight, weight_scale, bias, op);
  const bool gated = is_given(around.up), normed = is_given(around.norm_weight), sandwich = is_given(around.x_weight);
  TORCH_CHECK_VALUE(!(gated && normed), "nm_act::", op,
                    " expected either up or norm_weight, got both; apply one of them before");
  const float epsilon = check_norm_options(normed, around.eps, around.unit_offset, "norm_weight", op);
  TORCH_CHECK_VALUE(gated == around.activation.has_value(), "nm_act::", op,
                    " expected up and activation together, got ", gated ? "up" : "activation",
                    " alone; give both or neither");
  const Activation function = gated ? activation_of(*around.activation, op) : Activation::kSilu;
  const std::vector<int64_t> sizes = with_last(x.sizes(), weight.size(0));
  const auto check_like = [&](const OptionalTensor& other, const char* name, at::IntArrayRef expected) {
    if (!is_given(other)) return;
    check_same_device(x, *other, name, op);
    TORCH_CHECK_VALUE(other->scalar_type() == x.scalar_type() && other->sizes() == expected, "nm_act::", op,
                      " expected ", name, " of shape ", expected, " in ", dtype_text(x), ", got ", other->sizes(),
                      " in ", dtype_text(*other), "; reshape or convert it");
  };
  check_like(around.up, "up", x.sizes());
  check_like(around.norm_weight, "norm_weight", {selection.in_features});
  check_like(around.x_weight, "x_weight", {selection.in_features});
  check_like(around.x_residual, "residual", x.sizes());
  check_like(around.residual, "residual", sizes);
  const c10::cuda::CUDAGuard guard(x.device());
  const GemmDevice device = gemm_device(x, op);
  const WeightFacts facts = facts_of(weight);
  const LinearFacts call{selection.tokens,
                         selection.type,
                         element_type(weight.scalar_type()),
                         selection.type,
                         selection.pattern,
                         facts,
                         {},
                         false};
  GatherConfig config = choose_in_layer(call, device).gather;
  TORCH_CHECK_NOT_IMPLEMENTED(config.splits > 0, "nm_act::", op, " expected 1 to ", kFewTokens,
                              " tokens in 16 bits and a weight stored [in, out] that the gather kernel takes, got ",
                              selection.tokens, " tokens in ", dtype_text(x), ", weight ", weight.sizes(),
                              " with strides ", weight.strides(), facts.aligned ? "" : " not aligned to 16 bytes",
                              "; use the separate operators");
  selection.channel_scale = aligned(selection.channel_scale);
  const auto [rows, factor] = gated ? aligned_rows(x, *around.up) : std::pair(aligned_rows(x), Rows{});
  const at::Tensor y = at::empty(sizes, x.options()),
                   hidden = sandwich ? at::empty(x.sizes(), x.options()) : at::Tensor(),
                   bias_vector = contiguous_or_undefined(bias.value_or(at::Tensor()));
  const auto aligned_or_undefined = [](const OptionalTensor& tensor) {
    return is_given(tensor) ? aligned(tensor->contiguous()) : at::Tensor();
  };
  const at::Tensor norm = aligned_or_undefined(around.norm_weight), x_norm = aligned_or_undefined(around.x_weight),
                   x_added = aligned_or_undefined(around.x_residual);
  const at::Tensor added = aligned_or_undefined(around.residual);
  const auto data_of = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
  GatherParams params = operand_params(rows, weight, selection.pattern, selection.tokens);
  set_epilogue(params, {scale, {}, {}, {}}, bias_vector);
  params.y = y.mutable_data_ptr();
  params.channel_scale = data_or_null(selection.channel_scale);
  params.up = data_of(factor.tensor);
  params.norm_weight = data_of(norm);
  params.epsilon = epsilon;
  params.x_weight = data_of(x_norm);
  params.x_residual = data_of(x_added);
  params.hidden = sandwich ? hidden.mutable_data_ptr() : nullptr;
  params.activation = function;
  params.unit_offset = around.unit_offset;
  params.residual = data_of(added);
  if (given.has_value()) {
    config = given_config(
        *given, {params.tokens, params.out_features, params.in_features, params.weight_type, params.pattern, device});
  }
  check_status(launch_gather(params, device, config, current_stream(x)), op);
  return {y, hidden};
}

at::Tensor decode_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, int64_t n,
                         int64_t m, const OptionalTensor& up, const OptionalTensor& norm_weight,
                         std::optional<double> eps, const OptionalTensor& residual, const OptionalTensor& channel_scale,
                         const OptionalTensor& weight_scale, std::optional<c10::string_view> activation,
                         bool unit_offset) {
  const Around around{up, norm_weight, residual, {}, {}, eps, activation, unit_offset};
  return gather_around(x, weight, bias, n, m, around, channel_scale, weight_scale, std::nullopt, "decode_linear").first;
}

std::tuple<at::Tensor, at::Tensor> sandwich_linear(const at::Tensor& x, const at::Tensor& x_weight,
                                                   const at::Tensor& residual, const at::Tensor& norm_weight,
                                                   double eps, const at::Tensor& weight, const OptionalTensor& bias,
                                                   int64_t n, int64_t m, const OptionalTensor& channel_scale,
                                                   const OptionalTensor& weight_scale, bool unit_offset) {
  const Around around{{}, norm_weight, {}, x_weight, residual, eps, {}, unit_offset};
  return gather_around(x, weight, bias, n, m, around, channel_scale, weight_scale, std::nullopt, "sandwich_linear");
}

std::tuple<at::Tensor, at::Tensor> tune_gather(const at::Tensor& x, const at::Tensor& weight,
                                               const OptionalTensor& bias, int64_t n, int64_t m, at::IntArrayRef config,
                                               const OptionalTensor& up, const OptionalTensor& norm_weight,
                                               std::optional<double> eps, const OptionalTensor& residual,
                                               const OptionalTensor& channel_scale, const OptionalTensor& weight_scale,
                                               std::optional<c10::string_view> activation, bool unit_offset,
                                               const OptionalTensor& x_weight, const OptionalTensor& x_residual) {
  const Around around{up, norm_weight, residual, x_weight, x_residual, eps, activation, unit_offset};
  const auto [y, hidden] =
      gather_around(x, weight, bias, n, m, around, channel_scale, weight_scale, config, "_tune_gather");
  return {y, hidden.defined() ? hidden : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("decode_linear", decode_linear);
  m.impl("sandwich_linear", sandwich_linear);
  m.impl("gather_linear", gather_linear);
  m.impl("_tune_gather", tune_gather);
}

}  // namespace nm_act::cuda_ops
