// The epilogue over the finished product of a dense GEMM, in place.
#include "cpu/isa/epilogue.h"

#include "cpu/isa/table.h"

namespace nm_act::cpu::NM_ACT_ISA {
namespace {

template <class T>
void apply(const EpilogueParams& p, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    T* row = static_cast<T*>(p.y) + token * p.out_features;
    for (int64_t column = 0; column < p.out_features; ++column)
      row[column] = finish<T>(to_float(row[column]), p.epilogue, token, column);
  }
}

}  // namespace

void epilogue(const EpilogueParams& p, int64_t token_begin, int64_t token_end) {
  switch (p.dtype) {
    case DType::kFloat32: return apply<float>(p, token_begin, token_end);
    case DType::kBFloat16: return apply<BFloat16>(p, token_begin, token_end);
    case DType::kFloat16: return apply<Float16>(p, token_begin, token_end);
  }
}

}  // namespace nm_act::cpu::NM_ACT_ISA
