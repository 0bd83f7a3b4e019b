// The epilogue of an e4m3 layer, stored from registers: each of two warp groups stores its own 64 tokens of a tile and
// waits for no other.
//
//   y = column_scale * (row_scale * acc + eta (x) shift_out) + bias
//
// The vectors' parts for a tile are copied to shared memory, in direct_kernel.cuh while its main loop runs. The
// accumulators give each thread, for two tokens 8 apart, two adjacent outputs of every 8. Four lanes exchange their words
// so that each holds 8 adjacent outputs, 16 bytes; together they store whole sectors.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>

#include "../prune/element.cuh"
#include "register_epilogue.cuh"

namespace nm_act {
namespace sm90 {

template <class E>
struct DirectEpilogueArguments {
  typename E::Raw* y;  // [tokens, outputs], rows y_stride elements apart
  int64_t y_stride;
  const typename E::Raw* bias;
  const float* row_scale;
  const float* column_scale;
  const float* eta;
  const float* shift_out;
};

// E: element of y. kShifted: whether there are eta and shift_out. Null vectors stand for ones (a factor) or zeros (a
// term).
template <class E, class CutlassOutput, class Tile, bool kShifted>
struct DirectEpilogueOp : RegisterEpilogue<CutlassOutput, DirectEpilogueArguments<E>> {
  using Base = RegisterEpilogue<CutlassOutput, DirectEpilogueArguments<E>>;
  using Base::Base;
  using Base::params;
  using Raw = typename E::Raw;
  static constexpr int kTileTokens = cute::size<0>(Tile{}), kTileOutputs = cute::size<1>(Tile{});
  static constexpr int kWarpGroups = 2;
  static constexpr int kGroup = 32;  // outputs that four lanes hold, eight each
  static_assert(kTileTokens == 64 * kWarpGroups && kTileOutputs % kGroup == 0);
  static_assert(kTileOutputs <= 4 * 128, "a thread copies four outputs' vectors");

  // The parts of the vectors that a warp group needs for a tile.
  struct Vectors {
    alignas(16) Raw bias[kTileOutputs];
    alignas(16) float column_scale[kTileOutputs];
    alignas(16) float shift_out[kShifted ? kTileOutputs : 4];
    alignas(16) float row_scale[64];
    alignas(16) float eta[kShifted ? 64 : 4];
  };
  struct SharedStorage {
    Vectors vectors[kWarpGroups][2];  // of this tile and of the next
  };
  // Starts the copies of the vectors' parts for a warp group's tokens and outputs. thread: in the warp group.
  CUTLASS_DEVICE void prefetch(int tokens, int outputs, int first_token, int first_output, Vectors& to,
                               int thread) const {
    const int token = first_token + thread, output = first_output + thread * 4, chunk = first_output + thread * kChunk;
    if (params.bias != nullptr && thread * kChunk < kTileOutputs && chunk < outputs) {
      copy_async<16>(to.bias + thread * kChunk, params.bias + chunk);
    }
    if (thread * 4 < kTileOutputs && output < outputs) {
      copy_or_fill<16>(to.column_scale + thread * 4, params.column_scale, output, 1.0f);
      if (kShifted) copy_or_fill<16>(to.shift_out + thread * 4, params.shift_out, output, 0.0f);
    }
    if (thread < 64 && token < tokens) {
      copy_or_fill<4>(to.row_scale + thread, params.row_scale, token, 1.0f);
      if (kShifted) copy_or_fill<4>(to.eta + thread, params.eta, token, 1.0f);
    }
  }

