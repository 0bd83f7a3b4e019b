// Features for the producers (norms and gated activations before a selection), and the check of what they prune.
#pragma once

#include "operands.h"

namespace operands {

inline bool is_ambiguous(double value, ElementType type, double tolerance = 0x1p-20) {
  return std::isfinite(value) && encode(value * (1 - tolerance), type) != encode(value * (1 + tolerance), type);
}

inline MetadataLayout layout_of(ElementType value_type, int step) {
  const MetadataLayout layouts[] = {MetadataLayout::kSm80Bits16, MetadataLayout::kSm90Bits16T64,
                                    MetadataLayout::kNeutral};
  return value_type == kFp8 ? MetadataLayout::kSm90Bits8 : layouts[step % 3];
}

// Random, ties, -0.0, zero and, if wanted, non-finite rows.
inline uint32_t draw_feature(int64_t row, int feature, int in_features, ElementType type, bool finite) {
  switch (row % 6) {
    case 1: return encode(std::round(2 * uniform()), type);
    case 2: return feature % 3 == 0 ? 0x8000 : encode(normal(), type);
    case 3: return 0;
    case 4:
      if (!finite && feature == in_features / 3) return format_of(type).nan;
      break;
    case 5:
      if (!finite && feature % 7 == 3) return format_of(type).infinity | (feature % 2 == 0 ? 0x8000 : 0);
      break;
    default: break;
  }
  return encode(normal(), type);
}

// Pruned as a dense tensor, in the type of the input: `expected` gives a token's features before the selection.
template <class Launch, class Expected>
void verify_pruned(int64_t tokens, int in_features, ElementType type, const Launch& launch, const Expected& expected) {
  const std::string before = current;
  for (const Pattern& pattern :
       {Pattern{1, 2, {}}, Pattern{3, 4, {}}, Pattern{5, 8, {}}, Pattern{8, 16, {}}, Pattern{24, 32, {}}}) {
    if (in_features % pattern.group != 0) continue;
    current = before + ", pruned to " + name_of(pattern);
    const Buffer out(size_t(tokens) * in_features * bytes_of(type), 0);
    check(launch(PruneOutput{out.data(), nullptr, pattern, type}) == cudaSuccess, "launch");
    size_t wrong = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<uint32_t> features = expected(t);
      std::vector<float> z;
      for (uint32_t bits : features) z.push_back(decode(bits, type));
      const std::vector<bool> kept = survivors_of(z, pattern, nullptr);
      for (int k = 0; k < in_features; ++k) {
        wrong += !same_bits(out.get(t * in_features + k, bytes_of(type)), kept[k] ? features[k] : 0, type, true);
      }
    }
    check(wrong == 0, std::to_string(wrong) + " features");
    check(out.guards_are_intact(), "nothing beside the values");
  }
  current = before;
}

}  // namespace operands
