// Dispatch of sparse_gemm: the table of instances, and the call.
#include "sparse_gemm.h"

#include "config.h"

namespace nm_act {
namespace {

using RunSm90 = cudaError_t (*)(const SparseGemmParams&, const GemmLaunch&);
using RunSm80 = cudaError_t (*)(const SparseGemmParams&, cudaStream_t);

struct Sm90Instance {
  ElementType value_type;
  ElementType y_type;
  bool weight_in_out;
  GemmTile tile;
  RunSm90 run[3];  // by GemmEpilogue; null for kResidual unless compiles_residual
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile>
constexpr Sm90Instance sm90_instance() {
  Sm90Instance instance{kValue,
                        kOutput,
                        kWeightInOut,
                        kTile,
                        {run_sparse_gemm_sm90<kValue, kOutput, kWeightInOut, kTile, GemmEpilogue::kPlain>,
                         run_sparse_gemm_sm90<kValue, kOutput, kWeightInOut, kTile, GemmEpilogue::kFull>, nullptr}};
  if constexpr (compiles_residual(kValue, kOutput, kWeightInOut, kTile)) {
    instance.run[2] = run_sparse_gemm_sm90<kValue, kOutput, kWeightInOut, kTile, GemmEpilogue::kResidual>;
  }
  return instance;
}

constexpr ElementType kBf16 = ElementType::kBFloat16, kFp16 = ElementType::kFloat16, kFp8 = ElementType::kE4M3;

const Sm90Instance kSm90Instances[] = {
#define NM_ACT_INSTANCES_Bits16(name)                                                                        \
  sm90_instance<kBf16, kBf16, false, GemmTile::name>(), sm90_instance<kBf16, kBf16, true, GemmTile::name>(), \
      sm90_instance<kFp16, kFp16, false, GemmTile::name>(), sm90_instance<kFp16, kFp16, true, GemmTile::name>(),
#define NM_ACT_INSTANCES_E4M3(name) \
  sm90_instance<kFp8, kBf16, false, GemmTile::name>(), sm90_instance<kFp8, kFp16, false, GemmTile::name>(),
#define NM_ACT_INSTANCES(name, value, ...) NM_ACT_INSTANCES_##value(name)
    NM_ACT_TILES(NM_ACT_INSTANCES)
#undef NM_ACT_INSTANCES
#undef NM_ACT_INSTANCES_Bits16
#undef NM_ACT_INSTANCES_E4M3
};

struct Sm80Instance {
  ElementType value_type;
  bool weight_in_out;
  RunSm80 run;
};

const Sm80Instance kSm80Instances[] = {{kBf16, false, run_sparse_gemm_sm80<kBf16, false>},
                                       {kBf16, true, run_sparse_gemm_sm80<kBf16, true>},
                                       {kFp16, false, run_sparse_gemm_sm80<kFp16, false>},
                                       {kFp16, true, run_sparse_gemm_sm80<kFp16, true>}};

const Sm80Instance* find_sm80(const SparseGemmParams& params) {
  for (const Sm80Instance& instance : kSm80Instances) {
    if (instance.value_type == params.value_type && params.y_type == params.value_type &&
        instance.weight_in_out == params.weight_in_out) {
      return &instance;
    }
  }
  return nullptr;
}

const Sm90Instance* find_sm90(const SparseGemmParams& params, GemmTile tile) {
  for (const Sm90Instance& instance : kSm90Instances) {
    if (instance.value_type == params.value_type && instance.y_type == params.y_type &&
        instance.weight_in_out == params.weight_in_out && instance.tile == tile) {
      return &instance;
    }
  }
  return nullptr;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

GemmEpilogue epilogue_for(const SparseGemmParams& params) {
  const bool shifted = params.eta != nullptr || params.shift_out != nullptr;
  const bool scaled = params.row_scale != nullptr || params.column_scale != nullptr;
  return has_plain_epilogue(params.value_type, shifted, scaled) ? GemmEpilogue::kPlain : GemmEpilogue::kFull;
}

// Whether the kernel of this tile adds the residual.
bool sparse_gemm_adds(const SparseGemmParams& params, GemmDevice device, GemmTile tile) {
  if (device.compute_capability_major != 9 || epilogue_for(params) != GemmEpilogue::kPlain) return false;
  const Sm90Instance* instance = find_sm90(params, tile);
  return instance != nullptr && instance->run[static_cast<int>(GemmEpilogue::kResidual)] != nullptr;
}

}  // namespace

MetadataLayout gemm_metadata_layout(ElementType value_type, GemmDevice device) {
  if (value_type == ElementType::kE4M3) return MetadataLayout::kSm90Bits8;
  return device.compute_capability_major == 9 ? MetadataLayout::kSm90Bits16T64 : MetadataLayout::kSm80Bits16;
}

bool sparse_gemm_supports(const SparseGemmParams& params, GemmDevice device) {
  const bool aligned = is_aligned(params.values) && is_aligned(params.metadata) && is_aligned(params.weight) &&
                       is_aligned(params.y) && is_aligned(params.shift_out) && is_aligned(params.column_scale) &&
                       is_aligned(params.bias) && is_aligned(params.residual);
  const bool whole = params.metadata_tokens == params.tokens || device.compute_capability_major == 9;
  if (!aligned || !whole || params.y_stride % 8 != 0 ||
      !gemm_shape_fits(params.value_type, params.out_features, params.in_features, params.weight_stride,
                       device.compute_capability_major)) {
    return false;
  }
  if (device.compute_capability_major != 9) return find_sm80(params) != nullptr;
  for (const Sm90Instance& instance : kSm90Instances) {
    if (find_sm90(params, instance.tile) != nullptr) return true;
  }
  return false;
}

size_t sparse_gemm_workspace(const SparseGemmParams& params, GemmLaunch launch) {
  if (launch.device.compute_capability_major != 9 || !facts_of(launch.config.tile).split) return 0;
  size_t bytes = 0;
  launch.workspace_bytes = &bytes;
  return launch_sparse_gemm(params, launch) == cudaSuccess ? bytes : 0;
}

cudaError_t launch_sparse_gemm(const SparseGemmParams& params, const GemmLaunch& launch) {
  if (!sparse_gemm_supports(params, launch.device)) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.out_features == 0) return cudaSuccess;
  const bool adds = params.residual != nullptr;
  if (adds && !sparse_gemm_adds(params, launch.device, launch.config.tile)) return cudaErrorInvalidValue;
  if (launch.device.compute_capability_major != 9) return find_sm80(params)->run(params, launch.stream);
  const Sm90Instance* instance = find_sm90(params, launch.config.tile);
  if (instance == nullptr) return cudaErrorInvalidValue;
  return instance->run[static_cast<int>(adds ? GemmEpilogue::kResidual : epilogue_for(params))](params, launch);
}

}  // namespace nm_act
