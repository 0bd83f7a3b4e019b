// A compression to be launched, and what it must have written: every byte of every output, from the plain contract.
#pragma once

#include "operands.h"

namespace operands {

struct Options {
  bool channel_scale, shift;
  TokenShift token_shift;
  bool variance;
};

inline constexpr TokenShift kNone = TokenShift::kNone, kMean = TokenShift::kMean, kMedian = TokenShift::kMedian;
inline constexpr Options kPlain{false, false, kNone, false};

// What kernels that hold a token are run with.
inline constexpr Options kRowOptions[] = {kPlain,
                                          {true, false, kNone, false},
                                          {false, true, kNone, true},
                                          {false, false, kMean, false},
                                          {true, false, kMedian, false},
                                          {true, true, kNone, true},
                                          {true, false, kMean, true},
                                          {false, false, kMedian, true},
                                          {false, false, kNone, true}};

inline std::string describe(int64_t tokens, int in_features, ElementType x_type, ElementType value_type,
                            MetadataLayout layout, const Options& options) {
  const char* layouts[] = {"neutral", "sm80", "sm90", "sm90 e4m3"};
  const char* shifts[] = {"", ", mean", ", median"};
  return std::to_string(tokens) + " x " + std::to_string(in_features) + ", types " + std::to_string(int(x_type)) +
         " and " + std::to_string(int(value_type)) + ", " + layouts[int(layout)] +
         (options.channel_scale ? ", scale" : "") + (options.shift ? ", shift" : "") +
         shifts[int(options.token_shift)] + (options.variance ? ", variance" : "");
}

// Is this the e4m3 scale of a token (1 without e4m3 values), times its variance factor where one is asked for?
inline bool is_row_scale(float actual, bool variance, float e4m3_scale, const Token& token,
                         const std::vector<bool>& kept) {
  if (!variance) return actual == e4m3_scale || (std::isnan(actual) && std::isnan(e4m3_scale));
  if (!std::isfinite(e4m3_scale)) return !std::isfinite(actual);
  return is_variance_ratio(actual / e4m3_scale, token.z, kept);
}

// The outputs of a 2:4 compression of tokens x in_features, and its options.
class Compressed {
 public:
  Compressed(int64_t tokens, int in_features, ElementType x_type, ElementType value_type, MetadataLayout layout,
             Options options, bool special_channels, bool aligned_channels)
      : tokens_(tokens),
        in_features_(in_features),
        x_type_(x_type),
        options_(options),
        scale_(options.channel_scale, in_features, special_channels, aligned_channels ? 0 : 1),
        shift_(options.shift, in_features, false, aligned_channels ? 0 : 1),
        values_(size_t(tokens) * (in_features / 2) * bytes_of(value_type)),
        metadata_(static_cast<size_t>(metadata_bytes(layout, tokens, in_features))),
        row_scale_(has_row_scale(value_type) ? size_t(tokens) * 4 : 0),
        eta_(options.token_shift != TokenShift::kNone ? size_t(tokens) * 4 : 0) {
    out_.values = values_.data();
    out_.metadata = metadata_.data();
    out_.row_scale = row_scale_.size() > 0 ? row_scale_.data<float>() : nullptr;
    out_.eta = eta_.size() > 0 ? eta_.data<float>() : nullptr;
    out_.channel_scale = scale_.pointer();
    out_.shift = shift_.pointer();
    out_.token_shift = options.token_shift;
    out_.variance_correction = options.variance;
    out_.value_type = value_type;
    out_.layout = layout;
    current = describe(tokens, in_features, x_type, value_type, layout, options) +
              (aligned_channels ? "" : ", unaligned channels");
  }
  const CompressOutput& out() const { return out_; }

  // row(token) are the bits that are compressed. Their NaNs are kept to the bit unless they were computed.
  template <class Row>
  void verify(const Row& row, bool computed = false) const {
    const Neutral expected = expect(row);
    const bool any_nan = computed || options_.shift || options_.token_shift != TokenShift::kNone || is_e4m3();
    size_t wrong = 0;
    for (size_t i = 0; i < expected.values.size(); ++i) {
      const uint32_t actual = values_.get(i, bytes_of(out_.value_type));
      if (!same_bits(actual, expected.values[i], out_.value_type, any_nan)) ++wrong;
    }
    check(wrong == 0, "values: " + std::to_string(wrong) + " of " + std::to_string(expected.values.size()));
    size_t wrong_bytes = 0;
    for (size_t i = 0; i < expected.metadata.size(); ++i) wrong_bytes += metadata_.data()[i] != expected.metadata[i];
    check(wrong_bytes == 0,
          "metadata: " + std::to_string(wrong_bytes) + " of " + std::to_string(expected.metadata.size()));
    for (const Buffer* buffer : {&values_, &metadata_, &row_scale_, &eta_, &scale_.memory, &shift_.memory}) {
      check(buffer->guards_are_intact(), "nothing beside the operands");
    }
  }

 private:
  struct Neutral {
    std::vector<uint32_t> values;
    std::vector<uint8_t> metadata;
  };

  bool is_e4m3() const { return out_.value_type == ElementType::kE4M3; }
  bool has_row_scale(ElementType value_type) const { return options_.variance || value_type == ElementType::kE4M3; }

  template <class Row>
  Neutral expect(const Row& row) const {
    const MetadataLayout layout = out_.layout;
    // A neutral row may end with half a byte, which is 0.
    const uint8_t padding = layout == MetadataLayout::kNeutral ? 0 : kPaddingNibble | kPaddingNibble << 4;
    Neutral expected{{}, std::vector<uint8_t>(metadata_.size(), padding)};
    for (int64_t t = 0; t < tokens_; ++t) {
      const std::vector<uint32_t> x = row(t);
      const float* eta = out_.eta == nullptr ? nullptr : out_.eta + t;
      const Token token = token_of(x, x_type_, out_.shift, eta);
      if (eta != nullptr) {
        check(is_token_shift(*eta, options_.token_shift, token_of(x, x_type_, nullptr, nullptr).z), "token shift");
      }
      const std::vector<bool> kept = survivors_of(token.z, {2, 4, {}}, out_.channel_scale);
      const float e4m3_scale = is_e4m3() ? e4m3_scale_of(token, kept) : 1.0f;
      if (out_.row_scale != nullptr) {
        check(is_row_scale(out_.row_scale[t], options_.variance, e4m3_scale, token, kept), "row scale");
      }
      for (int group = 0; group < in_features_ / 4; ++group) {
        int nibble = 0, found = 0;
        for (int i = 0; i < 4; ++i) {
          const int k = 4 * group + i;
          if (!kept[k]) continue;
          nibble |= i << 2 * found++;
          expected.values.push_back(is_e4m3() ? to_e4m3_of(token.z[k], e4m3_scale) : token.bits[k]);
        }
        const NibbleAddress at = metadata_address(layout, tokens_, in_features_, t, group);
        uint8_t& byte = expected.metadata[at.byte];
        byte = static_cast<uint8_t>((byte & ~(0xF << at.shift)) | nibble << at.shift);
      }
    }
    return expected;
  }

  int64_t tokens_;
  int in_features_;
  ElementType x_type_;
  Options options_;
  Channels scale_, shift_;
  Buffer values_, metadata_, row_scale_, eta_;
  CompressOutput out_{};
};

}  // namespace operands
