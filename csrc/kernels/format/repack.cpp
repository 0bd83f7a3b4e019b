// Converts 2:4 metadata between the neutral format and a GEMM's layout, nibble by nibble, on the host: the readable
// form of what the compression kernels do directly, for tests and for data that is packed once.
#include <cstring>

#include "../nm_act.h"

namespace nm_act {

void pack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* neutral,
                   uint8_t* physical) {
  const int64_t bytes = metadata_bytes(layout, tokens, in_features);
  if (bytes == 0) return;
  if (layout == MetadataLayout::kNeutral) {
    std::memcpy(physical, neutral, static_cast<size_t>(bytes));
    return;
  }
  std::memset(physical, kPaddingNibble | kPaddingNibble << 4, static_cast<size_t>(bytes));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t group = 0; group < in_features / 4; ++group) {
      const NibbleAddress from = metadata_address(MetadataLayout::kNeutral, tokens, in_features, token, group);
      const NibbleAddress to = metadata_address(layout, tokens, in_features, token, group);
      const int nibble = neutral[from.byte] >> from.shift & 0xF;
      physical[to.byte] = static_cast<uint8_t>((physical[to.byte] & ~(0xF << to.shift)) | nibble << to.shift);
    }
  }
}

void unpack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* physical,
                     uint8_t* neutral) {
  const int64_t bytes = metadata_bytes(MetadataLayout::kNeutral, tokens, in_features);
  if (bytes == 0) return;
  std::memset(neutral, 0, static_cast<size_t>(bytes));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t group = 0; group < in_features / 4; ++group) {
      const NibbleAddress from = metadata_address(layout, tokens, in_features, token, group);
      const NibbleAddress to = metadata_address(MetadataLayout::kNeutral, tokens, in_features, token, group);
      const int nibble = physical[from.byte] >> from.shift & 0xF;
      neutral[to.byte] = static_cast<uint8_t>(neutral[to.byte] | nibble << to.shift);
    }
  }
}

}  // namespace nm_act
