// The epilogue of a product with a merged gate and up weight: z = activation(gate) * up, stored as the packed 2:4
// operand of the next product. Neither gate and up nor z reach memory.
//
// The accumulators of a warp group's 64 x 2H tile (gated_mainloop.cuh) give each thread, for two tokens 8 apart, two
// adjacent outputs of every 8: first of gate, then of up. Four lanes exchange their words so that each holds 8 adjacent
// outputs of z, the chunk that the compression kernels work on. Values are rounded at the same points as in the
// separate kernels, and the selection is the same, so the results are bit for bit equal.
#pragma once

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>

#include "../prune/activations.cuh"
#include "../prune/compress.cuh"
#include "register_epilogue.cuh"

namespace nm_act {
namespace sm90 {

template <class E>
struct GatedEpilogueArguments {
  typename E::Raw* values;  // [tokens, outputs / 2]
  uint8_t* metadata;
  Activation activation;
};

// E: element of z. kHalf: outputs of a tile, in each of gate and up.
template <class E, class CutlassOutput, int kTileTokens, int kHalf>
struct GatedEpilogueOp : RegisterEpilogue<CutlassOutput, GatedEpilogueArguments<E>> {
  using Base = RegisterEpilogue<CutlassOutput, GatedEpilogueArguments<E>>;
  using Base::Base;
  using Base::params;
  struct SharedStorage {};

  template <class Problem, class Tile, class Coord, class Accumulators, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Problem& problem, Tile, const Coord& coord, const Accumulators& accumulators,
                                 Mma, Residue, int thread, char*) const {
    // A branch here, not at every output: the rest of the device is idle meanwhile.
    if (params.activation == Activation::kGeluTanh) {
      store_tile<Activation::kGeluTanh>(problem, coord, accumulators, thread);
    } else {
      store_tile<Activation::kSilu>(problem, coord, accumulators, thread);
    }
  }

  template <Activation kActivation, class Problem, class Coord, class Accumulators>
  CUTLASS_DEVICE void store_tile(const Problem& problem, const Coord& coord, const Accumulators& accumulators,
                                 int thread) const {
    static_assert(kTileTokens == 128 && cute::size(Accumulators{}) == kHalf, "a warp group has 64 tokens");
    constexpr int kGroup = 32;  // outputs that four lanes hold, eight each
    const int lane = thread % 4;
    const int tokens = cute::get<0>(problem), outputs = cute::get<1>(problem) / 2;
    const int token = cute::get<0>(coord) * kTileTokens + thread / 32 * 16 + thread % 32 / 4;  // and 8 tokens on
    const int first = cute::get<1>(coord) * kHalf;
    uint32_t bytes[2];  // metadata of two groups: the first token's in byte 0, the second's in byte 2
#pragma unroll
    for (int group = 0; group < kHalf / kGroup; ++group) {
      uint32_t word[2][4];
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t half[2];
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const int i = part * (kHalf / 2) + (group * 4 + chunk) * 4 + row * 2;
            half[part] = E::pack(accumulators(i), accumulators(i + 1));
          }
          // Padding tokens are zeros: their selection is the padding of the metadata.
          word[row][chunk] = token + 8 * row < tokens ? activated_times<E>(half[0], half[1], kActivation) : 0u;
        }
      }
      const int output = first + group * kGroup + lane * kChunk;
      bytes[group % 2] = 0;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        transpose_quad(word[row], lane);
        const bool stored = token + 8 * row < tokens && output < outputs;
        const int64_t at = int64_t{token + 8 * row} * outputs + output;
        const Chunk<E> z{{word[row][0], word[row][1], word[row][2], word[row][3]}};
        uint32_t mask[2];
        chunk_survivors<E, false>(z, {}, mask);
        const Kept<E> kept = keep_survivors(z, mask[0], mask[1]);
        if (stored) store_values<E, true>(params.values + at / 2, kept, kChunk);
        bytes[group % 2] |= kept.metadata << 16 * row;
      }
      if (group % 2 == 1) store_metadata(bytes, token, tokens, output, outputs, lane);
    }
  }

  // A pair of lanes has the metadata of 16 outputs, of two tokens, in each of the two groups of a metadata tile: two
  // adjacent words of the layout. One lane stores the first group's, the other the second's.
  CUTLASS_DEVICE void store_metadata(const uint32_t (&bytes)[2], int token, int tokens, int output, int outputs,
                                     int lane) const {
    constexpr MetadataLayout kLayout = MetadataLayout::kSm90Bits16T64;  // a metadata tile is two groups
    const bool second = lane % 2;
    const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, second ? bytes[0] : bytes[1], 1);
    const uint32_t word = second ? received | bytes[1] << 8 : bytes[0] | received << 8;
    const int tile = output / 64 * 64;
    if (token >= metadata_padded_tokens(kLayout, tokens) || tile >= metadata_padded_features(kLayout, outputs)) return;
    const int64_t byte = metadata_address(kLayout, tokens, outputs, token, tile / 4 + lane / 2 * 4).byte;
    *reinterpret_cast<uint32_t*>(params.metadata + byte + (second ? 4 : 0)) = word;
  }
};

template <class E, class CutlassOutput, int kTileTokens, int kHalf>
using GatedEpilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
    GatedEpilogueOp<E, CutlassOutput, kTileTokens, kHalf>>;

}  // namespace sm90
}  // namespace nm_act
