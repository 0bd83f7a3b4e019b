// launch_compress and its kernels' own source, run on the host (emulate_cuda.h), against the plain contract: the
// streaming kernel in all layouts, types and alignments, and the kernel that holds a token, with e4m3 values, token
// shifts and the variance. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernels.
#include "compressed.h"
#include "kernels/prune/compress.cu"

namespace {

using namespace operands;

constexpr MetadataLayout kLayouts16[] = {MetadataLayout::kNeutral, MetadataLayout::kSm80Bits16,
                                         MetadataLayout::kSm90Bits16T64};

struct Memory {
  int gap, offset;  // elements between rows, and from an aligned place
  bool aligned_channels;
};
constexpr Memory kAligned{8, 0, true}, kOddRows{3, 1, true}, kOddStart{0, 3, true}, kOddChannels{16, 0, false};

void run(int64_t tokens, int in_features, ElementType type, ElementType value_type, MetadataLayout layout,
         Options options, Memory memory, Content content = Content::kHard) {
  Rows x(tokens, in_features, type, memory.gap, memory.offset);
  x.fill(content);
  const auto before = x.memory.copy();
  Compressed result(tokens, in_features, type, value_type, layout, options, content == Content::kHard,
                    memory.aligned_channels);
  const CompressParams params{x.memory.data(), x.stride, tokens, in_features, type, result.out()};
  check(launch_compress(params, nullptr) == cudaSuccess, "launch");
  result.verify([&](int64_t token) { return x.row(token); });
  check(x.memory.copy() == before && x.memory.guards_are_intact(), "x is only read");
}

int padded(int in_features, int multiple) { return (in_features + multiple - 1) / multiple * multiple; }

// Rows of every length modulo a tile, in every layout.
void run_streaming() {
  const Memory memories[] = {kAligned, kOddRows, kOddStart, kOddChannels};
  const Options options[] = {
      kPlain, {true, false, kNone, false}, {false, true, kNone, false}, {true, true, kNone, false}};
  int step = 0;
  for (int64_t tokens : {1, 17, 33, 129}) {
    for (int in_features : {4, 12, 36, 140, 268, 520}) {
      for (int option = 0; option < 4; ++option, ++step) {
        const Memory& memory = memories[(step + step / 4) % 4];
        const ElementType half = step / 16 % 2 == 0 ? kBf16 : kFp16, any = step % 3 == 0 ? kFp32 : half;
        run(tokens, in_features, any, any, MetadataLayout::kNeutral, options[option], memory);
        for (MetadataLayout layout : kLayouts16) {
          run(tokens, padded(in_features, 16), half, half, layout, options[option], memory);
        }
        run(tokens, padded(in_features, 8), kFp32, kFp32, MetadataLayout::kNeutral, options[option], kAligned);
      }
    }
  }
}

// Launches of so many blocks that a thread takes several steps.
void run_many_steps() {
  const Options options[] = {kPlain, {true, true, kNone, false}};
  for (const Options& option : options) {
    for (ElementType type : {kBf16, kFp16}) {
      for (MetadataLayout layout : kLayouts16) run(8179, 48, type, type, layout, option, kAligned);
    }
    run(8179, 40, kFp32, kFp32, MetadataLayout::kNeutral, option, kAligned);
  }
  run(4083, 1040, kBf16, kBf16, MetadataLayout::kSm90Bits16T64, options[1], kAligned);
  run(4083, 1088, kFp16, kFp16, MetadataLayout::kSm90Bits16T64, kPlain, kAligned);
  run(4083, 520, kFp32, kFp32, MetadataLayout::kNeutral, kPlain, kAligned);
  run(8179, 784, kBf16, kBf16, MetadataLayout::kSm80Bits16, kPlain, kAligned);
}

void run_rows() {
  const Memory memories[] = {kAligned, kOddRows, kAligned, kOddChannels};
  int step = 0;
  for (int64_t tokens : {1, 17, 66}) {
    for (int in_features : {4, 36, 160, 1024, 2080}) {
      if (tokens > 17 && in_features > 1024) continue;
      for (const Options& options : kRowOptions) {
        ++step;
        const Memory& memory = memories[step % 4];
        const Content content = options.variance ? Content::kFinite : Content::kHard;
        const ElementType half = step / 4 % 2 == 0 ? kBf16 : kFp16;
        run(tokens, padded(in_features, 32), half, kFp8, MetadataLayout::kSm90Bits8, options, memory, content);
        run(tokens, padded(in_features, 8), half, kFp8, MetadataLayout::kNeutral, options, memory, content);
        if (options.token_shift == kNone && !options.variance) continue;
        const MetadataLayout layout = kLayouts16[step % 3];
        run(tokens, padded(in_features, 16), half, half, layout, options, memory, content);
        const ElementType any = (step + step / 9) % 3 == 0 ? kFp32 : half;
        run(tokens, in_features, any, any, MetadataLayout::kNeutral, options, memory, content);
      }
    }
  }
}

// Non-finite tokens under a variance, and rows as long as they may be.
void run_extremes() {
  for (const Options& options : {kRowOptions[7], kRowOptions[8], kRowOptions[2]}) {
    run(6, 96, kBf16, kFp8, MetadataLayout::kSm90Bits8, options, kAligned);
    run(6, 96, kFp16, kFp16, MetadataLayout::kSm90Bits16T64, options, kAligned);
  }
  for (int in_features : {2048, 4096, 16384, 17408, 18432, 32768, 32736}) {
    for (const Options& options : {kRowOptions[0], kRowOptions[6], kRowOptions[7]}) {
      const ElementType half = options.variance == (in_features % 4096 == 0) ? kBf16 : kFp16;
      const Memory& memory = options.token_shift == kMedian ? kOddRows : kAligned;
      run(2, in_features, half, kFp8, MetadataLayout::kSm90Bits8, options, memory, Content::kFinite);
      if (!options.variance) continue;
      run(1, in_features, half, half, MetadataLayout::kSm90Bits16T64, options, memory, Content::kFinite);
      run(1, in_features, kFp32, kFp32, MetadataLayout::kNeutral, options, memory, Content::kFinite);
    }
  }
}

void check_refusals() {
  current = "refusals";
  const long before = emulation::launches;
  const auto launch = [](int64_t tokens, int in_features, ElementType type, ElementType value_type,
                         MetadataLayout layout, bool variance) {
    CompressParams params{nullptr, in_features, tokens, in_features, type, {}};
    params.out.value_type = value_type;
    params.out.layout = layout;
    params.out.variance_correction = variance;
    return launch_compress(params, nullptr);
  };
  const cudaError_t refused = cudaErrorInvalidValue;
  check(launch(1, 6, kBf16, kBf16, MetadataLayout::kNeutral, false) == refused, "features off a group");
  check(launch(1, 12, kBf16, kFp8, MetadataLayout::kNeutral, false) == refused, "e4m3 values off a chunk");
  check(launch(1, 24, kBf16, kBf16, MetadataLayout::kSm90Bits16T64, false) == refused, "features off a step");
  check(launch(1, 48, kBf16, kFp8, MetadataLayout::kSm90Bits8, false) == refused, "features off a step of e4m3");
  check(launch(1, 32, kBf16, kFp16, MetadataLayout::kSm80Bits16, false) == refused, "another type's values");
  check(launch(1, 32, kBf16, kBf16, MetadataLayout::kSm90Bits8, false) == refused, "another type's layout");
  check(launch(1, 64, kFp32, kFp32, MetadataLayout::kSm80Bits16, false) == refused, "float32 for a GEMM");
  check(launch(1, 32800, kBf16, kBf16, MetadataLayout::kNeutral, true) == refused, "a row that is too long");
  check(launch(kMaxTokens + 1, 32, kBf16, kFp8, MetadataLayout::kSm90Bits8, false) == refused, "too many tokens");
  check(launch(int64_t{1} << 38, 32, kBf16, kBf16, MetadataLayout::kNeutral, false) == refused, "too many blocks");
  check(launch(0, 32, kBf16, kBf16, MetadataLayout::kSm90Bits16T64, false) == cudaSuccess, "no tokens");
  check(launch(4, 0, kFp32, kFp32, MetadataLayout::kNeutral, false) == cudaSuccess, "no features");
  check(emulation::launches == before, "no launch");
}

}  // namespace

int main() {
  return run_checks([] {
    run_streaming();
    run_many_steps();
    run_rows();
    run_extremes();
    check_refusals();
    // Streaming: two types in three layouts and float32 in one, each unaligned (a step), aligned (one or many), scaled
    // (likewise). Rows: two types with and without e4m3 and float32, of four or eight chunks; plain e4m3 ones.
    constexpr size_t kStreaming = 7 * 5, kRow = 5 * 2 * 2 + 2 * 2;
    check_every_kernel_ran(kStreaming + kRow);
    check(emulation::most_threads == nm_act::kMaxRowThreads, "no more threads than the kernels are compiled for");
  });
}
