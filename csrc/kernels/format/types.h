// Types that the kernels and operators of all devices share.
#pragma once

namespace nm_act {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kE4M3 = 3, kInt8 = 4 };
enum class TokenShift : int { kNone = 0, kMean = 1, kMedian = 2 };
enum class Activation : int { kSilu = 0, kGeluTanh = 1 };  // of the gate of a gated MLP

}  // namespace nm_act
