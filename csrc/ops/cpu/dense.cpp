// The dense product on CPUs, with an epilogue in float32.
//
// torch's 16-bit product rounds to 16 bits. In float16 that can overflow although the scaled result would not, and most
// processors have no fast kernel for it, so one block of the weight at a time is converted to float32. In bfloat16,
// which has the range of float32, torch's product is used, with an error of 1.4 roundings instead of one: for 512 x
// 2048 x 2048 it takes 9.7 ms, a float32 product 49 ms (one thread of an AMD EPYC with AVX-512, torch 2.13).
#include "ops/cpu/dense.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <string_view>

namespace nm_act::cpu_ops {

namespace {

void run(const cpu::EpilogueParams& p, int64_t tokens) {
  at::parallel_for(0, tokens, 1 + 16384 / p.columns,
                   [&](int64_t begin, int64_t end) { cpu::cpu_kernels().epilogue(p, begin, end); });
}

// Writes the columns of y from `column` on.
void apply_epilogue(const at::Tensor& product, const cpu::Epilogue& epilogue, ElementType dtype, int64_t column,
                    const at::Tensor& y) {
  const int64_t columns = product.size(1);
  void* const out = static_cast<char*>(y.mutable_data_ptr()) + column * y.element_size();
  run({product.const_data_ptr<float>(), out, columns, y.stride(0), column, columns, dtype, epilogue}, y.size(0));
}

}  // namespace

void apply_epilogue(const cpu::Epilogue& epilogue, ElementType dtype, const at::Tensor& y) {
  run({nullptr, y.mutable_data_ptr(), 0, y.stride(0), 0, y.size(1), dtype, epilogue}, y.size(0));
}

at::Tensor prepacked_product(const at::Tensor& operand, const at::Tensor& prepacked, const OptionalTensor& bias) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, c10::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  static const auto linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
  return linear.call(operand, prepacked, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

void vllm_product(const at::Tensor& operand, const at::Tensor& handler, const OptionalTensor& bias, at::Tensor y) {
  using Product = void(at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&);
  static const auto product = c10::Dispatcher::singleton().findSchemaOrThrow("_C::onednn_mm", "").typed<Product>();
  product.call(y, operand, bias, handler);
}

void dense_product(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y) {
  // Large enough for few calls, without a float32 copy of the whole weight.
  constexpr int64_t kOutputs = 1024;
  const bool widened = dtype != ElementType::kBFloat16;
  const at::Tensor rows = widened ? operand.to(at::kFloat) : operand;
  for (int64_t column = 0; column < weight.size(0); column += kOutputs) {
    const int64_t columns = std::min(kOutputs, weight.size(0) - column);
    const at::Tensor block = weight.narrow(0, column, columns);
    const at::Tensor product =
        widened ? at::mm(rows, block.to(at::kFloat).t()) : at::linear(rows, block).to(at::kFloat);
    apply_epilogue(product, epilogue, dtype, column, y);
  }
}

void dense_rows(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue, ElementType dtype,
                const at::Tensor& y) {
  const at::Tensor wide = operand.to(at::kFloat).contiguous();
  const cpu::CpuKernels& kernels = cpu::cpu_kernels();
  for (int64_t token = 0; token < operand.size(0); token += cpu::kGatherTokens) {
    cpu::DotParams p{};
    p.tokens = std::min<int64_t>(cpu::kGatherTokens, operand.size(0) - token);
    p.weight = weight.const_data_ptr();
    p.out_features = weight.size(0);
    p.in_features = weight.size(1);
    p.row_stride = weight.stride(0);
    p.x = wide.const_data_ptr<float>() + token * p.in_features;
    p.y = static_cast<char*>(y.mutable_data_ptr()) + token * p.out_features * y.element_size();
    p.dtype = dtype;
    p.epilogue = epilogue;
    if (p.epilogue.row_scale != nullptr) p.epilogue.row_scale += token;
    if (p.epilogue.eta != nullptr) p.epilogue.eta += token;
    // At least 64 Ki multiply-adds per thread, about 10 us.
    const int64_t grain = 1 + 65536 / (1 + p.in_features);
    at::parallel_for(0, p.out_features, grain, [&](int64_t begin, int64_t end) { kernels.dot(p, begin, end); });
  }
}

// Speed of this kernel compared with torch's product. One thread of an AMD EPYC (Zen 5), torch 2.13, 9 to 256 tokens
// over 576 x 576 to 4096 x 4096 weights stored [in, out]: in float32 1.5x to 2.2x, where torch's library runs its AVX2
// kernels; in bfloat16, where torch first reorders the weight, 1.0x to 1.8x with products of pairs, without them 1.1x
// to 1.4x up to 16 tokens and slower from there on. torch's float16 product took 19 s for 512 x 2048 x 2048. One thread
// of an Intel Xeon with AMX, which torch uses for bfloat16 (AVX-512 for the other dtypes), 5 to 512 tokens over 576 x
// 576 to 5632 x 2048: 0.1x to 0.5x in bfloat16 from 16 tokens on, 0.4x to 1.0x in float32, and in float16 0.9x to 1.4x
// up to 16 tokens and 0.8x to 1.0x from there on.
bool columns_pay(ElementType dtype, int64_t tokens) {
  if (cpu::has_amx()) return dtype == ElementType::kFloat16 && tokens <= 16;
  if (dtype == ElementType::kFloat16) return true;
  const cpu::CpuKernels& kernels = cpu::cpu_kernels();
  if (std::string_view(kernels.name).substr(0, 6) != "avx512") return false;
  return dtype == ElementType::kFloat32 || kernels.multiplies_bfloat16 || tokens <= 16;
}

void dense_columns(const at::Tensor& operand, const at::Tensor& weight, const cpu::Epilogue& epilogue,
                   ElementType dtype, const at::Tensor& y) {
  const cpu::CpuKernels& kernels = cpu::cpu_kernels();
  const bool pairs = dtype == ElementType::kBFloat16 && kernels.multiplies_bfloat16;
  const at::Tensor x = pairs ? operand : operand.to(at::kFloat);
  cpu::GemmParams p{};
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.x = x.const_data_ptr();
  p.tokens = operand.size(0);
  p.out_features = weight.size(0);
  p.in_features = weight.size(1);
  p.row_stride = weight.stride(1);
  p.dtype = dtype;
  p.epilogue = epilogue;
  constexpr int64_t kPanel = cpu::kGemmColumns;
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel;
  // At least 256 Ki multiply-adds per thread, about 10 us.
  const int64_t grain = 1 + 262144 / (kPanel * (1 + p.in_features) * p.tokens);
  at::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
    kernels.gemm(p, begin * kPanel, std::min(end * kPanel, p.out_features));
  });
}

}  // namespace nm_act::cpu_ops
