// Compares csrc/kernels/format/metadata.h with CUTLASS, offset by offset: the sm90 layouts with the CuTe layout that
// the sparse CollectiveBuilder derives from the GEMM's own type, the sm80 one with cutlass::reorder_meta; the words
// that wgmma.sp takes from a tile with CuTe's own layout of that operand. Also checks that every layout is a bijection
// onto its buffer and that pack_metadata / unpack_metadata round trip over poisoned memory. Prints "N checks, 0
// failed"; exits 1 on a mismatch.
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cute/atom/mma_traits_sm90_gmma_sparse.hpp"
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/util/host_reorder.h"
#if defined(__CUDACC__)
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#endif
#include "kernels/nm_act.h"

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;

void check(bool ok, const char* what, MetadataLayout layout, int64_t tokens, int64_t in_features, int64_t token,
           int64_t group) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) {
    std::printf("FAILED %s: layout %d, tokens %lld, in_features %lld, token %lld, group %lld\n", what,
                static_cast<int>(layout), static_cast<long long>(tokens), static_cast<long long>(in_features),
                static_cast<long long>(token), static_cast<long long>(group));
  }
}

const int kTokens[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 200, 257};
const int kFeatures[] = {32, 64, 96, 128, 160, 192, 256, 288, 320, 384, 416, 512, 1024, 1056};

// The metadata configuration of a GEMM with this element type and TileK. nvcc derives it from the collective that the
// GEMM itself is built of; a plain C++ compiler, which cannot instantiate that, spells the same configuration out.
#if defined(__CUDACC__)
template <class Element, int kTileK>
struct Sm90Gemm {
  using Tile = cute::Shape<cute::_128, cute::_128, cute::Int<kTileK>>;
  using Schedule =
      std::conditional_t<sizeof(Element) == 1, cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                         cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      32 / sizeof(Element), Element, cutlass::layout::ColumnMajor, 16 / sizeof(Element), float, Tile,
      cute::Shape<cute::_1, cute::_1, cute::_1>, cute::Int<2>, Schedule>::CollectiveOp;
  using SparseConfig = typename Mainloop::SparseConfig;
};
#else
template <class Element, int kTileK>
struct Sm90Gemm {
  using SparseConfig =
      cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, cute::GMMA::Major::K, cute::sparse_elem<8, uint8_t>,
                                    cute::Int<(kTileK < 128 ? kTileK : 128)>>;
};
#endif

template <class Element, int kTileK>
void check_sm90(MetadataLayout layout) {
  using Config = typename Sm90Gemm<Element, kTileK>::SparseConfig;
  for (int tokens : kTokens) {
    for (int in_features : kFeatures) {
      const auto expected = Config::fill_layoutE(cute::make_tuple(tokens, 128, in_features, 1));
      check(cute::cosize(expected) == metadata_bytes(layout, tokens, in_features) * 8, "size", layout, tokens,
            in_features, 0, 0);
      for (int token = 0; token < tokens; ++token) {
        for (int group = 0; group < in_features / 4; ++group) {
          const int64_t offset = expected(token, group * 4, 0);
          const NibbleAddress ours = metadata_address(layout, tokens, in_features, token, group);
          check(ours.byte == offset / 8 && ours.shift == offset % 8, "offset", layout, tokens, in_features, token,
                group);
        }
      }
    }
  }
}

// The words that a thread gives to wgmma.sp, feature by feature: CuTe says which (token, feature) each bit is of, the
// layout above where that lies.
template <class Layout, int kStepFeatures>
void check_wgmma(MetadataLayout layout) {
  const int tile = static_cast<int>(metadata_tile_features(layout));
  for (int thread = 0; thread < 128; ++thread) {
    for (int step = 0; step < tile / kStepFeatures; ++step) {
      for (int bit = 0; bit < 32; ++bit) {
        const int place = Layout{}(thread, bit), token = place % 64, feature = place / 64 + step * kStepFeatures;
        const NibbleAddress at = metadata_address(layout, 64, tile, token, feature / 4);
        const bool same = at.byte * 8 + at.shift + feature % 4 == wgmma_metadata_byte(layout, thread, step) * 8 + bit;
        check(same, "word of a thread", layout, 64, tile, token, feature / 4);
      }
    }
  }
}

