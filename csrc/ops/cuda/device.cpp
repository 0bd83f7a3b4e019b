// Devices, rows and statuses of the CUDA operators.
#include <array>
#include <atomic>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {

void check_status(cudaError_t status, const char* op) {
  TORCH_CHECK(status == cudaSuccess, "nm_act::", op, " expected its kernel to start, got the CUDA error '",
              cuda_error_text(status), "'; an earlier kernel may have failed (CUDA_LAUNCH_BLOCKING=1 finds it)");
}

GemmDevice gemm_device(const at::Tensor& x, const char* op) {
  // A driver query takes longer than a kernel launch. Both attributes are in one word, and racing writes store the same
  // value.
  constexpr int kDevices = 64;
  static std::array<std::atomic<uint64_t>, kDevices> known{};
  const int index = x.device().index();
  TORCH_CHECK_VALUE(index >= 0 && index < kDevices, "nm_act::", op, " expected a CUDA device below ", kDevices,
                    ", got ", index);
  uint64_t word = known[index].load(std::memory_order_relaxed);
  if (word == 0) {
    GemmDevice device{};
    check_status(query_gemm_device(index, &device), op);
    word = uint64_t(device.compute_capability_major) << 32 | uint32_t(device.multiprocessors);
    known[index].store(word, std::memory_order_relaxed);
  }
  return {int(word >> 32), int(word & 0xffffffff)};
}

Rows rows_of(const at::Tensor& x) {
  const int64_t in_features = x.size(-1);
  int64_t stride = 0;  // of a row
  int64_t span = 0;    // of the dimensions so far
  bool in_place = x.stride(-1) == 1;
  for (int64_t i = x.dim() - 2; i >= 0 && in_place; --i) {
    if (x.size(i) == 1) continue;
    in_place = stride == 0 ? x.stride(i) >= in_features : x.stride(i) == span;
    if (stride == 0) stride = x.stride(i);
    span = x.stride(i) * x.size(i);
  }
  if (!in_place) return {x.contiguous(), in_features};
  return {x, stride == 0 ? in_features : stride};
}

at::Tensor aligned(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  const at::Tensor dense = tensor.contiguous();
  return is_aligned(dense) ? dense : dense.clone();
}

Rows aligned_rows(const at::Tensor& x) {
  const Rows rows = rows_of(x);
  return is_aligned(rows) ? rows : Rows{aligned(rows.tensor), x.size(-1)};
}

std::pair<Rows, Rows> aligned_rows(const at::Tensor& x, const at::Tensor& other) {
  const Rows rows = rows_of(x), others = rows_of(other);
  if (rows.stride == others.stride && is_aligned(rows) && is_aligned(others)) return {rows, others};
  return {{aligned(rows.tensor), x.size(-1)}, {aligned(others.tensor), x.size(-1)}};
}

void check_row_statistics(const Selection& selection, bool needed, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(!needed || selection.in_features <= kMaxRowFeatures, "nm_act::", op, " expected at most ",
                              kMaxRowFeatures,
                              " in_features for a token shift, a variance correction or e4m3 on CUDA, got ",
                              selection.in_features, "; leave that option out for this layer");
}

}  // namespace nm_act::cuda_ops
