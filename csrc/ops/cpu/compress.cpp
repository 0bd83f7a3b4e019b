// nm_act::compress and nm_act::decompress: 2:4 values and indices in the device-neutral format.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

#include "ops/cpu/prune.h"

namespace nm_act::cpu_ops {
namespace {

std::tuple<at::Tensor, at::Tensor> compress(const at::Tensor& x, const OptionalTensor& channel_scale,
                                            const OptionalTensor& shift, c10::string_view token_shift) {
  const Selection selection = check_selection(x, 2, 4, channel_scale, shift, token_shift, "compress");
  const at::Tensor dense = x.contiguous();
  at::Tensor values = at::empty(with_last(x.sizes(), selection.in_features / 2), x.options());
  at::Tensor metadata = at::empty(with_last(x.sizes(), (selection.in_features + 7) / 8), x.options().dtype(at::kByte));
  cpu::PruneParams params = prune_params(selection, dense);
  params.values = values.mutable_data_ptr();
  params.metadata = metadata.mutable_data_ptr<uint8_t>();
  launch_prune(params);
  return {values, metadata};
}

// Returns the first group whose nibble does not hold two ascending indices, or -1.
template <class Bits>
int64_t scatter_token(const Bits* values, const uint8_t* metadata, int64_t groups, Bits* out) {
  for (int64_t g = 0; g < groups; ++g) {
    const int nibble = metadata[g / 2] >> (g % 2 * 4) & 15;
    const int first = nibble & 3, second = nibble >> 2;
    if (first >= second) return g;
    out[4 * g + first] = values[2 * g];
    out[4 * g + second] = values[2 * g + 1];
  }
  return -1;
}

at::Tensor decompress(const at::Tensor& values, const at::Tensor& metadata) {
  check_features(values, "decompress");
  check_dtype(values, "decompress");
  check_same_device(values, metadata, "metadata", "decompress");
  const int64_t in_features = values.size(-1) * 2;
  TORCH_CHECK_VALUE(in_features % 4 == 0, "nm_act::decompress expected values of shape [..., in_features / 2] with ",
                    "in_features divisible by 4, got ", values.sizes(), "; pass the values that compress returned");
  TORCH_CHECK_TYPE(metadata.scalar_type() == at::kByte, "nm_act::decompress expected metadata in uint8, got ",
                   dtype_text(metadata), "; pass the metadata that compress returned");
  const std::vector<int64_t> expected = with_last(values.sizes(), (in_features + 7) / 8);
  TORCH_CHECK_VALUE(metadata.sizes() == expected, "nm_act::decompress expected metadata of shape ",
                    at::IntArrayRef(expected), " for values of shape ", values.sizes(), ", got ", metadata.sizes(),
                    "; pass the two tensors of one compress call");

  const at::Tensor packed = values.contiguous();
  const at::Tensor indices = metadata.contiguous();
  at::Tensor out = at::zeros(with_last(values.sizes(), in_features), values.options());
  const int64_t groups = in_features / 4;
  const int64_t tokens = values.numel() / (2 * groups);
  const int64_t stride = (in_features + 7) / 8;
  std::atomic<bool> legal{true};
  const auto scatter = [&](auto bits) {
    using Bits = decltype(bits);
    const auto* from = static_cast<const Bits*>(packed.const_data_ptr());
    auto* to = static_cast<Bits*>(out.mutable_data_ptr());
    at::parallel_for(0, tokens, 1 + 16384 / (1 + in_features), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t bad = scatter_token(from + t * 2 * groups, indices.const_data_ptr<uint8_t>() + t * stride, groups,
                                          to + t * in_features);
        if (bad >= 0) legal = false;
      }
    });
  };
  if (values.element_size() == 4) {
    scatter(uint32_t{});
  } else {
    scatter(uint16_t{});
  }
  TORCH_CHECK_VALUE(legal, "nm_act::decompress expected metadata whose nibbles name two ascending indices, ",
                    "got one that does not; pass the metadata that compress returned");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(nm_act, CPU, m) {
  m.impl("compress", compress);
  m.impl("decompress", decompress);
}

}  // namespace nm_act::cpu_ops
