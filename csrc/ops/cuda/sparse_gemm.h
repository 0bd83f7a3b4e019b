// The sparse GEMM as a function of tensors, for sparse_gemm and sparse_linear.
#pragma once

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

// Undefined tensors omit their factor or term; see SparseGemmParams.
struct GemmEpilogueTensors {
  at::Tensor row_scale, eta, shift_out, column_scale;  // float32
  at::Tensor bias;                                     // dtype of y
};

// All parameters except y.
SparseGemmParams gemm_params(const PackedOperand& operand, const at::Tensor& weight,
                             const GemmEpilogueTensors& epilogue, at::ScalarType y_type);

// Runs the product into y; scratch memory that the configuration needs comes from torch's allocator.
void run_sparse_gemm(SparseGemmParams& params, GemmDevice device, const GemmConfig& config, const at::Tensor& y,
                     const char* op);

// Whether a kernel takes this weight: dtype, alignment and sizes, before anything is compressed.
bool weight_fits_gemm(const at::Tensor& weight, at::ScalarType value_type, at::ScalarType y_type, GemmDevice device);

}  // namespace nm_act::cuda_ops
