// launch_rmsnorm_compress, launch_silu_mul_compress, their pruning twins and launch_rmsnorm_add with their kernels' own
// source, run on the host (emulate_cuda.h), against float64 formulas and the plain contract, bit for bit: the features
// are such that an error of 2^-20 before a rounding, which a device's approximations stay below, does not change it.
// Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernels.
#include "compressed.h"
#include "kernels/prune/producers.cu"
#include "kernels/prune/prune_row.cu"
#include "kernels/prune/rms_norm_add.cu"
#include "produced.h"

namespace {

using namespace operands;

// ---- activation * up ----------------------------------------------------------------------------------------------

double activated(double gate, Activation activation) {
  if (activation == Activation::kSilu) return gate / (1 + std::exp(-gate));
  const double u = std::sqrt(2 / std::acos(-1.0)) * (gate + 0.044715 * gate * gate * gate);
  // The usual form but for the far negative side, where 1 + tanh(u) cancels.
  return u > -3 ? gate / 2 * (1 + std::tanh(u)) : gate / (1 + std::exp(-2 * u));
}

uint32_t draw_gate(int64_t row, int feature, int in_features, ElementType type, bool finite, Activation activation) {
  while (true) {
    uint32_t bits = draw_feature(row, feature, in_features, type, finite);
    if (row % 6 == 0 && feature % 11 == 5) bits = encode(50 * uniform(), type);
    if (row % 6 == 0 && feature % 50 == 7) bits = encode(-120, type);
    const double value = activated(decode(bits, type), activation);
    // A device's GELU goes to zero where float32's exponential overflows, before the element type does.
    const bool vanishes = activation == Activation::kGeluTanh && value != 0 && std::fabs(value) < 1e-36;
    if (vanishes && std::fabs(value) > 1e-60) continue;
    if (!is_ambiguous(value, type, activation == Activation::kSilu ? 0x1p-20 : 0x1p-17)) return bits;
  }
}

void run_silu(int64_t tokens, int in_features, ElementType type, ElementType value_type, MetadataLayout layout,
              Options options, bool merged, Activation activation) {
  const bool finite = options.variance;
  // The halves of a merged projection, or two tensors of one stride.
  Rows both(tokens, merged ? 2 * in_features : in_features, type, merged ? 0 : 16, 0);
  Rows separate(merged ? 0 : tokens, in_features, type, 16, 0);
  Rows& up = merged ? both : separate;
  const int up_at = merged ? in_features : 0;
  std::vector<std::vector<uint32_t>> expected(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int k = 0; k < in_features; ++k) {
      const uint32_t gate = draw_gate(t, k, in_features, type, finite, activation),
                     factor = encode(normal() + 0.5, type);
      both.set(t, k, gate);
      up.set(t, up_at + k, factor);
      const float rounded = decode(encode(activated(decode(gate, type), activation), type), type);
      expected[t].push_back(encode(rounded * decode(factor, type), type));
    }
  }
  Compressed result(tokens, in_features, type, value_type, layout, options, !finite, true);
  current += std::string(merged ? ", merged " : ", ") + (activation == Activation::kSilu ? "SiLU" : "GELU");
  const SiluMulInput input{
      both.memory.data(), up.memory.data() + up_at * bytes_of(type), both.stride, tokens, in_features, type,
      activation};
  check(launch_silu_mul_compress(input, result.out(), nullptr) == cudaSuccess, "launch");
  result.verify([&](int64_t token) { return expected[token]; }, true);
  const auto prune = [&](const PruneOutput& out) { return launch_silu_mul_prune(input, out, nullptr); };
  if (value_type == type) verify_pruned(tokens, in_features, type, prune, [&](int64_t t) { return expected[t]; });
  check(both.memory.guards_are_intact() && up.memory.guards_are_intact(), "nothing beside the inputs");
}

// ---- RMSNorm ------------------------------------------------------------------------------------------------------

struct RmsNormCase {
  int64_t tokens;
  int in_features;
  ElementType type, value_type;
  MetadataLayout layout;
  Options options;
  bool residual, in_place;
  bool exact;  // rows with 1 / sqrt(mean + epsilon) = 0.5
  bool unit_offset = false;
  bool x_norm = false;  // with a residual, exact
};

constexpr float kEpsilon = 1e-5f, kExactEpsilon = 4.0f - 1.5625f;

// Magnitudes whose squares have the mean 1.5625, in any order and with any signs.
std::vector<float> exact_row(int in_features) {
  std::vector<float> row(in_features);
  for (int k = 0; k < in_features; ++k) {
    const float magnitudes[] = {1.0f, 1.0f, 2.0f, 0.5f};
    row[k] = magnitudes[k % 4] * (engine() % 2 == 0 ? 1.0f : -1.0f);
  }
  std::shuffle(row.begin(), row.end(), engine);
  return row;
}

