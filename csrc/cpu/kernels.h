// CPU kernels without torch: the whole surface between csrc/ops (tensors, threads) and csrc/cpu/isa (loops).
//
// Every kernel works on a half-open slice of its work, so that the caller decides about threads, and gives the same
// bits however the work is sliced. Sources under isa/ are compiled once per instruction set into a namespace of that
// name; cpu_kernels() picks the widest one that this processor has.
#pragma once

#include <cstdint>

#include "kernels/format/pattern.h"
#include "kernels/format/types.h"

namespace nm_act::cpu {

struct PruneParams {
  const void* x;               // [tokens, in_features], dtype
  void* out;                   // [tokens, in_features], dtype: the pruned operand, or null
  void* values;                // [tokens, in_features / 2], dtype: 2:4 survivors, or null
  uint8_t* metadata;           // [tokens, ceil(in_features / 8)]: their indices, null with values
  const float* channel_scale;  // [in_features] or null
  const float* shift;          // [in_features] or null
  float* eta;                  // [tokens]: the token shift that was used, or null; needs token_shift != kNone
  float* nu;                   // [tokens]: sqrt(Var(Z) / Var(P)), or null
  int64_t tokens;
  int64_t in_features;
  Pattern pattern;
  ElementType dtype;  // kFloat32, kBFloat16 or kFloat16
  TokenShift token_shift;
};

// y = (row_scale * acc + shift term) * column_scale + bias, where the shift term is eta[token] * shift_out[column]
// when eta is given and shift_out[column] otherwise. Null pointers leave their factor or term out.
struct Epilogue {
  const float* row_scale;     // [tokens] or null
  const float* eta;           // [tokens] or null
  const float* shift_out;     // [out_features] or null
  const float* column_scale;  // [out_features] or null
  const void* bias;           // [out_features], dtype, or null
};

struct GatherParams {
  const void* weight;         // row k of the weight stored [in, out] starts at weight + k * row_stride
  void* y;                    // [tokens, out_features], dtype
  const int64_t* rows;        // [num_rows]: the weight rows to read, ascending, num_rows a multiple of kGatherUnroll
  const float* coefficients;  // [num_rows / kGatherUnroll, tokens, kGatherUnroll]: what to multiply them by
  int64_t num_rows;
  int64_t tokens;  // 1 to kGatherTokens
  int64_t out_features;
  int64_t row_stride;  // elements
  ElementType dtype;   // kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

// Some columns of a finished product; all pointers but those of the epilogue begin at the first of them.
struct EpilogueParams {
  const float* product;  // [tokens, columns], a row every product_stride
  void* y;               // [tokens, columns], dtype, a row every y_stride
  int64_t product_stride;
  int64_t y_stride;
  int64_t column_begin;  // in the epilogue's vectors
  int64_t columns;
  ElementType dtype;  // kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

// Tokens that the gather kernel takes in one pass over the weight.
constexpr int kGatherTokens = 4;
// Slices of gather begin at multiples of this many columns: a cache line of the narrowest dtype.
constexpr int64_t kGatherColumns = 32;
// Weight rows taken together: one load and one store of the accumulators for so many multiply-adds.
constexpr int kGatherUnroll = 8;

struct CpuKernels {
  const char* name;
  void (*prune)(const PruneParams&, int64_t token_begin, int64_t token_end);
  void (*gather)(const GatherParams&, int64_t column_begin, int64_t column_end);
  void (*epilogue)(const EpilogueParams&, int64_t token_begin, int64_t token_end);
};

// The kernels in use: the widest set this processor runs, or the one named by the environment variable NM_ACT_CPU_ISA.
// Throws std::invalid_argument if that name is not compiled or not supported here.
const CpuKernels& cpu_kernels();

// Names of all compiled sets, widest first, separated by commas.
const char* compiled_isas();

}  // namespace nm_act::cpu
