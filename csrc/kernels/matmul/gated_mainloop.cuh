// A main loop over both halves of a merged gate and up weight: tile n computes outputs n * H to (n + 1) * H of the
// gate, and then the same outputs of up, where H is half the width of the tile. One thread thus holds the gate and the
// up value of an output, whatever the width of the projections.
//
// CUTLASS loads a tile of the weight in one piece. Here two loads of half a tile fill the same shared memory: the
// weight is a tensor [outputs, features, 2] whose last stride leads from gate to up. The base keeps them in step.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "paced_mainloop.cuh"

namespace nm_act {
namespace sm90 {

template <class Base>
struct GatedMainloop : Base {
  using typename Base::DispatchPolicy;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::SmemLayoutB;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  using ClusterShape = typename DispatchPolicy::ClusterShape;
  using Arguments = typename Base::Arguments;

  static constexpr int kHalf = cute::size<1>(TileShape{}) / 2;
  using HalfTile = decltype(cute::make_shape(cute::get<0>(TileShape{}), cute::Int<kHalf>{}, cute::get<2>(TileShape{})));
  // A stage is two halves, one after the other.
  using SmemHalves = decltype(cute::tile_to_shape(
      typename Base::SmemLayoutAtomB{},
      cute::make_shape(cute::Int<kHalf>{}, cute::get<2>(TileShape{}), cute::Int<2 * DispatchPolicy::Stages>{}),
      cute::conditional_t<Base::is_B_mn_major, cute::Step<cute::_2, cute::_1, cute::_3>,
                          cute::Step<cute::_1, cute::_2, cute::_3>>{}));
  static_assert(SmemLayoutB{}(0, 0, 1) == SmemHalves{}(0, 0, 2) &&
                    SmemLayoutB{}(kHalf, 0, 0) == SmemHalves{}(0, 0, 1) &&
                    SmemLayoutB{}(kHalf + 3, 5, 1) == SmemHalves{}(3, 5, 3),
                "the halves of a stage lie one after the other");

  template <class Weight>
  static auto make_half_load(const Weight& weight) {
    return cute::make_tma_copy_B_sm90<typename Base::TmaInternalElementB>(
        typename Base::GmemTiledCopyB{}, weight, SmemHalves{}(cute::_, cute::_, cute::Int<0>{}), HalfTile{},
        ClusterShape{});
  }
  static auto weight_of(const typename Base::ElementB* data, int outputs, int features,
                        const typename Base::StrideB& stride) {
    return cute::make_tensor(cute::recast_ptr<typename Base::TmaInternalElementB>(data),
                             cute::make_layout(cute::make_shape(outputs, features, 2), stride));
  }

  struct Params : Base::Params {
    decltype(make_half_load(weight_of(nullptr, 0, 0, {}))) load_half;
  };

  // args.dB's last stride leads from gate to up; the problem's outputs are those of both.
  template <class Problem>
  static Params to_underlying_arguments(const Problem& problem, const Arguments& args, void* workspace) {
    const int outputs = cute::get<1>(problem) / 2;
    return {Base::to_underlying_arguments(problem, args, workspace),
            make_half_load(weight_of(args.ptr_B, outputs, cute::get<2>(problem), args.dB))};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.load_half.get_tma_descriptor());
  }

  template <class Problem>
  CUTLASS_DEVICE auto load_init(const Problem& problem, const Params& params) const {
    using namespace cute;
    const auto inputs = Base::load_init(problem, params);  // the kernel takes the number of tiles from these
    const auto weight = params.load_half.get_tma_tensor(make_shape(get<1>(problem) / 2, get<2>(problem), 2));
    return make_tuple(get<0>(inputs), get<1>(inputs), get<2>(inputs),
                      local_tile(weight, HalfTile{}, make_coord(_, _, _), Step<Underscore, _1, _1>{}));
  }

  template <class Inputs, class BlockCoord, class TileIterator>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState write, const Inputs& inputs,
                           const BlockCoord& block, TileIterator tile, int tiles, int, uint32_t block_rank_in_cluster,
                           TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const auto smem_b = make_tensor(make_smem_ptr(shared.smem_B.begin()), SmemHalves{});
    const auto halves = get<3>(inputs);
    const auto blocks = make_layout(ClusterShape{});
    const auto mine = blocks.get_flat_coord(block_rank_in_cluster);
    const uint16_t to_column = create_tma_multicast_mask<0>(blocks, mine);
    const auto copy_b = params.load_half.get_slice(get<0>(mine));
    const auto gate = copy_b.partition_S(halves(_, _, get<1>(block), _, 0));
    const auto up = copy_b.partition_S(halves(_, _, get<1>(block), _, 1));
    const auto stages_b = copy_b.partition_D(smem_b);
    const auto load_halves = [&](auto& barrier, int k_tile, int stage) {
      copy(params.load_half.with(barrier, to_column), gate(_, _, _, k_tile), stages_b(_, _, _, 2 * stage));
      copy(params.load_half.with(barrier, to_column), up(_, _, _, k_tile), stages_b(_, _, _, 2 * stage + 1));
    };
    Base::load_with(params, pipeline, write, inputs, block, tile, tiles, block_rank_in_cluster, shared, load_halves);
  }
};

}  // namespace sm90
}  // namespace nm_act
