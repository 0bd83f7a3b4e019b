// Facts about tensors that operators of every device ask for.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

namespace nm_act {

// A weight [out, in] whose storage is [in, out], rows possibly padded.
inline bool stored_in_out(const at::Tensor& weight) {
  return weight.stride(0) == 1 && weight.stride(1) >= std::max<int64_t>(weight.size(0), 1);
}

// The sizes with another last one.
inline std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result = sizes.vec();
  result.back() = last;
  return result;
}

// W = weight * scale[out], rounded once to dtype, in the weight's own stride order; the weight itself without a scale.
inline at::Tensor dequantised(const at::Tensor& weight, const at::Tensor& scale, at::ScalarType dtype) {
  return scale.defined() ? weight.to(at::kFloat).mul_(scale.unsqueeze(1)).to(dtype) : weight;
}

}  // namespace nm_act
