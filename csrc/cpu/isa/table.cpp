// Table of the kernels compiled for this instruction set.
#include "cpu/isa/table.h"

#define NM_ACT_STRING(text) #text
#define NM_ACT_NAME(isa) NM_ACT_STRING(isa)

namespace nm_act::cpu::NM_ACT_ISA {

extern const CpuKernels kKernels;
#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif
const CpuKernels kKernels = {NM_ACT_NAME(NM_ACT_ISA), kMultipliesBFloat16, prune, gather, dot, gemm, epilogue};

}  // namespace nm_act::cpu::NM_ACT_ISA
