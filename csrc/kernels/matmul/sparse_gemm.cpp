// Dispatch of sparse_gemm: a table of what is instantiated, the pure choice of a tile, the call.
#include "sparse_gemm.h"

namespace nm_act {
namespace {

using RunSm90 = cudaError_t (*)(const SparseGemmParams&, const GemmLaunch&);
using WorkspaceSm90 = size_t (*)(const SparseGemmParams&, const GemmLaunch&);
using RunSm80 = cudaError_t (*)(const SparseGemmParams&, cudaStream_t);

struct Sm90Instance {
  ElementType value_type;
  ElementType y_type;
  bool weight_in_out;
  GemmTile tile;
  RunSm90 run[2];           // by GemmEpilogue
  WorkspaceSm90 workspace;  // null: needs none
};

template <ElementType kValue, ElementType kOutput, bool kWeightInOut, GemmTile kTile>
constexpr Sm90Instance sm90_instance() {
  return {kValue,
          kOutput,
          kWeightInOut,
          kTile,
          {run_sparse_gemm_sm90<kValue, kOutput, kWeightInOut, kTile, GemmEpilogue::kPlain>,
           run_sparse_gemm_sm90<kValue, kOutput, kWeightInOut, kTile, GemmEpilogue::kFull>},
          nullptr};
}

#ifdef NM_ACT_TUNING_TILES
// Candidates have the ordinary epilogue only.
template <ElementType kValue, bool kWeightInOut, GemmTile kTile>
constexpr Sm90Instance candidate_instance() {
  return {kValue,
          ElementType::kBFloat16,
          kWeightInOut,
          kTile,
          {run_sparse_gemm_sm90<kValue, ElementType::kBFloat16, kWeightInOut, kTile, GemmEpilogue::kPlain>, nullptr},
          sparse_gemm_workspace_sm90<kValue, ElementType::kBFloat16, kWeightInOut, kTile>};
}
#endif

constexpr ElementType kBf16 = ElementType::kBFloat16, kFp16 = ElementType::kFloat16, kFp8 = ElementType::kE4M3,
                      kFp32 = ElementType::kFloat32;

const Sm90Instance kSm90Instances[] = {sm90_instance<kBf16, kBf16, false, GemmTile::k256x128x128>(),
                                       sm90_instance<kBf16, kBf16, false, GemmTile::k128x128x128>(),
                                       sm90_instance<kBf16, kBf16, true, GemmTile::k256x128x128>(),
                                       sm90_instance<kBf16, kBf16, true, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp16, kFp16, false, GemmTile::k256x128x128>(),
                                       sm90_instance<kFp16, kFp16, false, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp16, kFp16, true, GemmTile::k256x128x128>(),
                                       sm90_instance<kFp16, kFp16, true, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp8, kBf16, false, GemmTile::k128x256x128>(),
                                       sm90_instance<kFp8, kBf16, false, GemmTile::k128x128x256PingPong>(),
                                       sm90_instance<kFp8, kFp16, false, GemmTile::k128x256x128>(),
                                       sm90_instance<kFp8, kFp16, false, GemmTile::k128x128x256PingPong>(),
                                       sm90_instance<kBf16, kFp32, false, GemmTile::k128x128x128>(),
                                       sm90_instance<kBf16, kFp32, true, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp16, kFp32, false, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp16, kFp32, true, GemmTile::k128x128x128>(),
                                       sm90_instance<kFp8, kFp32, false, GemmTile::k128x256x128>(),
#ifdef NM_ACT_TUNING_TILES
#define NM_ACT_OUT_IN(name, value) candidate_instance<ElementType::value, false, GemmTile::name>(),
#define NM_ACT_STORAGES_OutIn(name, value) NM_ACT_OUT_IN(name, value)
#define NM_ACT_STORAGES_Both(name, value) \
  NM_ACT_OUT_IN(name, value) candidate_instance<ElementType::value, true, GemmTile::name>(),
#define NM_ACT_INSTANCE(name, value, tokens, outputs, features, token_tiles, output_tiles, schedule, variant, \
                        storages)                                                                             \
  NM_ACT_STORAGES_##storages(name, value)
                                       NM_ACT_CANDIDATES(NM_ACT_INSTANCE)
#endif
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
  return shifted || (scaled && params.value_type != ElementType::kE4M3) ? GemmEpilogue::kFull : GemmEpilogue::kPlain;
}

}  // namespace

MetadataLayout gemm_metadata_layout(ElementType value_type, GemmDevice device) {
  if (value_type == ElementType::kE4M3) return MetadataLayout::kSm90Bits8;
  return device.compute_capability_major == 9 ? MetadataLayout::kSm90Bits16T128 : MetadataLayout::kSm80Bits16;
}

bool sparse_gemm_supports(const SparseGemmParams& params, GemmDevice device) {
  const bool aligned = is_aligned(params.values) && is_aligned(params.metadata) && is_aligned(params.weight) &&
                       is_aligned(params.y) && is_aligned(params.shift_out) && is_aligned(params.column_scale) &&
                       is_aligned(params.bias);
  if (!aligned || !gemm_shape_fits(params.value_type, params.out_features, params.in_features, params.weight_stride,
                                   device.compute_capability_major)) {
    return false;
  }
  if (device.compute_capability_major != 9) return find_sm80(params) != nullptr;
  for (const Sm90Instance& instance : kSm90Instances) {
    if (find_sm90(params, instance.tile) != nullptr) return true;
  }
  return false;
}

cudaError_t launch_sparse_gemm_sm90(const SparseGemmParams& params, const GemmLaunch& launch) {
  const Sm90Instance* instance = find_sm90(params, launch.config.tile);
  if (instance == nullptr) return cudaErrorInvalidValue;
  const RunSm90 run = instance->run[static_cast<int>(epilogue_for(params))];
  return run == nullptr ? cudaErrorInvalidValue : run(params, launch);
}

size_t sparse_gemm_workspace(const SparseGemmParams& params, const GemmLaunch& launch) {
  const Sm90Instance* instance = find_sm90(params, launch.config.tile);
  return instance == nullptr || instance->workspace == nullptr ? 0 : instance->workspace(params, launch);
}

cudaError_t launch_sparse_gemm(const SparseGemmParams& params, GemmDevice device, cudaStream_t stream) {
  if (!sparse_gemm_supports(params, device)) return cudaErrorInvalidValue;
  if (params.tokens == 0 || params.out_features == 0) return cudaSuccess;
  if (device.compute_capability_major != 9) return find_sm80(params)->run(params, stream);
  const GemmProblem problem{params.tokens, params.out_features, params.in_features, params.value_type,
                            device.multiprocessors};
  GemmConfig config = select_config(problem);
  // fp32 output is compiled for one tile only.
  for (const TileFacts& tile : tiles_of(params.value_type)) {
    if (find_sm90(params, config.tile) == nullptr) config = configure(problem, tile);
  }
  // In stream order until overlapped launches have passed the tests on a device: they once raced.
  return launch_sparse_gemm_sm90(params, {config, device.multiprocessors, stream, /*overlapped=*/false, nullptr});
}

}  // namespace nm_act
