// The dense product on CPUs, followed by an epilogue.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"
#include "ops/checks.h"

namespace nm_act::cpu_ops {

// y [tokens, out] = epilogue(operand [tokens, in] @ weight [out, in]^T), all of one dtype and, except for the weight,
// contiguous. The epilogue is computed in float32 and rounded once; so is the product, except in bfloat16.
void dense_product(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y);

// y [tokens, out], columns from `column` on = epilogue(product), a contiguous float32 [tokens, columns].
void apply_epilogue(const at::Tensor& product, const cpu::Epilogue& epilogue, ElementType dtype, int64_t column,
                    const at::Tensor& y);

// operand [tokens, in] @ weight [out, in]^T + bias by oneDNN, for a weight in its layout.
at::Tensor prepacked_product(const at::Tensor& operand, const at::Tensor& weight, const OptionalTensor& bias);

}  // namespace nm_act::cpu_ops
