// The pybind11 module nm_act._C: importing it registers the operators. It also has build facts and host helpers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "build_facts.h"
#include "cpu/kernels.h"
#include "kernels/gather/config.h"
#include "kernels/matmul/config.h"
#include "kernels/nm_act.h"
#include "ops/choice.h"
#include "ops/support.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = NM_ACT_TORCH_VERSION;
  info["torch_cuda"] = NM_ACT_TORCH_CUDA;
  info["compiler"] = NM_ACT_COMPILER;
  info["cpu_isa"] = nm_act::cpu::cpu_kernels().name;
  info["cpu_isas"] = nm_act::cpu::compiled_isas();
#ifdef NM_ACT_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = NM_ACT_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  info["why_no_cuda"] = NM_ACT_WHY_NO_CUDA;
  info["cutlass"] = NM_ACT_CUTLASS;
  return info;
}

py::list support_table() {
  py::list rows;
  for (const nm_act::SupportRow& row : nm_act::kSupport) {
    rows.append(py::dict(py::arg("op") = row.op, py::arg("when") = row.when, py::arg("device") = row.device,
                         py::arg("dtypes") = row.dtypes, py::arg("patterns") = row.patterns, py::arg("how") = row.how));
  }
  return rows;
}

nm_act::MetadataLayout layout_named(const std::string& name) {
  std::string names;
  for (int i = 0; i < nm_act::kMetadataLayouts; ++i) {
    const auto layout = static_cast<nm_act::MetadataLayout>(i);
    if (name == nm_act::layout_text(layout)) return layout;
    names += (i == 0                              ? ""
              : i + 1 == nm_act::kMetadataLayouts ? " or "
                                                  : ", ") +
             std::string(nm_act::layout_text(layout));
  }
  throw std::invalid_argument("expected a metadata layout named " + names + ", got '" + name +
                              "'; choose one of those");
}

void check_sizes(int64_t tokens, int64_t in_features) {
  if (tokens < 0 || in_features < 0 || in_features % 4 != 0)
    throw std::invalid_argument("expected tokens >= 0 and in_features a multiple of 4, got " + std::to_string(tokens) +
                                " and " + std::to_string(in_features) + "; pad the features");
}

using Repack = void (*)(nm_act::MetadataLayout, int64_t, int64_t, const uint8_t*, uint8_t*);

py::bytes repack(const py::bytes& packed, int64_t tokens, int64_t in_features, nm_act::MetadataLayout layout,
                 nm_act::MetadataLayout from, nm_act::MetadataLayout to, Repack function) {
  const std::string_view bytes = packed;
  const int64_t expected = nm_act::metadata_bytes(from, tokens, in_features);
  if (int64_t(bytes.size()) != expected)
    throw std::invalid_argument("expected " + std::to_string(expected) + " metadata bytes for " +
                                std::to_string(tokens) + " tokens of " + std::to_string(in_features) +
                                " features, got " + std::to_string(bytes.size()) + "; pass the whole buffer");
  std::string result(nm_act::metadata_bytes(to, tokens, in_features), '\0');
  function(layout, tokens, in_features, reinterpret_cast<const uint8_t*>(bytes.data()),
           reinterpret_cast<uint8_t*>(result.data()));
  return py::bytes(result);
}

py::bytes pack_metadata(const py::bytes& neutral, int64_t tokens, int64_t in_features, const std::string& name) {
  check_sizes(tokens, in_features);
  const auto layout = layout_named(name);
  return repack(neutral, tokens, in_features, layout, nm_act::MetadataLayout::kNeutral, layout, nm_act::pack_metadata);
}

py::bytes unpack_metadata(const py::bytes& physical, int64_t tokens, int64_t in_features, const std::string& name) {
  check_sizes(tokens, in_features);
  const auto layout = layout_named(name);
  return repack(physical, tokens, in_features, layout, layout, nm_act::MetadataLayout::kNeutral,
                nm_act::unpack_metadata);
}

// The choice of a GEMM tile, for benchmarks/tune.py and the tests.

// Accepts torch's name or the short one.
nm_act::ElementType element_type_named(const std::string& name) {
  if (name == "float32") return nm_act::ElementType::kFloat32;
  if (name == "bfloat16" || name == "bf16") return nm_act::ElementType::kBFloat16;
  if (name == "float16" || name == "fp16") return nm_act::ElementType::kFloat16;
  if (name == "float8_e4m3fn" || name == "e4m3") return nm_act::ElementType::kE4M3;
  if (name == "int8") return nm_act::ElementType::kInt8;
  throw std::invalid_argument("expected a dtype named float32, bfloat16, float16, float8_e4m3fn or int8, got '" + name +
                              "'; choose one of those");
}

