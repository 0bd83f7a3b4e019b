// The dense product on CPUs with an epilogue behind it.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace nm_act::cpu_ops {

// y [tokens, out] = epilogue(operand [tokens, in] @ weight [out, in]^T), all three contiguous but the weight and of one
// dtype. The epilogue is in float32 and rounded once; so is the product, except in bfloat16.
void dense_product(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y);

}  // namespace nm_act::cpu_ops
