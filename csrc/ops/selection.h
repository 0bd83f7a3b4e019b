// Checks of a selection's arguments, shared by the operators of all devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "ops/checks.h"
#include "ops/tensors.h"

namespace nm_act {

// The selection arguments after checking, ready for the kernels.
struct Selection {
  at::Tensor channel_scale;  // float32 [in_features] or undefined
  at::Tensor shift;          // float32 [in_features] or undefined
  TokenShift token_shift;
  ElementType type;  // of x
  int64_t tokens;
  int64_t in_features;
  Pattern pattern;

  bool has_shift() const { return shift.defined() || token_shift != TokenShift::kNone; }
};

Selection check_selection(const at::Tensor& x, int64_t n, int64_t m, const OptionalTensor& channel_scale,
                          const OptionalTensor& shift, std::string_view token_shift, const char* op,
                          at::IntArrayRef extra_columns = {});

// Checks a lifted weight [out, lifted in_features] against the pattern and the weight; undefined if there is none.
at::Tensor check_lifted_weight(const OptionalTensor& lifted_weight, const Selection& selection, const at::Tensor& x,
                               const at::Tensor& weight, const char* op);

// shift_out as a float32 [out_features] vector, or undefined; giving it without a shift is an error.
at::Tensor check_shift_out(const OptionalTensor& shift_out, const Selection& selection, const at::Tensor& x,
                           int64_t out_features, const char* op);

// Whether activation_dtype requests e4m3 activations; the only other one is the dtype of x.
bool is_e4m3(std::optional<at::ScalarType> activation_dtype, const at::Tensor& x, const char* op);

// The same for sparse_linear, where e4m3 activations need an e4m3 weight.
bool check_activation_dtype(std::optional<at::ScalarType> activation_dtype, const at::Tensor& x,
                            const at::Tensor& weight, const char* op);

// The results of gather_linear's checks: the number of tokens, and the scale of an 8-bit weight.
struct GatherArguments {
  int64_t tokens;
  at::Tensor weight_scale;  // float32 [out_features], or undefined
};
GatherArguments check_gather_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& weight_scale, const char* op);

// The same for dense_linear.
int64_t check_dense_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const char* op);

}  // namespace nm_act
