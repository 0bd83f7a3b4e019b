// nm_act::sparse_gemm: the product of a packed 2:4 operand and a weight on sparse tensor cores, epilogue included.
#include "ops/cuda/sparse_gemm.h"

#include <torch/library.h>

#include <cstdint>
#include <iterator>
#include <type_traits>

#include "kernels/matmul/sparse_gemm.h"
#include "ops/choice.h"

namespace nm_act::cuda_ops {

SparseGemmParams gemm_params(const PackedOperand& operand, const at::Tensor& weight,
                             const GemmEpilogueTensors& epilogue, at::ScalarType y_type) {
  SparseGemmParams params{};
  params.values = operand.values.const_data_ptr();
  params.metadata = operand.metadata.const_data_ptr<uint8_t>();
  params.weight = weight.const_data_ptr();
  params.weight_in_out = weight.stride(1) != 1 && stored_in_out(weight);
  params.weight_stride = weight.stride(params.weight_in_out ? 1 : 0);
  params.row_scale = data_or_null(epilogue.row_scale);
  params.eta = data_or_null(epilogue.eta);
  params.shift_out = data_or_null(epilogue.shift_out);
  params.column_scale = data_or_null(epilogue.column_scale);
  params.bias = epilogue.bias.defined() ? epilogue.bias.const_data_ptr() : nullptr;
  params.tokens = params.metadata_tokens = int(operand.values.size(0));
  params.out_features = int(weight.size(0));
  params.y_stride = params.out_features;
  params.in_features = int(weight.size(1));
  params.value_type = element_type(operand.values.scalar_type());
  params.y_type = element_type(y_type);
  return params;
}

bool weight_fits_gemm(const at::Tensor& weight, at::ScalarType value_type, at::ScalarType y_type, GemmDevice device) {
  const WeightFacts facts = facts_of(weight);
  if (!facts.rows_contiguous() || !gemm_shape_fits(element_type(value_type), facts.out_features, facts.in_features,
                                                   facts.row_stride(), device.compute_capability_major)) {
    return false;
  }
  SparseGemmParams params{};  // null pointers count as aligned, as the later allocations will be
  params.weight = weight.const_data_ptr();
  params.weight_in_out = facts.in_stride != 1;
  params.weight_stride = facts.row_stride();
  params.out_features = int(facts.out_features);
  params.in_features = int(facts.in_features);
  params.value_type = element_type(value_type);
  params.y_type = element_type(y_type);
  return sparse_gemm_supports(params, device);
}

namespace {

// The part of a product that begins at this token or output and has this many of them.
SparseGemmParams params_of_part(SparseGemmParams params, GemmDevice device, GemmCut cut, int64_t begin, int64_t size) {
  const auto advance = [](auto*& pointer, int64_t bytes) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    if (pointer != nullptr) pointer = reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(pointer) + bytes);
  };
  constexpr int64_t kOutputBytes = 2, kFloatBytes = sizeof(float);
  const int64_t value_bytes = params.value_type == ElementType::kE4M3 ? 1 : 2;
  int64_t outputs = begin;
  if (cut == GemmCut::kTokens) {
    const MetadataLayout layout = gemm_metadata_layout(params.value_type, device);
    advance(params.values, begin * params.in_features / 2 * value_bytes);
    advance(params.metadata, begin * metadata_tile_features(layout) / 8);  // all tokens, then the next features
    for (const float** vector : {&params.row_scale, &params.eta}) advance(*vector, begin * kFloatBytes);
    outputs *= params.y_stride;
    params.tokens = static_cast<int>(size);
  } else {
    advance(params.weight, begin * (params.weight_in_out ? 1 : params.weight_stride) * value_bytes);
    for (const float** vector : {&params.shift_out, &params.column_scale}) advance(*vector, begin * kFloatBytes);
    advance(params.bias, begin * kOutputBytes);
    params.out_features = static_cast<int>(size);
  }
  advance(params.y, outputs * kOutputBytes);
  advance(params.residual, outputs * kOutputBytes);
  return params;
}