struct RmsNormToken {
  std::vector<uint32_t> x, residual, hidden, produced;
};

// The weight of a norm: with an offset such that products with it are exact in float32.
uint32_t draw_weight(const RmsNormCase& c) {
  return encode(c.unit_offset ? std::round(64 * uniform()) / 64 : normal(), c.type);
}

RmsNormToken rmsnorm_of(const RmsNormCase& c, int64_t t, const std::vector<uint32_t>& weight,
                        const std::vector<uint32_t>& x_weight, bool& ambiguous) {
  RmsNormToken token;
  const std::vector<float> exact = exact_row(c.in_features), before = exact_row(c.in_features);
  double squares = 0;
  for (int k = 0; k < c.in_features; ++k) {
    uint32_t x = c.exact ? encode(exact[k], c.type) : draw_feature(t, k, c.in_features, c.type, c.options.variance);
    uint32_t residual = encode(c.exact ? 4.0 : normal(), c.type);
    if (c.exact && c.residual) x = encode(exact[k] - 4.0, c.type);
    float added = decode(x, c.type);
    if (c.x_norm) {
      x = encode(before[k], c.type);
      added = 0.5f * before[k] * (decode(x_weight[k], c.type) + (c.unit_offset ? 1.0f : 0.0f));
      residual = encode(exact[k] - added, c.type);
    }
    const float sum = c.residual ? added + decode(residual, c.type) : added;
    token.x.push_back(x);
    token.residual.push_back(residual);
    token.hidden.push_back(encode(sum, c.type));
    const double h = decode(token.hidden[k], c.type);
    squares += h * h;
  }
  const double inverse = 1 / std::sqrt(squares / c.in_features + (c.exact ? kExactEpsilon : kEpsilon));
  ambiguous = false;
  for (int k = 0; k < c.in_features; ++k) {
    const double normed = decode(token.hidden[k], c.type) * inverse;
    if (c.unit_offset) {
      const double product = normed * (1 + double(decode(weight[k], c.type)));
      ambiguous |= !c.exact && is_ambiguous(product, c.type);
      token.produced.push_back(encode(product, c.type));
      continue;
    }
    ambiguous |= !c.exact && is_ambiguous(normed, c.type);
    token.produced.push_back(encode(decode(encode(normed, c.type), c.type) * decode(weight[k], c.type), c.type));
  }
  return token;
}

void run_rmsnorm(const RmsNormCase& c) {
  Rows x(c.tokens, c.in_features, c.type, 0, 0), residual(c.residual ? c.tokens : 0, c.in_features, c.type, 0, 0),
      separate(c.residual && !c.in_place ? c.tokens : 0, c.in_features, c.type, 0, 0),
      weight(1, c.in_features, c.type, 0, 0), x_weight(c.x_norm ? 1 : 0, c.in_features, c.type, 0, 0);
  for (int k = 0; k < c.in_features; ++k) {
    weight.set(0, k, draw_weight(c));
    // Norms of x that a residual brings to an exact row.
    const float factors[] = {1.0f, 2.0f, 4.0f};
    if (c.x_norm) x_weight.set(0, k, encode(factors[engine() % 3] - (c.unit_offset ? 1 : 0), c.type));
  }
  std::vector<RmsNormToken> tokens;
  for (int64_t t = 0; t < c.tokens; ++t) {
    bool ambiguous = true;
    while (ambiguous) {
      const std::vector<uint32_t> before = c.x_norm ? x_weight.row(0) : std::vector<uint32_t>();
      RmsNormToken token = rmsnorm_of(c, t, weight.row(0), before, ambiguous);
      if (!ambiguous) tokens.push_back(std::move(token));
    }
    for (int k = 0; k < c.in_features; ++k) {
      x.set(t, k, tokens[t].x[k]);
      if (c.residual) residual.set(t, k, tokens[t].residual[k]);
    }
  }
  const auto before = x.memory.copy();
  Rows& hidden = c.in_place ? residual : separate;
  Compressed result(c.tokens, c.in_features, c.type, c.value_type, c.layout, c.options, !c.options.variance, true);
  current += std::string(", RMSNorm") + (c.exact ? ", exact" : "") + (c.residual ? ", residual" : "") +
             (c.unit_offset ? ", offset" : "") + (c.x_norm ? ", norm of x" : "");
  const RmsNormInput input{x.memory.data(),
                           c.residual ? residual.memory.data() : nullptr,
                           c.residual ? hidden.memory.data() : nullptr,
                           weight.memory.data(),
                           c.exact ? kExactEpsilon : kEpsilon,
                           c.tokens,
                           c.in_features,
                           c.type,
                           c.unit_offset,
                           c.x_norm ? x_weight.memory.data() : nullptr};
  check(launch_rmsnorm_compress(input, result.out(), nullptr) == cudaSuccess, "launch");
  result.verify([&](int64_t token) { return tokens[token].produced; }, true);
  const auto prune = [&](const PruneOutput& out) { return launch_rmsnorm_prune(input, out, nullptr); };
  const bool whole = !c.in_place;  // in place, the residual is the hidden state by now
  if (c.value_type == c.type && whole && c.in_features <= kMaxNormFeatures) {
    verify_pruned(c.tokens, c.in_features, c.type, prune, [&](int64_t t) { return tokens[t].produced; });
  }
  size_t wrong = 0;
  for (int64_t t = 0; c.residual && t < c.tokens; ++t) {
    for (int k = 0; k < c.in_features; ++k) wrong += !same_bits(hidden.bits(t, k), tokens[t].hidden[k], c.type, true);
  }
  check(wrong == 0, "hidden state: " + std::to_string(wrong));
  check(x.memory.copy() == before, "x is only read");
  for (const Rows* rows : {&x, &residual, &separate, &weight, &x_weight}) {
    check(rows->memory.guards_are_intact(), "nothing beside the operands");
  }
}

