// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace nm_act::cpu {

#define NM_ACT_DECLARE(isa)         \
  namespace isa {                   \
  extern const CpuKernels kKernels; \
  }
#ifdef NM_ACT_X86
NM_ACT_DECLARE(avx512_bf16)
NM_ACT_DECLARE(avx512)
NM_ACT_DECLARE(avx2)
#endif
NM_ACT_DECLARE(generic)
#undef NM_ACT_DECLARE

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool supported;
};

const CpuKernels& choose() {
#ifdef NM_ACT_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const Candidate candidates[] = {
#ifdef NM_ACT_X86
      {&avx512_bf16::kKernels, avx512 && __builtin_cpu_supports("avx512bf16")},
      {&avx512::kKernels, avx512},
      {&avx2::kKernels, avx2},
#endif
      {&generic::kKernels, true},
  };
  const char* wanted = std::getenv("NM_ACT_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (wanted != nullptr && std::string(wanted) != candidate.kernels->name) continue;
    if (candidate.supported) return *candidate.kernels;
    if (wanted != nullptr) break;
  }
  throw std::invalid_argument(std::string("expected NM_ACT_CPU_ISA to name one of ") + compiled_isas() +
                              " that this processor supports, got '" + wanted + "'; unset it to let nm_act choose");
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

bool has_amx() {
#ifdef NM_ACT_X86
  static const bool found = (__builtin_cpu_init(), __builtin_cpu_supports("amx-bf16") != 0);
  return found;
#else
  return false;
#endif
}

const char* compiled_isas() {
#ifdef NM_ACT_X86
  return "avx512_bf16,avx512,avx2,generic";
#else
  return "generic";
#endif
}

}  // namespace nm_act::cpu
