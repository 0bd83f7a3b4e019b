// The whole surface of the torch-free kernel library. Callers check shapes and pointers; nothing here allocates or
// synchronises.
#pragma once

#include <cstdint>

#include "format/metadata.h"
#include "format/pattern.h"

namespace nm_act {

// Host functions, any compiler. in_features must be a multiple of 4.

// neutral [tokens, ceil(in_features / 8)] -> physical [metadata_bytes(layout, tokens, in_features)]. Every byte of
// `physical` is written; nibbles of padding tokens and features become kPaddingNibble.
void pack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* neutral,
                   uint8_t* physical);

// The inverse; the unused high nibble that ends a row when in_features % 8 == 4 becomes 0, as nm_act::compress writes
// it.
void unpack_metadata(MetadataLayout layout, int64_t tokens, int64_t in_features, const uint8_t* physical,
                     uint8_t* neutral);

}  // namespace nm_act
