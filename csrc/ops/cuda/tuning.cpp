// Of a build with NM_ACT_TUNING_TILES only: nm_act::compress_packed_in, 2:4 compression in a metadata layout of the
// caller's choice, because candidate tiles read layouts that no shipped tile does.
#include <torch/library.h>

#include "ops/cuda/common.h"

namespace nm_act::cuda_ops {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress_packed_in(const at::Tensor& x, bool fp8, int64_t layout) {
  constexpr const char* kOp = "compress_packed_in";
  const Selection selection = check_selection(x, 2, 4, {}, {}, "none", kOp);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::ScalarType value_type = fp8 ? at::kFloat8_e4m3fn : x.scalar_type();
  auto [operand, out] =
      allocate_packed(x, selection, false, value_type, static_cast<MetadataLayout>(layout), selection.in_features);
  const Rows rows = rows_of(x);
  const CompressParams params{rows.tensor.const_data_ptr(),  rows.stride, selection.tokens, int(selection.in_features),
                              element_type(x.scalar_type()), out};
  check_status(launch_compress(params, current_stream(x)), kOp);
  return {operand.values, operand.metadata, fp8 ? operand.row_scale : empty_vector(x, 0)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nm_act, m) {
  m.def("compress_packed_in(Tensor x, bool fp8, int layout) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("compress_packed_in", compress_packed_in); }

}  // namespace nm_act::cuda_ops