void launch_with_workspace(const SparseGemmParams& params, GemmDevice device, const GemmConfig& config,
                           const at::Tensor& y, const char* op) {
  GemmLaunch launch{device, config, current_stream(y), nullptr, nullptr};
  at::Tensor workspace;
  if (const size_t bytes = sparse_gemm_workspace(params, launch); bytes > 0) {
    workspace = at::empty({static_cast<int64_t>(bytes)}, y.options().dtype(at::kByte));
    launch.workspace = workspace.mutable_data_ptr();
  }
  check_status(launch_sparse_gemm(params, launch), op);
}

}  // namespace

void run_sparse_gemm(SparseGemmParams& params, GemmDevice device, const GemmPlan& plan, const at::Tensor& y,
                     const char* op) {
  params.y = y.mutable_data_ptr();
  if (plan.cut == GemmCut::kNone) return launch_with_workspace(params, device, plan.first, y, op);
  const int64_t rest = size_along(params, plan.cut) - plan.at;
  launch_with_workspace(params_of_part(params, device, plan.cut, 0, plan.at), device, plan.first, y, op);
  launch_with_workspace(params_of_part(params, device, plan.cut, plan.at, rest), device, plan.second, y, op);
}

GemmDevice check_product(const at::Tensor& values, const at::Tensor& metadata, c10::string_view layout_name,
                         const at::Tensor& weight, at::ScalarType y_type, const char* op) {
  TORCH_CHECK_VALUE(
      values.dim() == 2 && values.is_contiguous() && weight.dim() == 2 && weight.size(1) == 2 * values.size(1),
      "nm_act::", op, " expected contiguous values [tokens, in_features / 2] and weight [out_features, ",
      "in_features], got ", values.sizes(), " and ", weight.sizes(), "; pass what compress_packed returned");
  check_same_device(values, metadata, "metadata", op);
  check_same_device(values, weight, "weight", op);
  TORCH_CHECK_TYPE(weight.scalar_type() == values.scalar_type(), "nm_act::", op, " expected weight in the dtype of ",
                   "values, ", dtype_text(values), ", got ", dtype_text(weight), "; convert one of them");
  const int64_t tokens = values.size(0);
  TORCH_CHECK_VALUE(tokens <= kMaxTokens, "nm_act::", op, " expected at most ", kMaxTokens, " tokens, got ", tokens,
                    "; split them before they are compressed");
  const GemmDevice device = gemm_device(values, op);
  const MetadataLayout layout = gemm_metadata_layout(element_type(values.scalar_type()), device);
  TORCH_CHECK_VALUE(layout_name == layout_text(layout), "nm_act::", op, " expected an operand in the layout ",
                    layout_text(layout), ", which this device reads for ", dtype_text(values), ", got one in ",
                    layout_name, "; compress it on this device");
  // The sm_80 GEMM reads whole blocks of tokens, for which a copy or a slice of the values has no memory.
  const int64_t rows = layout == MetadataLayout::kSm80Bits16 ? metadata_padded_tokens(layout, tokens) : tokens;
  const int64_t needed = (values.storage_offset() + rows * values.size(1)) * values.element_size();
  TORCH_CHECK_VALUE(int64_t(values.storage().nbytes()) >= needed, "nm_act::", op, " expected values with memory for ",
                    rows, " tokens behind the first, got ", tokens,
                    " tokens alone; pass the values that compress_packed returned, not a copy or a part of them");
  const int64_t bytes = metadata_bytes(layout, tokens, weight.size(1));
  TORCH_CHECK_VALUE(metadata.scalar_type() == at::kByte && metadata.numel() == bytes && metadata.is_contiguous(),
                    "nm_act::", op, " expected ", bytes, " metadata bytes, got ", metadata.numel(), " of ",
                    dtype_text(metadata), "; pass what compress_packed returned on this device");
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_aligned(values) && is_aligned(metadata) && weight_fits_gemm(weight, values.scalar_type(), y_type, device),
      "nm_act::", op, " expected a compiled combination (float16 or bfloat16 in ",
      "and out with either weight storage; e4m3 with an [out, in] weight on sm_90; 16-byte aligned rows), got values ",
      dtype_text(values), ", output ", dtype_text(y_type), ", weight ", weight.sizes(), " with strides ",
      weight.strides(), " on compute capability ", device.compute_capability_major,
      ".x; use sparse_linear, which falls back");
  return device;
}