// round(norm(x, weight) + residual) of exact rows.
void run_rmsnorm_add(int64_t tokens, int in_features, ElementType type, bool unit_offset, bool in_place) {
  current = std::to_string(tokens) + " x " + std::to_string(in_features) + ", type " + std::to_string(int(type)) +
            ", norm plus residual" + (unit_offset ? ", offset" : "") + (in_place ? ", in place" : "");
  RmsNormCase c{};
  c.type = type;
  c.unit_offset = unit_offset;
  Rows x(tokens, in_features, type, 0, 0), residual(tokens, in_features, type, 0, 0),
      separate(in_place ? 0 : tokens, in_features, type, 0, 0), weight(1, in_features, type, 0, 0);
  for (int k = 0; k < in_features; ++k) weight.set(0, k, draw_weight(c));
  std::vector<std::vector<uint32_t>> expected(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<float> row = exact_row(in_features);
    for (int k = 0; k < in_features; ++k) {
      const uint32_t addend = encode(normal(), type);
      x.set(t, k, encode(row[k], type));
      residual.set(t, k, addend);
      const float normed = 0.5f * row[k] * (decode(weight.bits(0, k), type) + (unit_offset ? 1.0f : 0.0f));
      expected[t].push_back(encode(decode(encode(normed, type), type) + decode(addend, type), type));
    }
  }
  Rows& y = in_place ? residual : separate;
  const RmsNormAddParams params{x.memory.data(),
                                residual.memory.data(),
                                weight.memory.data(),
                                y.memory.data(),
                                kExactEpsilon,
                                unit_offset,
                                tokens,
                                in_features,
                                type};
  check(launch_rmsnorm_add(params, nullptr) == cudaSuccess, "launch");
  size_t wrong = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int k = 0; k < in_features; ++k) wrong += !same_bits(y.bits(t, k), expected[t][k], type, true);
  }
  check(wrong == 0, std::to_string(wrong) + " features");
  for (const Rows* rows : {&x, &residual, &separate, &weight}) {
    check(rows->memory.guards_are_intact(), "nothing beside the operands");
  }
}

// ---- cases --------------------------------------------------------------------------------------------------------

void run_cases() {
  int step = 0;
  for (int in_features : {32, 160, 288, 1024, 2080}) {
    for (int64_t tokens : {1, 17, 66}) {
      if (tokens * in_features > 40000) continue;
      for (const Options& options : kRowOptions) {
        for (ElementType type : {kBf16, kFp16}) {
          ++step;
          for (ElementType value_type : {type, kFp8}) {
            const MetadataLayout layout = layout_of(value_type, step);
            const Activation activation = step / 4 % 2 == 0 ? Activation::kSilu : Activation::kGeluTanh;
            run_silu(tokens, in_features, type, value_type, layout, options, step / 2 % 2 == 0, activation);
            const bool residual = step / 2 % 2 == 0, in_place = step % 3 == 0, offset = step / 4 % 2 == 1;
            run_rmsnorm({tokens, in_features, type, value_type, layout, options, residual, residual && in_place, true,
                         offset, residual && step / 8 % 2 == 1});
          }
        }
      }
    }
  }
  // Any rows, as far as all their features are far from a rounding's boundary.
  for (ElementType type : {kBf16, kFp16}) {
    for (int in_features : {32, 288, 512}) {
      for (const Options& options : {kRowOptions[0], kRowOptions[1]}) {
        for (ElementType value_type : {type, kFp8}) {
          const MetadataLayout layout = layout_of(value_type, ++step);
          run_rmsnorm(
              {13, in_features, type, value_type, layout, options, step % 2 == 0, false, false, step / 2 % 2 == 1});
        }
      }
    }
  }
}

