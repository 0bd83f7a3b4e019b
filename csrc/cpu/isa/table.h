// The kernels that each instruction set provides for its table.
#pragma once

#include "cpu/kernels.h"

namespace nm_act::cpu::NM_ACT_ISA {

void prune(const PruneParams&, int64_t token_begin, int64_t token_end);
void gather(const GatherParams&, int64_t column_begin, int64_t column_end);
void dot(const DotParams&, int64_t row_begin, int64_t row_end);
void gemm(const GemmParams&, int64_t column_begin, int64_t column_end);
void epilogue(const EpilogueParams&, int64_t token_begin, int64_t token_end);

}  // namespace nm_act::cpu::NM_ACT_ISA