at::Tensor epilogue_vector(const OptionalTensor& tensor, const at::Tensor& like, int64_t size, const char* name,
                           const char* op) {
  // compress_packed returns vectors of length 0 for what was not requested.
  if (tensor.has_value() && tensor->defined() && tensor->numel() == 0 && size != 0) return at::Tensor();
  return aligned(check_vector(tensor, like, size, name, op));
}

namespace {

// The plan that was given to _tune_sparse_gemm: a configuration, or two with a cut between them.
GemmPlan given_plan(at::IntArrayRef numbers, int64_t tokens, int64_t out_features, GemmDevice device) {
  constexpr size_t kConfig = 6, kPlan = 2 * kConfig + 2;
  const bool counted = numbers.size() == kConfig || numbers.size() == kPlan;
  TORCH_CHECK_VALUE(
      counted && device.compute_capability_major == 9,
      "nm_act::_tune_sparse_gemm expected config as (tile, raster, swizzle, splits, overlapped, paced) on ",
      "sm_90, or two such with (cut, at) between them, got ", numbers, " on compute capability ",
      device.compute_capability_major, ".x; use sparse_gemm");
  const auto config = [&](size_t first) {
    TORCH_CHECK_VALUE(numbers[first] >= 0 && numbers[first] < int64_t(std::size(kTiles)),
                      "nm_act::_tune_sparse_gemm expected a tile from 0 to ", std::size(kTiles) - 1, ", got ",
                      numbers[first], "; choose one of _C.gemm_tiles");
    const GemmTile tile = static_cast<GemmTile>(numbers[first]);
    TORCH_CHECK_VALUE(numbers[first + 5] == 0 || can_pace(tile),
                      "nm_act::_tune_sparse_gemm expected a tile that can be paced, got ", facts_of(tile).name,
                      "; _C.gemm_tiles says which can");
    return GemmConfig{tile,
                      static_cast<GemmRaster>(numbers[first + 1]),
                      static_cast<int>(numbers[first + 2]),
                      static_cast<int>(numbers[first + 3]),
                      numbers[first + 4] != 0,
                      numbers[first + 5] != 0};
  };
  if (numbers.size() == kConfig) return {config(0)};
  const GemmPlan plan{config(0), static_cast<GemmCut>(numbers[kConfig]), numbers[kConfig + 1], config(kConfig + 2)};
  const bool by_tokens = plan.cut == GemmCut::kTokens;
  TORCH_CHECK_VALUE((by_tokens || plan.cut == GemmCut::kOutputs) && plan.at > 0 && plan.at % 64 == 0 &&
                        plan.at < (by_tokens ? tokens : out_features),
                    "nm_act::_tune_sparse_gemm expected a cut (1: tokens, 2: outputs) at a multiple of 64 below their ",
                    "number, got ", numbers, " for ", tokens, " tokens and ", out_features,
                    " outputs; use sparse_gemm");
  return plan;
}

at::Tensor run(const at::Tensor& values, const at::Tensor& metadata, c10::string_view layout_name,
               const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& row_scale,
               const OptionalTensor& eta, const OptionalTensor& shift_out, const OptionalTensor& column_scale,
               std::optional<at::ScalarType> out_dtype, const OptionalTensor& residual,
               at::OptionalIntArrayRef config) {
  constexpr const char* kOp = "sparse_gemm";
  const bool fp8 = values.scalar_type() == at::kFloat8_e4m3fn;
  const at::ScalarType type = out_dtype.value_or(fp8 ? at::kBFloat16 : values.scalar_type());
  const GemmDevice device = check_product(values, metadata, layout_name, weight, type, kOp);
  const int64_t tokens = values.size(0), out_features = weight.size(0);
  const GemmPlan given = config.has_value() ? given_plan(*config, tokens, out_features, device) : GemmPlan{};
  const bool biased = bias.has_value() && bias->defined();
  TORCH_CHECK_VALUE(!biased || (bias->dim() == 1 && bias->size(0) == out_features && bias->is_floating_point()),
                    "nm_act::sparse_gemm expected a floating-point bias [", out_features, "], got ",
                    biased ? bias->sizes() : at::IntArrayRef{}, "; pass the layer's own");
  if (biased) check_same_device(values, *bias, "bias", kOp);
  const bool adds = residual.has_value() && residual->defined();
  if (adds) {
    check_same_device(values, *residual, "residual", kOp);
    TORCH_CHECK_VALUE(residual->dim() == 2 && residual->size(0) == tokens && residual->size(1) == out_features &&
                          residual->scalar_type() == type,
                      "nm_act::sparse_gemm expected residual [", tokens, ", ", out_features, "] in ", dtype_text(type),
                      ", got ", residual->sizes(), " in ", dtype_text(*residual), "; add it to the result instead");
  }
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor like = at::empty({0}, values.options().dtype(type));  // vectors may be float32 or y's dtype
  const auto vector = [&](const OptionalTensor& tensor, int64_t size, const char* name) {
    return epilogue_vector(tensor, like, size, name, kOp);
  };
  const GemmEpilogueTensors epilogue{
      vector(row_scale, tokens, "row_scale"), vector(eta, tokens, "eta"), vector(shift_out, out_features, "shift_out"),
      vector(column_scale, out_features, "column_scale"), biased ? aligned(bias->to(type)) : at::Tensor()};
  TORCH_CHECK_VALUE(
      tokens == 0 || !epilogue.eta.defined() || epilogue.shift_out.defined(),
      "nm_act::sparse_gemm expected shift_out along with eta, which was subtracted from the operand, got ",
      "none; give the row sums of the weight");
  const at::Tensor y = at::empty({tokens, out_features}, values.options().dtype(type));
  SparseGemmParams params = gemm_params({values, metadata, {}, {}}, weight, epilogue, type);
  const PackedFacts facts{tokens,
                          params.value_type,
                          params.y_type,
                          facts_of(weight),
                          epilogue.eta.defined() || epilogue.shift_out.defined(),
                          epilogue.row_scale.defined() || epilogue.column_scale.defined(),
                          adds,
                          /*gated=*/false};
  const LinearChoice choice =
      config.has_value() ? LinearChoice{LinearPath::kSparse, Why::kPacked, {}, given} : choose_packed(facts, device);
  // The kernel adds the residual where it is compiled to; else it costs one more pass.
  const bool fused = choice.why == Why::kPackedAdds;
  const at::Tensor addend = fused ? aligned(*residual) : at::Tensor();
  if (fused) params.residual = addend.const_data_ptr();
  run_sparse_gemm(params, device, choice.gemm, y, kOp);
  if (adds && !fused) y.add_(*residual);
  return y;
}

at::Tensor sparse_gemm(const at::Tensor& values, const at::Tensor& metadata, c10::string_view layout,
                       const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& row_scale,
                       const OptionalTensor& eta, const OptionalTensor& shift_out, const OptionalTensor& column_scale,
                       std::optional<at::ScalarType> out_dtype, const OptionalTensor& residual) {
  return run(values, metadata, layout, weight, bias, row_scale, eta, shift_out, column_scale, out_dtype, residual, {});
}

at::Tensor tune_sparse_gemm(const at::Tensor& values, const at::Tensor& metadata, c10::string_view layout,
                            const at::Tensor& weight, at::IntArrayRef config, const OptionalTensor& row_scale,
                            const OptionalTensor& eta, const OptionalTensor& shift_out,
                            const OptionalTensor& column_scale, std::optional<at::ScalarType> out_dtype) {
  return run(values, metadata, layout, weight, {}, row_scale, eta, shift_out, column_scale, out_dtype, {}, config);
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("sparse_gemm", sparse_gemm);
  m.impl("_tune_sparse_gemm", tune_sparse_gemm);
}

}  // namespace nm_act::cuda_ops
