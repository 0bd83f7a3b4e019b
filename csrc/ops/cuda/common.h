// Shared by the CUDA operators: types, rows, the device and its stream, statuses.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>
#include <utility>

#include "kernels/nm_act.h"
#include "ops/selection.h"

namespace nm_act::cuda_ops {

inline cudaStream_t current_stream(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
}

void check_status(cudaError_t status, const char* op);

// Attributes of the tensor's device, queried once per device.
GemmDevice gemm_device(const at::Tensor& x, const char* op);

// x as rows [tokens, in_features] with unit stride within a row and one stride between rows, as the halves of a merged
// projection [batch, tokens, 2 x in_features] have; any other strides need a copy.
struct Rows {
  at::Tensor tensor;
  int64_t stride;
};
Rows rows_of(const at::Tensor& x);

inline bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Whether rows of a 16-bit type can be read in whole vectors.
inline bool is_aligned(const Rows& rows) { return is_aligned(rows.tensor) && rows.stride % 8 == 0; }

// A contiguous, 16-byte aligned tensor for kernels that read whole vectors: the tensor itself, or a copy if necessary.
at::Tensor aligned(const at::Tensor& tensor);

// The activation of a gated MLP, by its name.
inline Activation activation_of(c10::string_view name, const char* op) {
  TORCH_CHECK_VALUE(name == "silu" || name == "gelu_tanh", "nm_act::", op,
                    " expected activation \"silu\" or \"gelu_tanh\", got \"", name, "\"; apply another one before");
  return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

// The options of a norm whose weights may be absent. Returns its epsilon, 0 without a norm.
inline float check_norm_options(bool normed, std::optional<double> eps, bool unit_offset, const char* weights,
                                const char* op) {
  TORCH_CHECK_VALUE(!normed || eps.has_value(), "nm_act::", op, " expected eps along with ", weights,
                    ", got none; give the epsilon of the norm");
  TORCH_CHECK_VALUE(normed || !(eps.has_value() || unit_offset), "nm_act::", op, " expected ", weights, " along with ",
                    eps.has_value() ? "eps" : "unit_offset", ", got none; leave the option out or give the weight");
  return static_cast<float>(eps.value_or(0));
}

// The weight of an RMSNorm of x, [features].
inline void check_norm_weight(const at::Tensor& x, const at::Tensor& weight, int64_t features, const char* name,
                              const char* op) {
  check_same_device(x, weight, name, op);
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == features, "nm_act::", op, " expected ", name, " of shape [",
                    features, "], got ", weight.sizes(), "; give one value a feature");
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "nm_act::", op, " expected ", name, " in ", dtype_text(x),
                   ", got ", dtype_text(weight), "; convert it");
}

// Rows that can be read in whole vectors: those of x, or of a copy if necessary. Two of one shape share a stride, as
// the halves of a merged projection do, which are read in place.
Rows aligned_rows(const at::Tensor& x);
std::pair<Rows, Rows> aligned_rows(const at::Tensor& x, const at::Tensor& other);

inline at::Tensor empty_vector(const at::Tensor& like, int64_t size) {
  return at::empty({size}, like.options().dtype(at::kFloat));
}

inline float* mutable_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<float>() : nullptr;
}

// Limit of kernels that compute a row's statistics, because they hold the row on chip.
void check_row_statistics(const Selection& selection, bool needed, const char* op);

// The 2:4 operand in the layout of this device's GEMM.
struct PackedOperand {
  at::Tensor values;     // [tokens, in_features / 2], lifted in_features for 2:4+1
  at::Tensor metadata;   // [bytes]
  at::Tensor row_scale;  // [tokens] or undefined
  at::Tensor eta;        // [tokens] or undefined
};

// The tensors that operators return for it: values, metadata, row_scale, eta; empty where undefined.
using PackedTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
PackedTensors results(const PackedOperand& operand);

// Checks for a packed operand: 16-bit input, whole k-steps of the GEMM (16 features, 32 in e4m3; four k-steps for
// 2:4+1, so that its fifth windows fill whole ones too), and rows that fit on chip if statistics are needed.
void check_packable(const at::Tensor& x, const Selection& selection, bool statistics, bool fp8, const char* op);

// For kernels that read only whole vectors: a misaligned view is rare enough to be copied.
Selection with_aligned_vectors(Selection selection);

// Allocates the operand of this device's GEMM, in the values that it takes, and points the kernel's output at it.
std::pair<PackedOperand, CompressOutput> allocate_packed(const at::Tensor& x, const Selection& selection,
                                                         bool variance_correction, bool fp8, GemmDevice device);

// 2:4, or 2:4+1: the operand of the lifted weight.
PackedOperand compress_packed(const at::Tensor& x, const Selection& selection, bool variance_correction, bool fp8,
                              GemmDevice device, const char* op);

// The per-token shift [tokens] of rows, one launch; undefined if the selection has none.
at::Tensor token_shift_of(const Rows& rows, const Selection& selection, const char* op);

// The pruned operand as a dense tensor, with eta and nu if requested.
struct DenseOperand {
  at::Tensor values;  // [tokens, in_features]
  at::Tensor eta;     // [tokens] or undefined
  at::Tensor nu;      // [tokens] or undefined
};
DenseOperand prune_dense(const at::Tensor& x, const Selection& selection, bool variance_correction, const char* op);

// Pruned rows in e4m3 [tokens, in_features], and their scales [tokens]: of x in bfloat16, by a selection without
// vectors.
std::pair<at::Tensor, at::Tensor> prune_e4m3(const at::Tensor& x, const Selection& selection, const char* op);

// values [tokens, in] times weight [out, in], both e4m3 and contiguous, with their scales, plus bias: [tokens, out] in
// bfloat16. Sizes of at least 1, features divisible by 16.
at::Tensor e4m3_product(const at::Tensor& values, const at::Tensor& row_scale, const at::Tensor& weight,
                        const at::Tensor& weight_scale, const at::Tensor& bias, const char* op);

}  // namespace nm_act::cuda_ops
