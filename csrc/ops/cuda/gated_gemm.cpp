// nm_act::sparse_gemm_silu_mul: the product of a packed operand and a merged gate and up weight, SiLU(gate) * up and its
// 2:4 packing in one kernel.
#include <torch/library.h>

#include "kernels/matmul/gated_gemm.h"
#include "ops/cuda/sparse_gemm.h"

namespace nm_act::cuda_ops {
namespace {

std::tuple<at::Tensor, at::Tensor> sparse_gemm_silu_mul(const at::Tensor& values, const at::Tensor& metadata,
                                                        c10::string_view layout, const at::Tensor& weight,
                                                        const OptionalTensor& row_scale,
                                                        const OptionalTensor& column_scale, bool compress) {
  constexpr const char* kOp = "sparse_gemm_silu_mul";
  const bool fp8 = values.scalar_type() == at::kFloat8_e4m3fn;
  const at::ScalarType type = fp8 ? at::kBFloat16 : values.scalar_type();
  const GemmDevice device = check_product(values, metadata, layout, weight, type, kOp);
  const int64_t tokens = values.size(0), outputs = weight.size(0) / 2;
  TORCH_CHECK_VALUE(weight.size(0) % 2 == 0 && (!compress || outputs % 16 == 0), "nm_act::", kOp,
                    " expected weight [2 * outputs, in_features]", compress ? " with outputs divisible by 16" : "",
                    ", got ", weight.sizes(), "; concatenate the weights of gate and up");
  TORCH_CHECK_TYPE(!compress || !fp8, "nm_act::", kOp,
                   " expected 16-bit values to compress the result, got e4m3, whose scale needs the whole token; pass ",
                   "the dense result to compress_packed");
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor like = at::empty({0}, values.options().dtype(type));
  const GemmEpilogueTensors epilogue{epilogue_vector(row_scale, like, tokens, "row_scale", kOp),
                                     {},
                                     {},
                                     epilogue_vector(column_scale, like, weight.size(0), "column_scale", kOp),
                                     {}};
  TORCH_CHECK_VALUE(fp8 == epilogue.row_scale.defined() && fp8 == epilogue.column_scale.defined(), "nm_act::", kOp,
                    " expected row_scale and column_scale with e4m3 values, and neither with 16-bit ones, got ",
                    epilogue.row_scale.defined() ? "a" : "no", " row_scale and ",
                    epilogue.column_scale.defined() ? "a" : "no", " column_scale with ", values.scalar_type(),
                    "; use sparse_gemm and silu_mul_compress");
  GatedGemmParams params{gemm_params({values, metadata, {}, {}}, weight, epilogue, type), nullptr};
  TORCH_CHECK_NOT_IMPLEMENTED(gated_gemm_supports(params, device), "nm_act::", kOp,
                              " expected compute capability 9.0, 16-bit weights stored [in, out] with outputs ",
                              "divisible by 8, or e4m3 weights stored [out, in], got weight ", weight.sizes(),
                              " with strides ", weight.strides(), " in ", weight.scalar_type(),
                              " on compute capability ", device.compute_capability_major,
                              ".x; use sparse_gemm and silu_mul_compress");
  const auto bytes = compress ? metadata_bytes(MetadataLayout::kSm90Bits16T64, tokens, outputs) : 0;
  const at::Tensor z = at::empty({tokens, compress ? outputs / 2 : outputs}, values.options().dtype(type));
  const at::Tensor z_metadata = at::empty({bytes}, values.options().dtype(at::kByte));
  params.product.y = z.mutable_data_ptr();
  params.metadata = compress ? z_metadata.mutable_data_ptr<uint8_t>() : nullptr;
  const GemmProblem problem{tokens, weight.size(0), weight.size(1), params.product.value_type, device.multiprocessors};
  const GemmLaunch launch{device, gated_config(problem), current_stream(values), nullptr, nullptr};
  check_status(launch_gated_gemm(params, launch), kOp);
  return {z, z_metadata};
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CUDA, m) { m.impl("sparse_gemm_silu_mul", sparse_gemm_silu_mul); }

}  // namespace nm_act::cuda_ops
