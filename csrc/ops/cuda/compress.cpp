// Compression on CUDA: nm_act::compress (neutral) and compress_packed (the GEMM's layout).
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

PackedTensors results(const PackedOperand& operand) {
  const auto or_empty = [&](const at::Tensor& tensor) {
    return tensor.defined() ? tensor : empty_vector(operand.values, 0);
  };
  return {operand.values, operand.metadata, or_empty(operand.row_scale), or_empty(operand.eta)};
}

void check_packable(const at::Tensor& x, const Selection& selection, bool statistics, bool fp8, const char* op) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, "nm_act::", op,
                   " expected x in bfloat16 or float16, got ", dtype_text(x), "; convert it first");
  const int64_t step = (fp8 ? 32 : 16) * (is_lifted(selection.pattern) ? 4 : 1);
  TORCH_CHECK_VALUE(selection.in_features % step == 0, "nm_act::", op, " expected in_features divisible by ", step,
                    ", got ", selection.in_features, "; use sparse_linear, which falls back to a dense product");
  check_row_statistics(selection, statistics || fp8, op);
}

Selection with_aligned_vectors(Selection selection) {
  selection.channel_scale = aligned(selection.channel_scale);
  selection.shift = aligned(selection.shift);
  return selection;
}

namespace {

// Allocates an operand of `in_features` and points the kernel's output at it. value_type is the dtype of x or e4m3.
std::pair<PackedOperand, CompressOutput> allocate(const at::Tensor& x, const Selection& selection,
                                                  bool variance_correction, at::ScalarType value_type,
                                                  MetadataLayout layout, int64_t in_features) {
  const int64_t tokens = selection.tokens;
  PackedOperand operand;
  // The sm_80 GEMM reads whole blocks of tokens; the rest of the last block must be allocated, but may hold anything.
  const int64_t rows = layout == MetadataLayout::kSm80Bits16 ? metadata_padded_tokens(layout, tokens) : tokens;
  operand.values = at::empty({rows, in_features / 2}, x.options().dtype(value_type)).narrow(0, 0, tokens);
  operand.metadata = at::empty({metadata_bytes(layout, tokens, in_features)}, x.options().dtype(at::kByte));
  if (variance_correction || value_type == at::kFloat8_e4m3fn) operand.row_scale = empty_vector(x, tokens);
  if (selection.token_shift != TokenShift::kNone) operand.eta = empty_vector(x, tokens);
  const CompressOutput out{operand.values.mutable_data_ptr(),
                           operand.metadata.mutable_data_ptr<uint8_t>(),
                           mutable_or_null(operand.row_scale),
                           mutable_or_null(operand.eta),
                           data_or_null(selection.channel_scale),
                           data_or_null(selection.shift),
                           selection.token_shift,
                           variance_correction,
                           element_type(value_type),
                           layout};
  return {operand, out};
}

}  // namespace

std::pair<PackedOperand, CompressOutput> allocate_packed(const at::Tensor& x, const Selection& selection,
                                                         bool variance_correction, bool fp8, GemmDevice device) {
  const at::ScalarType value_type = fp8 ? at::kFloat8_e4m3fn : x.scalar_type();
  const MetadataLayout layout = gemm_metadata_layout(element_type(value_type), device);
  const bool lifted = is_lifted(selection.pattern);
  return allocate(x, selection, variance_correction, value_type, layout,
                  lifted ? lifted_features(selection.in_features) : selection.in_features);
}

PackedOperand compress_packed(const at::Tensor& x, const Selection& selection, bool variance_correction, bool fp8,
                              GemmDevice device, const char* op) {
  const bool statistics = variance_correction || selection.token_shift != TokenShift::kNone;
  check_packable(x, selection, statistics, fp8, op);
  const bool lifted = is_lifted(selection.pattern);
  const Selection vectors = lifted ? with_aligned_vectors(selection) : selection;
  auto [operand, out] = allocate_packed(x, vectors, variance_correction, fp8, device);
  if (selection.tokens == 0) return operand;
  const Rows rows = lifted ? aligned_rows(x) : rows_of(x);
  const CompressParams params{rows.tensor.const_data_ptr(), rows.stride,    selection.tokens,
                              int(selection.in_features),   selection.type, out};
  check_status(lifted ? launch_compress_windows(params, selection.pattern, current_stream(x))
                      : launch_compress(params, current_stream(x)),
               op);
  return operand;
}

namespace {

std::tuple<at::Tensor, at::Tensor> compress(const at::Tensor& x, const OptionalTensor& channel_scale,
                                            const OptionalTensor& shift, c10::string_view token_shift) {
  constexpr const char* kOp = "compress";
  const Selection selection = check_selection(x, 2, 4, channel_scale, shift, token_shift, kOp);
  check_row_statistics(selection, selection.token_shift != TokenShift::kNone, kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  auto [operand, out] = allocate(x, selection, false, x.scalar_type(), MetadataLayout::kNeutral, selection.in_features);
  if (operand.values.numel() != 0) {
    const Rows rows = rows_of(x);
    const CompressParams params{rows.tensor.const_data_ptr(), rows.stride,    selection.tokens,
                                int(selection.in_features),   selection.type, out};
    check_status(launch_compress(params, current_stream(x)), kOp);
  }
  return {operand.values.view(with_last(x.sizes(), selection.in_features / 2)),
          operand.metadata.view(with_last(x.sizes(), (selection.in_features + 7) / 8))};
}

PackedTensors compress_packed_op(const at::Tensor& x, int64_t n, int64_t m, const OptionalTensor& channel_scale,
                                 const OptionalTensor& shift, c10::string_view token_shift, bool variance_correction,
                                 std::optional<at::ScalarType> activation_dtype, at::IntArrayRef extra_columns) {
  constexpr const char* kOp = "compress_packed";
  const Selection selection = check_selection(x, n, m, channel_scale, shift, token_shift, kOp, extra_columns);
  TORCH_CHECK_VALUE(is_lifted(selection.pattern) || is_2_4(selection.pattern),
                    "nm_act::compress_packed expected the pattern 2:4 or 2:4+1, got ", pattern_text(selection.pattern),
                    "; use sparse_linear, which falls back to a dense product");
  const c10::cuda::CUDAGuard guard(x.device());
  const bool fp8 = is_e4m3(activation_dtype, x, kOp);
  return results(compress_packed(x, selection, variance_correction, fp8, gemm_device(x, kOp), kOp));
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) {
  m.impl("compress", compress);
  m.impl("compress_packed", compress_packed_op);
}

}  // namespace nm_act::cuda_ops