py::list gemm_tiles(const std::string& dtype) {
  const nm_act::ElementType type = element_type_named(dtype);
  py::list tiles;
  for (const nm_act::TileFacts& tile : nm_act::kTiles) {
    if (!nm_act::is_tile_of(tile, type)) continue;
    tiles.append(py::dict(py::arg("tile") = int(tile.tile), py::arg("tokens") = tile.tokens,
                          py::arg("out_features") = tile.out_features, py::arg("name") = tile.name,
                          py::arg("cluster_tokens") = tile.cluster_tokens,
                          py::arg("cluster_outputs") = tile.cluster_outputs, py::arg("split") = tile.split,
                          py::arg("can_pace") = nm_act::can_pace(tile.tile)));
  }
  return tiles;
}

py::tuple config_tuple(const nm_act::GemmConfig& config) {
  return py::make_tuple(int(config.tile), int(config.raster), config.swizzle, config.splits, config.overlapped,
                        config.paced);
}

// The configuration of a tile for this problem.
py::tuple configure_gemm(int tile, int64_t tokens, int64_t out_features, int64_t in_features, int multiprocessors) {
  if (tile < 0 || tile >= int(std::size(nm_act::kTiles))) {
    throw py::value_error("expected a tile of gemm_tiles, got " + std::to_string(tile));
  }
  const nm_act::TileFacts& facts = nm_act::kTiles[tile];
  const auto type = facts.bits8 ? nm_act::ElementType::kE4M3 : nm_act::ElementType::kBFloat16;
  return config_tuple(nm_act::configure({tokens, out_features, in_features, type, multiprocessors}, facts));
}

py::tuple select_gemm_config(const std::string& dtype, int64_t tokens, int64_t out_features, int64_t in_features,
                             int multiprocessors, bool weight_in_out) {
  return config_tuple(nm_act::select_config(
      {tokens, out_features, in_features, element_type_named(dtype), multiprocessors, weight_in_out}));
}

// The configuration in a tuple alone, or two with (cut, at) between them.
py::tuple select_gemm_plan(const std::string& dtype, int64_t tokens, int64_t out_features, int64_t in_features,
                           int multiprocessors, bool residual, bool weight_in_out) {
  const nm_act::GemmProblem problem{tokens,          out_features, in_features, element_type_named(dtype),
                                    multiprocessors, weight_in_out};
  const nm_act::GemmPlan plan = residual ? nm_act::select_residual_plan(problem) : nm_act::select_plan(problem);
  const py::tuple first = config_tuple(plan.first);
  if (plan.cut == nm_act::GemmCut::kNone) return first;
  return first + py::make_tuple(int(plan.cut), plan.at) + config_tuple(plan.second);
}

// (lanes, splits, threads, ahead) of every configuration that the gather kernel can run this problem with; the one it
// would choose comes first.
py::list gather_configs(int tokens, int out_features, int in_features, bool bits8, int keep, int group,
                        int compute_capability_major, int multiprocessors, bool in_layer) {
  const nm_act::GatherProblem problem{tokens,
                                      out_features,
                                      in_features,
                                      bits8 ? nm_act::ElementType::kE4M3 : nm_act::ElementType::kBFloat16,
                                      {keep, group, {}},
                                      {compute_capability_major, multiprocessors}};
  const auto tuple = [](const nm_act::GatherConfig& c) {
    return py::make_tuple(c.lanes, c.splits, c.threads, c.ahead);
  };
  const py::tuple chosen =
      tuple(in_layer ? nm_act::select_gather_config_in_layer(problem) : nm_act::select_gather_config(problem));
  py::list result;
  result.append(chosen);
  nm_act::for_each_gather_config(problem, [&](const nm_act::GatherConfig& config) {
    if (!tuple(config).equal(chosen)) result.append(tuple(config));
  });
  return result;
}

nm_act::Pattern pattern_of(int n, int m, const std::vector<int>& extra_columns) {
  nm_act::Pattern pattern{n, m, {static_cast<int>(extra_columns.size()), {0, 0}}};
  for (size_t i = 0; i < extra_columns.size() && i < 2; ++i) pattern.extra.column[i] = extra_columns[i];
  return pattern;
}

// Sizes and strides of a weight, and whether its storage is aligned to 16 bytes.
using Facts = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

py::tuple explained(const nm_act::LinearChoice& choice, const nm_act::LinearFacts& facts) {
  static constexpr const char* kNames[] = {"gather", "sparse", "lifted", "dense", "prepacked"};
  return py::make_tuple(kNames[static_cast<int>(choice.path)], nm_act::text_of(choice, facts),
                        nm_act::kernel_text(choice));
}

