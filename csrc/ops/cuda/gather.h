// The gather kernel as a function of tensors, for sparse_linear and gather_linear.
#pragma once

#include "kernels/gather/config.h"
#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

// Undefined tensors omit their factor or term; see GatherParams.
struct GatherEpilogueTensors {
  at::Tensor weight_scale, shift_out, column_scale;  // float32
  at::Tensor bias;                                   // dtype of x
};

// y [tokens, out_features] with the configuration of choose_on_cuda.
at::Tensor gather_product(const at::Tensor& x, const at::Tensor& weight, const Selection& selection,
                          bool variance_correction, const GatherEpilogueTensors& epilogue, const GatherConfig& config,
                          GemmDevice device, const char* op);

}  // namespace nm_act::cuda_ops
