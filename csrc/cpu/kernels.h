// The torch-free CPU kernels: the complete interface between csrc/ops (tensors, threads) and csrc/cpu/isa (loops).
//
// A kernel processes a half-open range of its work, so the caller decides on threads; the result is bitwise the same
// however the work is divided. Sources under isa/ are compiled once per instruction set, into a namespace of that name;
// cpu_kernels() returns the widest that this processor supports.
#pragma once

#include <cstdint>

#include "cpu/config.h"
#include "kernels/format/pattern.h"
#include "kernels/format/types.h"

namespace nm_act::cpu {

struct PruneParams {
  const void* x;               // [tokens, in_features], dtype
  void* out;                   // [tokens, in_features], dtype: the pruned operand, or null
  void* values;                // [tokens, in_features / 2], dtype: 2:4 survivors, or null
  uint8_t* metadata;           // [tokens, ceil(in_features / 8)]: their metadata; null if values is
  const float* channel_scale;  // [in_features] or null
  const float* shift;          // [in_features] or null
  float* eta;                  // [tokens]: receives the token shift, or null; needs token_shift != kNone
  float* nu;                   // [tokens]: sqrt(Var(Z) / Var(P)), or null
  int64_t tokens;
  int64_t in_features;
  Pattern pattern;
  ElementType dtype;  // kFloat32, kBFloat16 or kFloat16
  TokenShift token_shift;
};

// y = (row_scale * acc + shift term) * column_scale + bias, where the shift term is eta[token] * shift_out[column], or
// shift_out[column] without eta. A null pointer omits its factor or term.
struct Epilogue {
  const float* row_scale;     // [tokens] or null
  const float* eta;           // [tokens] or null
  const float* shift_out;     // [out_features] or null
  const float* column_scale;  // [out_features] or null
  const void* bias;           // [out_features], dtype, or null
};

struct GatherParams {
  const void* weight;         // [in, out]; row k starts at weight + k * row_stride
  void* y;                    // [tokens, out_features], dtype
  const int64_t* rows;        // [num_rows]: the weight rows to read, ascending, num_rows a multiple of kGatherUnroll
  const float* coefficients;  // [num_rows / kGatherUnroll, tokens, kGatherUnroll]: their multipliers
  int64_t num_rows;
  int64_t tokens;  // 1 to kGatherTokens
  int64_t out_features;
  int64_t row_stride;  // elements
  ElementType dtype;   // kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

struct DotParams {
  const void* weight;  // [out, in]; row o starts at weight + o * row_stride
  void* y;             // [tokens, out_features], dtype
  const float* x;      // [tokens, in_features]
  int64_t tokens;      // 1 to kGatherTokens
  int64_t out_features;
  int64_t in_features;
  int64_t row_stride;  // elements
  ElementType dtype;   // of weight and y: kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

struct GemmParams {
  const void* weight;  // [in, out]; row k starts at weight + k * row_stride
  void* y;             // [tokens, out_features], dtype
  const void* x;       // [tokens, in_features], float32; of dtype kBFloat16 with CpuKernels::multiplies_bfloat16, dtype
  int64_t tokens;
  int64_t out_features;
  int64_t in_features;  // even
  int64_t row_stride;   // elements
  ElementType dtype;    // of weight and y: kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

// A range of columns of a finished product. All pointers except the epilogue's point to the first of these columns.
struct EpilogueParams {
  const float* product;  // [tokens, columns], rows product_stride apart; null: y is the product
  void* y;               // [tokens, columns], dtype, rows y_stride apart
  int64_t product_stride;
  int64_t y_stride;
  int64_t column_begin;  // index of the first column in the epilogue's vectors
  int64_t columns;
  ElementType dtype;  // kFloat32, kBFloat16 or kFloat16
  Epilogue epilogue;
};

// Ranges of columns begin at multiples of this: a cache line of the narrowest dtype.
constexpr int64_t kGatherColumns = 32;
// Weight rows that are processed together, so that the accumulators are loaded and stored once for all of them.
constexpr int kGatherUnroll = 8;

// Columns that the gemm kernel sums together.
constexpr int64_t kGemmColumns = 48;

struct CpuKernels {
  const char* name;
  bool multiplies_bfloat16;  // in pairs, with sums in float32
  void (*prune)(const PruneParams&, int64_t token_begin, int64_t token_end);
  void (*gather)(const GatherParams&, int64_t column_begin, int64_t column_end);
  void (*dot)(const DotParams&, int64_t row_begin, int64_t row_end);
  void (*gemm)(const GemmParams&, int64_t column_begin, int64_t column_end);
  void (*epilogue)(const EpilogueParams&, int64_t token_begin, int64_t token_end);
};

// The kernels of the widest instruction set that this processor supports, or of the one that the environment variable
// NM_ACT_CPU_ISA names. Throws std::invalid_argument if that name is not compiled or not supported by this processor.
const CpuKernels& cpu_kernels();

// Whether this processor multiplies bfloat16 in tiles (AMX), which oneDNN uses and these kernels do not.
bool has_amx();

// Names of the compiled instruction sets, widest first, separated by commas.
const char* compiled_isas();

}  // namespace nm_act::cpu
