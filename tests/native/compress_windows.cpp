// launch_compress_windows with its kernels' own source, run on the host (emulate_cuda.h): what the windows of the
// lifted operand hold is compared with the plain selection, feature by feature, and its metadata with the format's
// padding. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernels.
#include "compressed.h"
#include "kernels/prune/compress_windows.cu"
#include "kernels/prune/token_statistics.cu"

namespace {

using namespace operands;

constexpr MetadataLayout kSm80 = MetadataLayout::kSm80Bits16, kT64 = MetadataLayout::kSm90Bits16T64,
                         kBits8 = MetadataLayout::kSm90Bits8;

struct Case {
  int64_t tokens;
  int in_features;
  ElementType type, value_type;
  MetadataLayout layout;
  Pattern pattern;
  Options options;
  Content content;
};

// What one token's part of the operand says.
class LiftedToken {
 public:
  LiftedToken(const Case& c, const Buffer& values, const Buffer& metadata, int64_t token)
      : c_(c),
        values_(values),
        metadata_(metadata),
        token_(token),
        lifted_(static_cast<int>(lifted_features(c.in_features))) {}

  // Every survivor is in one window, as `expected` says, and each place of a window is a survivor's.
  bool holds(const std::vector<bool>& kept, const std::vector<uint32_t>& expected, bool any_nan) const {
    std::vector<int> found(c_.in_features);
    for (int unit = 0; unit < c_.in_features / kUnit; ++unit) {
      for (int window = 0; window < kWindows; ++window) {
        const int group = window < 4 ? 4 * unit + window : c_.in_features / 4 + unit;
        const int nibble = nibble_of(group), slots[2] = {nibble & 3, nibble >> 2};
        if (slots[0] >= slots[1]) return false;
        for (int i = 0; i < 2; ++i) {
          const int k = kUnit * unit + window_feature(c_.pattern.extra, window, slots[i]);
          const uint32_t bits = values_.get(token_ * (lifted_ / 2) + 2 * group + i, bytes_of(c_.value_type));
          if (!kept[k] || !same_bits(bits, expected[k], c_.value_type, any_nan)) return false;
          ++found[k];
        }
      }
    }
    for (int k = 0; k < c_.in_features; ++k) {
      if (found[k] != (kept[k] ? 1 : 0)) return false;
    }
    return true;
  }

 private:
  int nibble_of(int group) const {
    const NibbleAddress at = metadata_address(c_.layout, c_.tokens, lifted_, token_, group);
    return metadata_.data()[at.byte] >> at.shift & 15;
  }

  const Case& c_;
  const Buffer &values_, &metadata_;
  int64_t token_;
  int lifted_;
};

bool padding_is_legal(const Case& c, int lifted, const Buffer& metadata) {
  std::vector<uint8_t> nibbles(2 * metadata.size(), 1);  // 1: padding
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int group = 0; group < lifted / 4; ++group) {
      const NibbleAddress at = metadata_address(c.layout, c.tokens, lifted, t, group);
      nibbles[2 * at.byte + at.shift / 4] = 0;
    }
  }
  for (size_t i = 0; i < nibbles.size(); ++i) {
    if (nibbles[i] != 0 && (metadata.data()[i / 2] >> 4 * (i % 2) & 15) != kPaddingNibble) return false;
  }
  return true;
}

