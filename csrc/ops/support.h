// What is implemented where, as data: errors, tests, `nm-act info` and the README's table all come from these rows.
#pragma once

namespace nm_act {

struct SupportRow {
  const char* op;
  const char* device;
  const char* dtypes;
  const char* patterns;
  const char* how;
};

inline constexpr char kAllDtypes[] = "float32, bfloat16, float16";
inline constexpr char kAllPatterns[] = "N:M, M in {2, 4, 8, 16, 32}";
inline constexpr char kComposite[] = "plain torch operations: correct, no faster than dense";

inline constexpr SupportRow kSupport[] = {
    {"prune", "cpu", kAllDtypes, kAllPatterns, "vectorised selection, one pass"},
    {"prune", "cuda", kAllDtypes, kAllPatterns, kComposite},
    {"compress, decompress", "cpu", kAllDtypes, "2:4", "vectorised selection, neutral format"},
    {"compress, decompress", "cuda", kAllDtypes, "2:4", kComposite},
    {"sparse_linear, 1 to 8 tokens, weight stored [in, out]", "cpu", kAllDtypes, kAllPatterns,
     "reads only the weight rows of survivors"},
    {"sparse_linear, otherwise", "cpu", kAllDtypes, kAllPatterns, "prune, then torch's dense GEMM"},
    {"sparse_linear", "cuda", kAllDtypes, kAllPatterns, kComposite},
    {"gather_linear, 1 to 8 tokens, weight stored [in, out]", "cpu", kAllDtypes, "any zeros in the input",
     "reads only the weight rows of non-zero inputs"},
};

}  // namespace nm_act
