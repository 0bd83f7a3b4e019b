// Dense products on CPUs, followed by an epilogue.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"
#include "ops/checks.h"

namespace nm_act::cpu_ops {

// y [tokens, out] = epilogue(operand [tokens, in] @ weight [out, in]^T), all of one dtype and, except for the weight,
// contiguous. The epilogue is computed in float32 and rounded once; so is the product, except in bfloat16.
void dense_product(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y);

// Whether dense_columns is faster than torch's product of so many tokens over a weight stored [in, out].
bool columns_pay(ElementType dtype, int64_t tokens);

// The same as dense_product for a weight stored [in, out], in float32 throughout and rounded once.
void dense_columns(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y);

// The same for a few tokens and a weight stored [out, in], in float32 throughout and rounded once.
void dense_rows(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue, ElementType dtype,
                const at::Tensor& y);

// y [tokens, out] = epilogue(y), rounded again to `dtype`.
void apply_epilogue(const cpu::Epilogue& epilogue, ElementType dtype, const at::Tensor& y);

// operand [tokens, in] @ weight [out, in]^T + bias by oneDNN, given the weight in its layout.
at::Tensor prepacked_product(const at::Tensor& operand, const at::Tensor& prepacked, const OptionalTensor& bias);

// The same into y [tokens, out] by vLLM's call, given its handler of the weight: an address, which it dereferences. It
// reads the bias as if it were contiguous.
void vllm_product(const at::Tensor& operand, const at::Tensor& handler, const OptionalTensor& bias, at::Tensor y);

}  // namespace nm_act::cpu_ops