void run(const Case& c) {
  const int lifted = static_cast<int>(lifted_features(c.in_features));
  const bool e4m3 = c.value_type == kFp8, shifts = c.options.token_shift != kNone;
  Rows x(c.tokens, c.in_features, c.type, 8 * (c.tokens % 3), 0);
  x.fill(c.content);
  const auto before = x.memory.copy();
  const Channels scale(c.options.channel_scale, c.in_features, c.content == Content::kHard, 0),
      shift(c.options.shift, c.in_features, false, 0);
  const Buffer values(size_t(c.tokens) * (lifted / 2) * bytes_of(c.value_type)),
      metadata(static_cast<size_t>(metadata_bytes(c.layout, c.tokens, lifted))),
      row_scale(e4m3 || c.options.variance ? size_t(c.tokens) * 4 : 0), eta(shifts ? size_t(c.tokens) * 4 : 0);
  current = describe(c.tokens, c.in_features, c.type, c.value_type, c.layout, c.options) + ", " + name_of(c.pattern);
  CompressParams params{x.memory.data(), x.stride, c.tokens, c.in_features, c.type, {}};
  params.out = {values.data(),
                metadata.data(),
                row_scale.size() > 0 ? row_scale.data<float>() : nullptr,
                shifts ? eta.data<float>() : nullptr,
                scale.pointer(),
                shift.pointer(),
                c.options.token_shift,
                c.options.variance,
                c.value_type,
                c.layout};
  check(launch_compress_windows(params, c.pattern, nullptr) == cudaSuccess, "launch");

  for (int64_t t = 0; t < c.tokens; ++t) {
    const std::vector<uint32_t> row = x.row(t);
    const Token token = token_of(row, c.type, shift.pointer(), shifts ? params.out.eta + t : nullptr);
    if (shifts) {
      const Token unshifted = token_of(row, c.type, nullptr, nullptr);
      check(is_token_shift(params.out.eta[t], c.options.token_shift, unshifted.z), "token shift");
    }
    const std::vector<bool> kept = survivors_of(token.z, c.pattern, scale.pointer());
    const float e4m3_scale = e4m3 ? e4m3_scale_of(token, kept) : 1.0f;
    if (params.out.row_scale != nullptr) {
      check(is_row_scale(params.out.row_scale[t], c.options.variance, e4m3_scale, token, kept), "row scale");
    }
    std::vector<uint32_t> expected(token.bits);
    for (int k = 0; e4m3 && k < c.in_features; ++k) expected[k] = to_e4m3_of(token.z[k], e4m3_scale);
    const bool any_nan = shifts || c.options.shift || e4m3;
    check(LiftedToken(c, values, metadata, t).holds(kept, expected, any_nan), "token " + std::to_string(t));
  }
  check(padding_is_legal(c, lifted, metadata), "padding");
  for (const Buffer* buffer : {&values, &metadata, &row_scale, &eta}) {
    check(buffer->guards_are_intact(), "nothing beside the operands");
  }
  check(x.memory.copy() == before && x.memory.guards_are_intact(), "x is only read");
}

constexpr Pattern kPatterns[] = {{2, 4, {1, {0, 0}}}, {2, 4, {1, {1, 0}}}, {2, 4, {1, {2, 0}}}, {2, 4, {1, {3, 0}}}};

// in_features made to fit: lifted rows are whole steps of 16 features, of 32 for e4m3 and sm80.
int fitting(int in_features, int step) { return (in_features + 4 * step - 1) / (4 * step) * (4 * step); }

void run_streaming() {
  const Options options[] = {{false, false, kNone, false},
                             {true, false, kNone, false},
                             {false, true, kNone, false},
                             {true, false, kMean, false},
                             {false, false, kMedian, false}};
  const int64_t tokens[] = {1, 17, 33, 129};
  int step = 0;
  for (const Pattern& pattern : kPatterns) {
    for (MetadataLayout layout : {kSm80, kT64}) {
      for (const Options& option : options) {
        // Rows on metadata tiles (staged where the layout is) and off them, up to two spans of a block.
        const int any = 64 + 32 * (++step % 30);
        for (int in_features : {128, 640, any}) {
          const int fits = fitting(in_features, layout == kSm80 ? 32 : 16);
          const int64_t rows = tokens[(step + in_features / 128) % 4];
          const ElementType type = (step + (in_features == 640)) % 2 == 0 ? kBf16 : kFp16;
          run({rows, fits, type, type, layout, pattern, option, Content::kHard});
        }
      }
    }
  }
}