void check_sm80() {
  const MetadataLayout layout = MetadataLayout::kSm80Bits16;
  for (int tokens : kTokens) {
    for (int in_features : kFeatures) {
      const int rows = static_cast<int>(metadata_padded_tokens(layout, tokens));
      const int words = static_cast<int>(metadata_padded_features(layout, in_features) / 16);
      check(metadata_bytes(layout, tokens, in_features) == int64_t{2} * rows * words, "size", layout, tokens,
            in_features, 0, 0);
      // Each word holds its own place, so that the reordered buffer tells where CUTLASS put it.
      std::vector<uint16_t> source(rows * words), reordered(rows * words);
      std::vector<int64_t> place(rows * words);
      cutlass::TensorRef<uint16_t, cutlass::layout::RowMajor> source_ref(source.data(), words);
      const cutlass::layout::ColumnMajorInterleaved<2> packed =
          cutlass::layout::ColumnMajorInterleaved<2>::packed({rows, words});
      cutlass::TensorRef<uint16_t, cutlass::layout::ColumnMajorInterleaved<2>> reordered_ref(reordered.data(), packed);
      for (int half = 0; half < 2; ++half) {  // a place needs 32 bits, a word has 16
        for (int i = 0; i < rows * words; ++i) source[i] = static_cast<uint16_t>(i >> 16 * half);
        cutlass::reorder_meta(reordered_ref, source_ref, {rows, 0, words});
        for (int i = 0; i < rows * words; ++i) {
          if (half == 0)
            place[i] = reordered[i];
          else
            place[i] |= int64_t{reordered[i]} << 16;
        }
      }
      std::vector<int64_t> word_of(rows * words, -1);
      for (int i = 0; i < rows * words; ++i) word_of[place[i]] = i;
      for (int token = 0; token < tokens; ++token) {
        for (int group = 0; group < in_features / 4; ++group) {
          const int64_t byte = word_of[token * words + group / 4] * 2 + group % 4 / 2;
          const NibbleAddress ours = metadata_address(layout, tokens, in_features, token, group);
          check(ours.byte == byte && ours.shift == group % 2 * 4, "offset", layout, tokens, in_features, token, group);
        }
      }
    }
  }
}

// Every (padded token, padded group) has its own nibble inside the buffer.
void check_bijection(MetadataLayout layout) {
  for (int tokens : {1, 33, 64, 129}) {
    for (int in_features : {32, 96, 256, 416}) {
      const int64_t bytes = metadata_bytes(layout, tokens, in_features);
      const int64_t rows = metadata_padded_tokens(layout, tokens);
      const int64_t groups = metadata_padded_features(layout, in_features) / 4;
      std::vector<int> hits(bytes * 2, 0);
      for (int64_t token = 0; token < rows; ++token) {
        for (int64_t group = 0; group < groups; ++group) {
          const NibbleAddress at = metadata_address(layout, tokens, in_features, token, group);
          const bool inside = at.byte >= 0 && at.byte < bytes && (at.shift == 0 || at.shift == 4);
          check(inside && hits[at.byte * 2 + at.shift / 4]++ == 0, "bijection", layout, tokens, in_features, token,
                group);
        }
      }
      check(rows * groups == bytes * 2, "buffer size", layout, tokens, in_features, 0, 0);
    }
  }
}

void check_round_trip(MetadataLayout layout) {
  const uint8_t legal[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
  uint32_t state = 12345;
  for (int tokens : kTokens) {
    for (int in_features : {4, 8, 12, 16, 32, 48, 100, 128, 144, 272, 512}) {
      const int64_t row = (in_features + 7) / 8;
      std::vector<uint8_t> neutral(tokens * row, 0), back(tokens * row, 0xEE);
      for (int64_t token = 0; token < tokens; ++token) {
        for (int group = 0; group < in_features / 4; ++group) {
          state = state * 1664525u + 1013904223u;
          neutral[token * row + group / 2] |= static_cast<uint8_t>(legal[(state >> 16) % 6] << group % 2 * 4);
        }
      }
      const int64_t bytes = metadata_bytes(layout, tokens, in_features);
      std::vector<uint8_t> physical(bytes + 16, 0xEE);
      pack_metadata(layout, tokens, in_features, neutral.data(), physical.data());
      unpack_metadata(layout, tokens, in_features, physical.data(), back.data());
      check(neutral == back, "round trip", layout, tokens, in_features, 0, 0);
      bool untouched = true;
      for (int i = 0; i < 16; ++i) untouched &= physical[bytes + i] == 0xEE;
      check(untouched, "write past the end", layout, tokens, in_features, 0, 0);
      if (layout == MetadataLayout::kNeutral) continue;
      bool all_legal = true;
      for (int64_t i = 0; i < bytes * 2; ++i) {
        const int nibble = physical[i / 2] >> i % 2 * 4 & 0xF;
        all_legal &= (nibble & 3) < nibble >> 2;
      }
      check(all_legal, "padding nibble", layout, tokens, in_features, 0, 0);
    }
  }
}

}  // namespace

int main() {
  check_sm80();
  check_sm90<cutlass::half_t, 64>(MetadataLayout::kSm90Bits16T64);
  check_sm90<cutlass::bfloat16_t, 64>(MetadataLayout::kSm90Bits16T64);
  check_sm90<cutlass::float_e4m3_t, 128>(MetadataLayout::kSm90Bits8);
  check_sm90<cutlass::float_e4m3_t, 256>(MetadataLayout::kSm90Bits8);
  check_wgmma<cute::SM90::GMMA::ELayout_64x32, 32>(MetadataLayout::kSm90Bits16T64);
  check_wgmma<cute::SM90::GMMA::ELayout_64x64, 64>(MetadataLayout::kSm90Bits8);
  for (int i = 0; i < kMetadataLayouts; ++i) {
    check_bijection(static_cast<MetadataLayout>(i));
    check_round_trip(static_cast<MetadataLayout>(i));
  }
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