void run_long_rows() {
  int step = 0;
  for (ElementType type : {kBf16, kFp16}) {
    for (ElementType value_type : {type, kFp8}) {
      for (int in_features : {4096, 16384, 17408, 18432, 32768, 32736}) {
        for (const Options& options : {kPlain, kRowOptions[6]}) {
          const MetadataLayout layout = layout_of(value_type, ++step);
          const Activation activation = step % 2 == 0 ? Activation::kSilu : Activation::kGeluTanh;
          run_silu(1, in_features, type, value_type, layout, options, step % 3 == 0, activation);
          for (bool residual : {false, true}) {
            run_rmsnorm({1, in_features, type, value_type, layout, options, residual, step % 2 == 0 && residual, true,
                         step % 4 == 1, step % 3 == 0 && residual});
          }
        }
      }
    }
  }
}

void run_additions() {
  int step = 0;
  for (int in_features : {8, 32, 264, 2560, 4104, 16384}) {
    for (ElementType type : {kBf16, kFp16}) {
      for (int64_t tokens : {1, 5}) {
        for (bool unit_offset : {false, true}) {
          run_rmsnorm_add(tokens, in_features, type, unit_offset, ++step % 3 == 0);
        }
      }
    }
  }
}

void check_refusals() {
  current = "refusals";
  const long before = emulation::launches;
  alignas(16) static unsigned char memory[64];
  const auto silu = [&](int offset, int64_t stride, int in_features, ElementType type, ElementType value_type) {
    CompressOutput out{};
    out.value_type = value_type;
    out.layout = layout_of(value_type, 0);
    return launch_silu_mul_compress({memory + offset, memory, stride, 1, in_features, type}, out, nullptr);
  };
  const auto rmsnorm = [&](int offset, int64_t tokens, int in_features, ElementType type) {
    CompressOutput out{};
    out.value_type = type;
    out.layout = layout_of(type, 0);
    const RmsNormInput input{memory, nullptr, nullptr, memory + offset, 1, tokens, in_features, type};
    return launch_rmsnorm_compress(input, out, nullptr);
  };
  const cudaError_t refused = cudaErrorInvalidValue;
  check(silu(2, 64, 64, kBf16, kBf16) == refused, "an unaligned gate");
  check(silu(0, 68, 64, kBf16, kBf16) == refused, "rows off 16 bytes");
  check(silu(0, 64, 24, kBf16, kBf16) == refused, "features off a step");
  check(silu(0, 64, 48, kBf16, kFp8) == refused, "features off a step of e4m3");
  check(silu(0, 64, 64, kBf16, kFp16) == refused, "another type's values");
  check(silu(0, 64, 32800, kBf16, kBf16) == refused, "a row that is too long");
  check(rmsnorm(8, 1, 64, kBf16) == refused, "an unaligned weight");
  check(rmsnorm(0, 1, 64, kFp32) == refused, "float32");
  check(rmsnorm(0, 0, 64, kBf16) == cudaSuccess, "no tokens");
  const auto add = [&](int offset, int64_t tokens, int in_features, ElementType type) {
    return launch_rmsnorm_add({memory, memory, memory + offset, memory, 1, false, tokens, in_features, type}, nullptr);
  };
  check(add(8, 1, 64, kBf16) == refused, "an unaligned weight of an added norm");
  check(add(0, 1, 60, kBf16) == refused, "an added norm off 16 bytes");
  check(add(0, 1, kMaxNormFeatures + 8, kBf16) == refused, "an added norm that is too long");
  check(add(0, 1, 64, kFp32) == refused, "an added norm in float32");
  check(add(0, 0, 64, kBf16) == cudaSuccess, "no tokens of an added norm");
  check(emulation::launches == before, "no launch");
}

}  // namespace

int main() {
  return run_checks([] {
    run_cases();
    run_long_rows();
    run_additions();
    check_refusals();
    // SiLU, RMSNorm and RMSNorm with a residual; two types; with e4m3 values and without; plain and general; four or
    // eight chunks a thread.
    constexpr size_t kCompressing = 3 * 2 * 2 * 2 * 2;
    // Pruned in 16 bits: two types; four kinds of groups; SiLU with four or eight chunks a thread, RMSNorm with four.
    constexpr size_t kPruning = 2 * 4 * 3;
    constexpr size_t kAdding = 2;  // two types
    check_every_kernel_ran(kCompressing + kPruning + kAdding);
    check(emulation::most_threads == nm_act::kMaxRowThreads, "no more threads than the kernels are compiled for");
  });
}