void run_rows() {
  const Options options[] = {{false, false, kNone, false}, {true, false, kNone, false},  {false, true, kNone, true},
                             {false, false, kMean, false}, {true, false, kMedian, true}, {false, false, kNone, true}};
  int step = 0;
  for (const Pattern& pattern : kPatterns) {
    for (const Options& option : options) {
      const int64_t tokens[] = {1, 17, 66};
      for (int in_features : {128, 1024, 64 * (2 + ++step % 30)}) {
        const ElementType type = step / 2 % 2 == 0 ? kBf16 : kFp16;
        const Content content = option.variance ? Content::kFinite : Content::kHard;
        const int64_t rows = in_features > 1000 ? 3 : tokens[step % 3];
        run({rows, fitting(in_features, 32), type, kFp8, kBits8, pattern, option, content});
        if (!option.variance) continue;
        run({rows, fitting(in_features, 32), type, type, step % 2 == 0 ? kSm80 : kT64, pattern, option, content});
      }
    }
  }
  for (const Pattern& pattern : {kPatterns[1], kPatterns[2]}) {
    for (ElementType type : {kBf16, kFp16}) {
      for (int in_features : {16384, 16512, 32768}) {
        run({2, in_features, type, kFp8, kBits8, pattern, options[0], Content::kFinite});
        run({1, in_features, type, type, kT64, pattern, options[2], Content::kFinite});
      }
    }
  }
}

void check_refusals() {
  current = "refusals";
  const long before = emulation::launches;
  const auto launch = [](int64_t tokens, int in_features, ElementType type, ElementType value_type,
                         MetadataLayout layout, Pattern pattern, int64_t extra_stride = 0) {
    CompressParams params{nullptr, in_features + extra_stride, tokens, in_features, type, {}};
    params.out.value_type = value_type;
    params.out.layout = layout;
    return launch_compress_windows(params, pattern, nullptr);
  };
  const cudaError_t refused = cudaErrorInvalidValue;
  const Pattern plus_one{2, 4, {1, {0, 0}}}, plus_two{2, 4, {2, {0, 1}}};
  check(launch(1, 64, kBf16, kBf16, kT64, {2, 4, {}}) == refused, "no windows");
  check(launch(1, 64, kBf16, kBf16, kT64, {8, 16, {}}) == refused, "no windows of 8:16");
  check(launch(1, 64, kBf16, kBf16, kT64, plus_two) == refused, "two extra windows");
  check(launch(1, 48, kBf16, kBf16, kT64, plus_one) == refused, "lifted features off a step");
  check(launch(1, 64, kBf16, kFp8, kBits8, plus_one) == refused, "lifted features off a step of e4m3");
  check(launch(1, 72, kBf16, kBf16, kT64, plus_one) == refused, "features off a unit");
  check(launch(1, 64, kBf16, kBf16, MetadataLayout::kNeutral, plus_one) == refused, "the neutral layout");
  check(
      launch(1, 64, kBf16, kBf16, kBits8, plus_one) == refused && launch(1, 64, kBf16, kFp8, kT64, plus_one) == refused,
      "another type's layout");
  check(launch(1, 64, kBf16, kFp16, kT64, plus_one) == refused, "another type's values");
  check(launch(1, 64, kBf16, kBf16, kT64, plus_one, 4) == refused, "rows off 16 bytes");
  check(launch(1, 64, kFp32, kFp32, kT64, plus_one) == refused, "float32");
  check(launch(1, 32896, kBf16, kFp8, kBits8, plus_one) == refused, "a row that is too long");
  check(launch(0, 64, kBf16, kBf16, kT64, plus_one) == cudaSuccess, "no tokens");
  check(emulation::launches == before, "no launch");
}

}  // namespace

int main() {
  return run_checks([] {
    run_streaming();
    run_rows();
    check_refusals();
    // Two types; streaming staged or not, scaled or not; rows with e4m3 values or not, of two or four units a thread.
    // The token shift of two types.
    constexpr size_t kLifted = 2 * (4 + 4), kShift = 2;
    check_every_kernel_ran(kLifted + kShift);
    check(emulation::most_threads == nm_act::kMaxRowThreads, "no more threads than the kernels are compiled for");
  });
}
