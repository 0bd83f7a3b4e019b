// The body of the sparse linear operators on CPUs.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/checks.h"

namespace nm_act::cpu_ops {

// The checks, the selection and the product of operator `op`, whose arguments these are; `prepacked` is undefined, the
// weight in oneDNN's layout, or the handler of vLLM's product of it.
at::Tensor pruned_product(const char* op, const at::Tensor& prepacked, const at::Tensor& x,
                          const at::Tensor& stored_weight, const OptionalTensor& bias, int64_t n, int64_t m,
                          const OptionalTensor& channel_scale, const OptionalTensor& shift,
                          c10::string_view token_shift, const OptionalTensor& shift_out, bool variance_correction,
                          const OptionalTensor& column_scale, const OptionalTensor& weight_scale,
                          at::IntArrayRef extra_columns, const OptionalTensor& lifted_weight,
                          std::optional<at::ScalarType> activation_dtype);

}  // namespace nm_act::cpu_ops
