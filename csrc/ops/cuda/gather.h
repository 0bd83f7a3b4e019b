// The decode kernel as a function of tensors, for sparse_linear and gather_linear.
#pragma once

#include "kernels/gather/config.h"
#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

// Null (undefined) tensors leave their factor or term out; see GatherParams.
struct GatherEpilogueTensors {
  at::Tensor weight_scale, shift_out, column_scale;  // float32
  at::Tensor bias;                                   // dtype of x
};

// Whether the decode kernel takes this product: few tokens, a weight stored [in, out] with aligned rows. A pattern with
// keep 0 stands for an input that is sparse already.
bool takes_gather(const at::Tensor& x, const at::Tensor& weight, Pattern pattern, int64_t tokens, GemmDevice device);

// y [tokens, out_features] of a product that takes_gather.
at::Tensor gather_product(const at::Tensor& x, const at::Tensor& weight, const Selection& selection,
                          bool variance_correction, const GatherEpilogueTensors& epilogue, GemmDevice device,
                          const char* op);

}  // namespace nm_act::cuda_ops
