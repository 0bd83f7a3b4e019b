// The sparse GEMM as a function of tensors, for sparse_gemm and sparse_linear.
#pragma once

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

// Undefined tensors omit their factor or term; see SparseGemmParams.
struct GemmEpilogueTensors {
  at::Tensor row_scale, eta, shift_out, column_scale;  // float32
  at::Tensor bias;                                     // dtype of y
};

// Checks a packed operand and the weight that it meets, for a result of y_type, before anything is allocated.
GemmDevice check_product(const at::Tensor& values, const at::Tensor& metadata, c10::string_view layout_name,
                         const at::Tensor& weight, at::ScalarType y_type, const char* op);

// A checked vector in float32, undefined if there is none; it may come in the dtype of `like`.
at::Tensor epilogue_vector(const OptionalTensor& tensor, const at::Tensor& like, int64_t size, const char* name,
                           const char* op);

// All parameters except y.
SparseGemmParams gemm_params(const PackedOperand& operand, const at::Tensor& weight,
                             const GemmEpilogueTensors& epilogue, at::ScalarType y_type);

// Runs the product into y; scratch memory that the plan needs comes from torch's allocator.
void run_sparse_gemm(SparseGemmParams& params, GemmDevice device, const GemmPlan& plan, const at::Tensor& y,
                     const char* op);

// Whether a kernel takes this weight: dtype, alignment and sizes, before anything is compressed.
bool weight_fits_gemm(const at::Tensor& weight, at::ScalarType value_type, at::ScalarType y_type, GemmDevice device);

}  // namespace nm_act::cuda_ops
