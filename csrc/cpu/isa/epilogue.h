// y = (row_scale * acc + shift term) * column_scale + bias, rounded once to the output's dtype.
#pragma once

#include "cpu/isa/simd.h"
#include "cpu/kernels.h"

namespace nm_act::cpu::NM_ACT_ISA {

template <class T>
inline T finish(float acc, const Epilogue& e, int64_t token, int64_t column) {
  float y = e.row_scale != nullptr ? acc * e.row_scale[token] : acc;
  if (e.shift_out != nullptr) y += e.eta != nullptr ? e.eta[token] * e.shift_out[column] : e.shift_out[column];
  if (e.column_scale != nullptr) y *= e.column_scale[column];
  if (e.bias != nullptr) y += to_float(static_cast<const T*>(e.bias)[column]);
  return from_float<T>(y);
}

}  // namespace nm_act::cpu::NM_ACT_ISA
