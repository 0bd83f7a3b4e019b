// Facts about tensors that the operators of all devices need.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "ops/choice.h"

namespace nm_act {

// Torch operations inside an operator must compute in the dtypes of their arguments, as its kernels do. Autocast has
// already cast the operator's arguments if it applies, and would cast float32 vectors and products again.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

inline WeightFacts facts_of(const at::Tensor& weight) {
  return {weight.size(0), weight.size(1), weight.stride(0), weight.stride(1),
          reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0};
}

// Whether a weight [out, in] is stored [in, out], with rows possibly padded.
inline bool stored_in_out(const at::Tensor& weight) { return facts_of(weight).stored_in_out(); }

inline ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16: return ElementType::kBFloat16;
    case at::kHalf: return ElementType::kFloat16;
    case at::kFloat8_e4m3fn: return ElementType::kE4M3;
    case at::kChar: return ElementType::kInt8;
    default: return ElementType::kFloat32;
  }
}

// The sizes with the last one replaced.
inline std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result = sizes.vec();
  result.back() = last;
  return result;
}

// W = weight * scale[out], rounded once to dtype, in the weight's stride order; the weight itself without a scale.
inline at::Tensor dequantised(const at::Tensor& weight, const at::Tensor& scale, at::ScalarType dtype) {
  return scale.defined() ? weight.to(at::kFloat).mul_(scale.unsqueeze(1)).to(dtype) : weight;
}

}  // namespace nm_act