// The path of an operator, the sentence that explains it, and its kernel's configuration, from facts alone. Without a
// pattern, n and m are 0.
py::tuple choose_path(bool on_cuda, int64_t tokens, const std::string& dtype, int n, int m,
                      const std::vector<int>& extra_columns, const Facts& weight, const std::optional<Facts>& lifted,
                      int compute_capability_major, int multiprocessors, const std::string& weight_dtype,
                      const std::string& activation_dtype, bool variance_correction, const std::string& op) {
  nm_act::LinearFacts facts{tokens,
                            element_type_named(dtype),
                            element_type_named(weight_dtype),
                            element_type_named(activation_dtype),
                            pattern_of(n, m, extra_columns),
                            std::make_from_tuple<nm_act::WeightFacts>(weight),
                            {},
                            variance_correction};
  if (lifted) facts.lifted = std::make_from_tuple<nm_act::WeightFacts>(*lifted);
  const nm_act::GemmDevice device{compute_capability_major, multiprocessors};
  const auto choose = [&]() -> nm_act::LinearChoice {
    if (op == "decode_linear" || op == "sandwich_linear") return nm_act::choose_in_layer(facts, device);
    if (op == "sparse_linear_prepacked") return nm_act::choose_on_cpu(facts, /*prepacked=*/true);
    if (op == "gather_linear" && on_cuda) return nm_act::choose_gather_linear(facts, device);
    if (op == "gather_linear") return {nm_act::LinearPath::kGather, nm_act::Why::kFewTokens};
    return on_cuda ? nm_act::choose_on_cuda(facts, device) : nm_act::choose_on_cpu(facts);
  };
  return explained(choose(), facts);
}

// The same for sparse_gemm and sparse_gemm_silu_mul, whose operand is packed.
py::tuple choose_packed(int64_t tokens, const std::string& value_dtype, const std::string& y_dtype, const Facts& weight,
                        bool shifted, bool scaled, bool residual, bool gated, int compute_capability_major,
                        int multiprocessors) {
  const nm_act::PackedFacts facts{tokens,
                                  element_type_named(value_dtype),
                                  element_type_named(y_dtype),
                                  std::make_from_tuple<nm_act::WeightFacts>(weight),
                                  shifted,
                                  scaled,
                                  residual,
                                  gated};
  return explained(nm_act::choose_packed(facts, {compute_capability_major, multiprocessors}), {});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info);
  m.def("support_table", support_table);
  m.attr("FEW_TOKENS") = nm_act::kFewTokens;
  m.attr("SPARSE_GEMM_TOKENS") = nm_act::kSparseGemmTokens;
  m.attr("MAX_ROW_FEATURES") = nm_act::kMaxRowFeatures;
  m.attr("MAX_NORM_FEATURES") = nm_act::kMaxNormFeatures;
  m.def("head_norms_support", nm_act::head_norms_support, py::arg("head_dim"));
  m.def("decode_attention_supports", nm_act::decode_attention_supports, py::arg("q_heads"), py::arg("k_heads"),
        py::arg("head_dim"));
  m.def("gather_configs", gather_configs, py::arg("tokens"), py::arg("out_features"), py::arg("in_features"),
        py::arg("bits8"), py::arg("keep"), py::arg("group"), py::arg("compute_capability_major"),
        py::arg("multiprocessors"), py::arg("in_layer") = false);
  m.def("pack_metadata", pack_metadata, py::arg("neutral"), py::arg("tokens"), py::arg("in_features"),
        py::arg("layout"));
  m.def("unpack_metadata", unpack_metadata, py::arg("physical"), py::arg("tokens"), py::arg("in_features"),
        py::arg("layout"));
  m.def("gemm_tiles", gemm_tiles, py::arg("dtype"));
  m.def("configure_gemm", configure_gemm, py::arg("tile"), py::arg("tokens"), py::arg("out_features"),
        py::arg("in_features"), py::arg("multiprocessors"));
  m.def("select_gemm_config", select_gemm_config, py::arg("dtype"), py::arg("tokens"), py::arg("out_features"),
        py::arg("in_features"), py::arg("multiprocessors"), py::arg("weight_in_out") = false);
  m.def("select_gemm_plan", select_gemm_plan, py::arg("dtype"), py::arg("tokens"), py::arg("out_features"),
        py::arg("in_features"), py::arg("multiprocessors"), py::arg("residual") = false,
        py::arg("weight_in_out") = false);
  m.def("choose_path", choose_path, py::arg("on_cuda"), py::arg("tokens"), py::arg("dtype"), py::arg("n"), py::arg("m"),
        py::arg("extra_columns"), py::arg("weight"), py::arg("lifted"), py::arg("compute_capability_major"),
        py::arg("multiprocessors"), py::arg("weight_dtype"), py::arg("activation_dtype"),
        py::arg("variance_correction"), py::arg("op") = "sparse_linear");
  m.def("choose_packed", choose_packed, py::arg("tokens"), py::arg("value_dtype"), py::arg("y_dtype"),
        py::arg("weight"), py::arg("shifted"), py::arg("scaled"), py::arg("residual"), py::arg("gated"),
        py::arg("compute_capability_major"), py::arg("multiprocessors"));
}
