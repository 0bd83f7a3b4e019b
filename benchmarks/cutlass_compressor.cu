// CUTLASS's own compressor of a pruned operand, as the baseline of bench_compress.py: a C function over device pointers.
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/transform/device/transform_universal_adapter.hpp>
#include <cutlass/transform/kernel/sparse_gemm_compressor.hpp>

namespace {

template <class Element>
cudaError_t compress(const void* x, void* values, void* metadata, int tokens, int in_features, cudaStream_t stream) {
  using Shape = cute::Shape<int, int, int, int>;
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, cute::_128>;
  using Kernel = cutlass::transform::kernel::StructuredSparseCompressor<Shape, Element, cutlass::layout::RowMajor, Config,
                                                                        cutlass::arch::Sm90>;
  typename Kernel::StrideA stride{};
  cute::get<0>(stride) = in_features;
  const typename Kernel::Arguments arguments{{tokens, 16, in_features, 1}, {x, stride, values, metadata}, {}};
  cutlass::transform::device::TransformUniversalAdapter<Kernel> compressor;
  if (compressor.can_implement(arguments) != cutlass::Status::kSuccess ||
      compressor.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
      compressor.run(stream) != cutlass::Status::kSuccess) {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

// x [tokens, in_features] of bf16, at most two non-zeros a group of four; values [tokens, in_features / 2]; metadata as
// compress_packed lays it out, tokens a multiple of 64 and in_features of 128.
extern "C" int cutlass_compress_bf16(const void* x, void* values, void* metadata, int tokens, int in_features,
                                     void* stream) {
  return compress<cutlass::bfloat16_t>(x, values, metadata, tokens, in_features, static_cast<cudaStream_t>(stream));
}
