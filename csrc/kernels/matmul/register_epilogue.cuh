// What epilogues that store from registers share (direct_epilogue.cuh, gated_epilogue.cuh): the exchange among the four
// lanes that hold a row of a wgmma accumulator, and what CUTLASS's kernel and adapter ask of any epilogue.
#pragma once

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>

#include <cstdint>

namespace nm_act {
namespace sm90 {

// The words of four lanes as a 4 x 4 matrix, transposed: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, upper ? word[i] : word[i | bit], bit);
      if (upper) {
        word[i] = received;
      } else {
        word[i | bit] = received;
      }
    }
  }
}

template <class CutlassOutput, class EpilogueArguments>
struct RegisterEpilogue {
  struct ThreadEpilogueOp {
    using ElementAccumulator = float;
    using ElementOutput = CutlassOutput;
  };
  using ElementC = CutlassOutput;
  using ElementD = CutlassOutput;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using Arguments = EpilogueArguments;
  using Params = Arguments;

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  Params params;
  CUTLASS_HOST_DEVICE explicit RegisterEpilogue(const Params& params) : params(params) {}
};

}  // namespace sm90
}  // namespace nm_act
