// nm_act::sparse_gemm_silu_mul: the product of a packed operand and a merged gate and up weight, activation(gate) * up
// and its 2:4 packing in one kernel.
#include <torch/library.h>

#include "kernels/matmul/gated_gemm.h"
#include "ops/cuda/sparse_gemm.h"

namespace nm_act::cuda_ops {
namespace {

std::tuple<at::Tensor, at::Tensor> sparse_gemm_silu_mul(const at::Tensor& values, const at::Tensor& metadata,
                                                        c10::string_view layout, const at::Tensor& weight,
                                                        c10::string_view activation) {
  constexpr const char* kOp = "sparse_gemm_silu_mul";
  TORCH_CHECK_TYPE(values.scalar_type() != at::kFloat8_e4m3fn, "nm_act::", kOp,
                   " expected 16-bit values, got e4m3, whose next scale needs the whole token; use sparse_gemm and ",
                   "silu_mul_compress");
  const GemmDevice device = check_product(values, metadata, layout, weight, values.scalar_type(), kOp);
  const int64_t tokens = values.size(0), outputs = weight.size(0) / 2;
  GatedGemmParams params{gemm_params({values, metadata, {}, {}}, weight, {}, values.scalar_type()), nullptr,
                         activation_of(activation, kOp)};
  TORCH_CHECK_NOT_IMPLEMENTED(gated_gemm_supports(params, device), "nm_act::", kOp,
                              " expected compute capability 9.0 and weight [2 * outputs, in_features], stored [in, ",
                              "out], with outputs divisible by 16, got ", weight.sizes(), " with strides ",
                              weight.strides(), " on compute capability ", device.compute_capability_major,
                              ".x; use sparse_gemm and silu_mul_compress");
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor z = at::empty({tokens, outputs / 2}, values.options());
  const at::Tensor z_metadata =
      at::empty({metadata_bytes(MetadataLayout::kSm90Bits16T64, tokens, outputs)}, values.options().dtype(at::kByte));
  params.product.y = z.mutable_data_ptr();
  params.metadata = z_metadata.mutable_data_ptr<uint8_t>();
  const GemmProblem problem{tokens, weight.size(0), weight.size(1), params.product.value_type, device.multiprocessors};
  const GemmLaunch launch{device, gated_config(problem), current_stream(values), nullptr, nullptr};
  check_status(launch_gated_gemm(params, launch), kOp);
  return {z, z_metadata};
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("sparse_gemm_silu_mul", sparse_gemm_silu_mul); }

}  // namespace nm_act::cuda_ops
