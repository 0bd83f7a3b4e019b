// What is implemented where, as data from which errors, tests, `nm-act info` and the table in docs/operators.md are
// made.
#pragma once

#include "kernels/matmul/config.h"

namespace nm_act {

static_assert(kSparseGemmTokens == 337 && kSparseGemmTokensInOut == 129 && kSparseGemmOutputsInOut == 6144 &&
                  kLiftedTokens == 1024 && kFewTokens == 4 && kMaxGatherTokens == 8,
              "the rows below name these numbers");

struct SupportRow {
  const char* op;
  const char* when;
  const char* device;
  const char* dtypes;
  const char* patterns;
  const char* how;
};

inline constexpr char kAllDtypes[] = "float32, bfloat16, float16";
inline constexpr char kBits16[] = "bfloat16, float16";
inline constexpr char kAllPatterns[] = "N:M, M in {2, 4, 8, 16, 32}; 2:4+1, 2:4+2";

inline constexpr SupportRow kSupport[] = {
    {"prune", "always", "cpu", kAllDtypes, kAllPatterns, "vectorised selection, one pass"},
    {"compress", "always", "cpu", kAllDtypes, "2:4", "vectorised selection, neutral format"},
    {"decompress", "always", "cpu", kAllDtypes, "2:4", "scatter"},
    {"sparse_linear", "1 to 4 tokens (float32: 8), weight stored [in, out]", "cpu", kAllDtypes, kAllPatterns,
     "reads only the weight rows of survivors"},
    {"sparse_linear", "otherwise", "cpu", kAllDtypes, kAllPatterns,
     "prune, then a dense GEMM: our own where it is faster, else torch's"},
    {"sparse_linear", "weight_scale given", "cpu, cuda sm_80+", "e4m3 or int8 weight", kAllPatterns,
     "as above, the gather kernel on CUDA; otherwise the weight is dequantised at every call"},
    {"sparse_linear_prepacked",
     "at most 4 tokens, weight stored [in, out], at most 90 % of its rows needed (float32: 80 %)", "cpu", kAllDtypes,
     kAllPatterns, "reads only the weight rows of survivors"},
    {"sparse_linear_prepacked", "otherwise", "cpu", kAllDtypes, kAllPatterns,
     "prune, then oneDNN's product with the prepacked weight"},
    {"gather_linear", "1 to 8 tokens, weight stored [in, out]", "cpu", kAllDtypes, "any zeros in the input",
     "reads only the weight rows of non-zero inputs"},
    {"dense_linear", "1 to 8 tokens, weight stored [out, in]", "cpu", kAllDtypes, "dense input",
     "reads the weight once, in order"},
    {"prune", "always", "cuda sm_80+", kAllDtypes, kAllPatterns, "selection kernel"},
    {"compress", "always", "cuda sm_80+", kAllDtypes, "2:4", "compression kernel, neutral format"},
    {"decompress", "always", "cuda sm_80+", kAllDtypes, "2:4", "plain torch operations"},
    {"compress_packed", "alone, or with RMSNorm or a gated activation before", "cuda sm_80+", kBits16, "2:4",
     "compression in the GEMM's layout; e4m3 values on sm_90"},
    {"compress_packed", "for sparse_gemm over a lifted weight", "cuda sm_80+", kBits16, "2:4+1",
     "selection and compression of the lifted operand in one kernel; e4m3 values on sm_90"},
    {"sparse_gemm", "always", "cuda sm_90", "bfloat16, float16, e4m3", "2:4", "sparse tensor cores (wgmma.sp)"},
    {"sparse_gemm", "always", "cuda sm_80+", kBits16, "2:4",
     "sparse tensor cores (mma.sp); speed on Ampere not measured"},
    {"sparse_gemm_silu_mul", "weight stored [in, out]", "cuda sm_90", kBits16, "2:4",
     "the gated activation and its 2:4 packing in the epilogue of sparse_gemm"},
    {"sparse_linear", "1 to 4 tokens, weight stored [in, out], at most 95 % of its rows needed", "cuda sm_80+",
     "bfloat16, float16 x; weight of x's dtype, e4m3 or int8", kAllPatterns,
     "gather kernel: reads only the weight rows of survivors; slices in clusters on sm_90"},
    {"sparse_linear", "2:4, 337 tokens and more; weight stored [in, out] of 6144 outputs and more, 129", "cuda sm_90",
     kBits16, "2:4", "compress_packed and sparse_gemm"},
    {"sparse_linear", "lifted_weight given, 1024 tokens and more", "cuda sm_90", kBits16, "2:4+1",
     "compress_packed and sparse_gemm over the lifted weight"},
    {"sparse_linear", "otherwise", "cuda sm_80+", kAllDtypes, kAllPatterns, "selection kernel, then cuBLAS"},
    {"sparse_linear", "activation_dtype float8_e4m3fn", "cuda sm_90", "bfloat16, float16 x; e4m3 weight", "2:4",
     "compress_packed in e4m3, then sparse_gemm"},
    {"gather_linear", "1 to 8 tokens, weight stored [in, out]", "cuda sm_80+", kBits16, "any zeros in the input",
     "reads only the weight rows of non-zero inputs; float32: plain torch operations"},
};

}  // namespace nm_act