  // Waits for the vectors and stores the tile. barrier: of the warp group.
  template <class Accumulators>
  CUTLASS_DEVICE void store_tile(int tokens, int outputs, int first_token, int first_output, const Vectors& vectors,
                                 const Accumulators& accumulators, int thread, int barrier) const {
    static_assert(cute::size(Accumulators{}) == kTileOutputs / 2);
    asm volatile("cp.async.wait_all;" ::: "memory");
    cutlass::arch::NamedBarrier::sync(128, barrier);
    const int lane = thread % 4, first_row = thread / 32 * 16 + thread % 32 / 4;
    Token rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = {vectors.row_scale[first_row + 8 * half], kShifted ? vectors.eta[first_row + 8 * half] : 0};
    }
#pragma unroll
    for (int group = 0; group < kTileOutputs / kGroup; ++group) {
      uint32_t word[2][4];
#pragma unroll
      for (int chunk = 0; chunk < 4; ++chunk) {
        const Outputs pair = outputs_at(vectors, group * kGroup + chunk * kChunk + lane * 2);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = (group * 4 + chunk) * 4 + half * 2;
          word[half][chunk] = finish(accumulators(i), accumulators(i + 1), rows[half], pair);
        }
      }
      const int output = first_output + group * kGroup + lane * kChunk;  // of the chunk that this lane stores
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_token + first_row + 8 * half;
        transpose_quad(word[half], lane);
        if (token < tokens && output < outputs) {
          *reinterpret_cast<uint4*>(params.y + token * params.y_stride + output) =
              make_uint4(word[half][0], word[half][1], word[half][2], word[half][3]);
        }
      }
    }
  }

  // For CUTLASS's kernels.
  template <class Problem, class CtaTile, class Coord, class Accumulators, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(const Problem& problem, CtaTile, const Coord& coord, const Accumulators& accumulators,
                                 Mma, Residue, int thread, char* memory) const {
    const int tokens = cute::get<0>(problem), outputs = cute::get<1>(problem), group = thread / 128;
    const int token = cute::get<0>(coord) * kTileTokens + group * 64, output = cute::get<1>(coord) * kTileOutputs;
    Vectors& vectors = reinterpret_cast<SharedStorage*>(memory)->vectors[group][0];
    cutlass::arch::NamedBarrier::sync(128, group);  // the last tile's were read
    prefetch(tokens, outputs, token, output, vectors, thread % 128);
    store_tile(tokens, outputs, token, output, vectors, accumulators, thread % 128, group);
  }

 private:
  struct Token {
    float row_scale, eta;
  };
  struct Outputs {  // of two adjacent outputs
    float2 column_scale, shift, bias;
  };

  CUTLASS_DEVICE Outputs outputs_at(const Vectors& vectors, int output) const {
    Outputs pair{*reinterpret_cast<const float2*>(vectors.column_scale + output), make_float2(0, 0), make_float2(0, 0)};
    if constexpr (kShifted) pair.shift = *reinterpret_cast<const float2*>(vectors.shift_out + output);
    if (params.bias != nullptr) {
      const uint32_t bias = *reinterpret_cast<const uint32_t*>(vectors.bias + output);
      pair.bias = make_float2(E::low(bias), E::high(bias));
    }
    return pair;
  }

  // Two adjacent outputs of one token.
  static CUTLASS_DEVICE uint32_t finish(float first, float second, const Token& token, const Outputs& outputs) {
    float2 inner = make_float2(token.row_scale * first, token.row_scale * second);
    if constexpr (kShifted) {
      inner = make_float2(fmaf(token.row_scale, first, token.eta * outputs.shift.x),
                          fmaf(token.row_scale, second, token.eta * outputs.shift.y));
    }
    return E::pack(fmaf(outputs.column_scale.x, inner.x, outputs.bias.x),
                   fmaf(outputs.column_scale.y, inner.y, outputs.bias.y));
  }

  template <int kBytes>
  static CUTLASS_DEVICE void copy_async(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(cute::cast_smem_ptr_to_uint(to)), "l"(from),
                 "n"(kBytes)
                 : "memory");
  }

  template <int kBytes>
  static CUTLASS_DEVICE void copy_or_fill(float* to, const float* vector, int at, float fill) {
    if (vector != nullptr) {
      copy_async<kBytes>(to, vector + at);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) to[i] = fill;
    }
  }
};

template <class E, class CutlassOutput, class Tile, bool kShifted>
using DirectEpilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
    DirectEpilogueOp<E, CutlassOutput, Tile, kShifted>>;

}  // namespace sm90
}  // namespace nm_act
