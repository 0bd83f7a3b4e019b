// nm_act::_packed_layer: all products of a served layer over one input, in one call.
//
// A merged layer has parts (q; k and v) that select differently, or not at all. Each part prunes and multiplies by a
// weight in oneDNN's layout, as sparse_linear_prepacked does. A compiled graph pays about 6 us for every call with so
// many arguments, and again for each tensor that it takes as an input: at 8 requests, 7 % of a step of SmolLM2-135M in
// vLLM (one thread of an AMD EPYC). So an object holds a layer's tensors and options, and the graph passes the object's
// address, as vLLM does with the handlers of its own products.
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ops/cpu/dense.h"
#include "ops/cpu/sparse_linear.h"
#include "ops/tensors.h"

namespace nm_act::cpu_ops {
namespace {

constexpr const char* kOp = "_packed_layer";

struct Part {
  at::Tensor copy;  // of the weight in oneDNN's layout, or the handler of vLLM's product of it
  int64_t out_features;
  OptionalTensor weight;  // stored [in, out]; none: dense
  OptionalTensor bias;    // beside the layer's, of any dtype
  int64_t n, m;
  OptionalTensor channel_scale, shift, shift_out, column_scale;
  std::string token_shift;
  bool variance_correction;
  std::vector<int64_t> extra_columns;
};

class PackedLayer;

// The existing layers: an operator must not dereference any other address.
struct Existing {
  std::mutex mutex;
  std::unordered_set<const PackedLayer*> layers;
};

Existing& existing() {
  static Existing* const e = new Existing;  // never destroyed, as Python may free layers after that
  return *e;
}

// Held by Python, which keeps it alive for as long as a graph may pass its address.
class PackedLayer : public torch::CustomClassHolder {
 public:
  // `like` [0, in_features], in the dtype of the inputs.
  explicit PackedLayer(at::Tensor like) : in_features(like.size(1)), dtype(like.scalar_type()) {
    const std::lock_guard<std::mutex> lock(existing().mutex);
    existing().layers.insert(this);
  }
  ~PackedLayer() override {
    const std::lock_guard<std::mutex> lock(existing().mutex);
    existing().layers.erase(this);
  }

  static const PackedLayer& at(const at::Tensor& address) {
    TORCH_CHECK_VALUE(address.scalar_type() == at::kLong && address.numel() == 1 && address.is_cpu(), "nm_act::", kOp,
                      " expected a layer as one int64 on the CPU, got ", address.sizes(), " ", dtype_text(address),
                      "; pass the address of a PackedLayer");
    const auto* layer = reinterpret_cast<const PackedLayer*>(*address.const_data_ptr<int64_t>());
    const std::lock_guard<std::mutex> lock(existing().mutex);
    TORCH_CHECK_VALUE(existing().layers.count(layer) == 1, "nm_act::", kOp,
                      " expected the address of a PackedLayer, got another number; keep the layer that it is of");
    return *layer;
  }

  void add(at::Tensor copy, int64_t out_features, OptionalTensor weight, OptionalTensor bias, int64_t n, int64_t m,
           OptionalTensor channel_scale, OptionalTensor shift, OptionalTensor shift_out, OptionalTensor column_scale,
           std::string token_shift, bool variance_correction, std::vector<int64_t> extra_columns) {
    parts.push_back({std::move(copy), out_features, std::move(weight), std::move(bias), n, m, std::move(channel_scale),
                     std::move(shift), std::move(shift_out), std::move(column_scale), std::move(token_shift),
                     variance_correction, std::move(extra_columns)});
  }
  // Where a reload cannot write to a copy.
  void set_copy(int64_t part, at::Tensor copy) { parts.at(static_cast<size_t>(part)).copy = std::move(copy); }
  int64_t address() const { return reinterpret_cast<int64_t>(this); }

  const int64_t in_features;
  const at::ScalarType dtype;
  std::vector<Part> parts;
};

at::Tensor product_of(const Part& part, const at::Tensor& x, const OptionalTensor& bias) {
  if (part.weight.has_value()) {
    return pruned_product(kOp, part.copy, x, *part.weight, bias, part.n, part.m, part.channel_scale, part.shift,
                          part.token_shift, part.shift_out, part.variance_correction, part.column_scale, {},
                          part.extra_columns, {}, {});
  }
  if (part.copy.is_mkldnn()) return prepacked_product(x, part.copy, bias);
  at::Tensor y = at::empty({x.size(0), part.out_features}, x.options());
  vllm_product(x, part.copy, bias, y);
  return y;
}

// The layer's bias from `begin` on and the part's own; undefined if there is neither.
at::Tensor bias_of(const Part& part, const at::Tensor& x, const OptionalTensor& bias, int64_t begin) {
  at::Tensor sum =
      bias.has_value() ? bias->narrow(0, begin, part.out_features).to(x.scalar_type()).contiguous() : at::Tensor();
  if (!part.bias.has_value()) return sum;
  const at::Tensor own = part.bias->to(x.scalar_type());
  return sum.defined() ? at::add(sum, own) : own.contiguous();
}

at::Tensor packed_layer(const at::Tensor& x, const at::Tensor& layer, int64_t out_features,
                        const OptionalTensor& bias) {
  check_features(x, kOp);
  const PackedLayer& held = PackedLayer::at(layer);
  TORCH_CHECK_VALUE(x.size(-1) == held.in_features && x.scalar_type() == held.dtype, "nm_act::", kOp, " expected x of ",
                    held.in_features, " features in ", dtype_text(held.dtype), ", got ", x.sizes(), " in ",
                    dtype_text(x), "; check the layer's input");
  TORCH_CHECK_VALUE(!bias.has_value() || bias->sizes() == at::IntArrayRef{out_features}, "nm_act::", kOp,
                    " expected a bias of shape [", out_features, "], got ",
                    bias.has_value() ? bias->sizes() : at::IntArrayRef{}, "; pass the layer's own");
  const int64_t tokens = x.numel() / x.size(-1);
  const std::vector<int64_t> sizes = with_last(x.sizes(), out_features);
  if (tokens == 0) return at::empty(sizes, x.options());
  const at::Tensor rows = x.contiguous().view({tokens, x.size(-1)});
  const auto product = [&](const Part& part, int64_t begin) {
    const at::Tensor own = bias_of(part, x, bias, begin);
    return product_of(part, rows, own.defined() ? OptionalTensor(own) : OptionalTensor());
  };
  if (held.parts.size() == 1) return product(held.parts[0], 0).view(sizes);
  at::Tensor y = at::empty(sizes, x.options());
  const size_t row_bytes = static_cast<size_t>(out_features * y.element_size());
  int64_t begin = 0;
  for (const Part& part : held.parts) {
    const at::Tensor own = product(part, begin);
    const size_t bytes = static_cast<size_t>(part.out_features * y.element_size());
    auto* target = static_cast<char*>(y.mutable_data_ptr()) + begin * y.element_size();
    const auto* source = static_cast<const char*>(own.const_data_ptr());
    at::parallel_for(0, tokens, 1 + 262144 / static_cast<int64_t>(bytes), [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; ++token) {
        std::memcpy(target + token * row_bytes, source + token * bytes, bytes);
      }
    });
    begin += part.out_features;
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nm_act, m) {
  m.class_<PackedLayer>("PackedLayer")
      .def(torch::init<at::Tensor>())
      .def("add", &PackedLayer::add)
      .def("set_copy", &PackedLayer::set_copy)
      .def("address", &PackedLayer::address);
}

TORCH_LIBRARY_IMPL(nm_act, CPU, m) { m.impl(kOp, packed_layer); }

}  // namespace nm_act::cpu_ops
