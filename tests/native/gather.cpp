// launch_gather with its kernels' own source, run on the host (emulate_cuda.h), against a plain selection and float64
// products: all types, token counts, patterns and options, over configurations and sizes that do not fit them. Weight
// rows that no token needs, everything around the operands and unused shared memory are NaN. Prints "N checks, 0
// failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernels; gather.cpp, which launches them, is a source of its own.
#include "kernels/gather/gather_bits16.cu"
#include "kernels/gather/gather_e4m3.cu"
#include "kernels/gather/gather_int8.cu"
#include "operands.h"

namespace {

using namespace operands;

constexpr ElementType kInt8 = ElementType::kInt8;
constexpr GemmDevice kHopper{9, 132};

// What a weight's bits mean, for the oracle.
double decode_weight(uint32_t bits, ElementType type) {
  return type == kInt8 ? static_cast<int8_t>(bits) : decode(bits, type);
}

struct Options {
  bool channel_scale, shift, eta, full_epilogue, ties;
};

struct Case {
  int tokens, in_features, out_features;
  ElementType type, weight_type;
  Pattern pattern;
  GatherConfig config;
  Options options;
};

std::string describe(const Case& c) {
  return std::to_string(c.tokens) + " x " + std::to_string(c.out_features) + " x " + std::to_string(c.in_features) +
         ", types " + std::to_string(int(c.type)) + " and " + std::to_string(int(c.weight_type)) + ", " +
         std::to_string(c.pattern.keep) + ":" + std::to_string(c.pattern.group) + ", lanes " +
         std::to_string(c.config.lanes) + " splits " + std::to_string(c.config.splits) + " threads " +
         std::to_string(c.config.threads) + " ahead " + std::to_string(c.config.ahead);
}

// The vectors of a case, and its inputs: what is selected of each token.
struct Inputs {
  Inputs(const Case& c, bool aligned)
      : x(c.tokens, c.in_features, c.type, aligned ? (c.in_features + 15) / 8 * 8 - c.in_features : 3,
          aligned ? 0 : engine() % 2),
        scale(c.options.channel_scale, c.in_features, false, 0),
        shift(c.options.shift, c.in_features, false, 0),
        eta(c.options.eta, c.tokens, false, 0),
        row_scale(c.options.full_epilogue, c.tokens, false, 0),
        weight_scale(c.options.full_epilogue || weight_bytes(c.weight_type) == 1, c.out_features, false, 0),
        shift_out(c.options.full_epilogue || c.options.eta || c.options.shift, c.out_features, false, 0),
        column_scale(c.options.full_epilogue, c.out_features, false, 0),
        bias(c.options.full_epilogue ? 1 : 0, c.out_features, c.type, 0, 0) {
    for (int o = 0; c.options.full_epilogue && o < c.out_features; ++o) bias.set(0, o, encode(uniform(), c.type));
    for (int t = 0; t < c.tokens; ++t) {
      for (int k = 0; k < c.in_features; ++k) {
        const bool zero = c.pattern.keep == 0 && uniform() < 0.2f;
        const float drawn = zero ? 0.0f : c.options.ties ? std::round(2 * uniform()) : uniform();
        x.set(t, k, drawn == 0.0f && k % 3 == 0 ? 0x8000 : encode(drawn, c.type));  // -0.0
      }
      const bool selects = c.pattern.keep > 0;
      z.push_back(token_of(x.row(t), c.type, selects ? shift.pointer() : nullptr,
                           selects && eta.wanted ? eta.pointer() + t : nullptr)
                      .z);
      if (selects) {
        kept.push_back(survivors_of(z[t], c.pattern, scale.pointer()));
      } else {
        kept.emplace_back();
        for (float value : z[t]) kept[t].push_back(value != 0.0f);
      }
    }
  }
  Rows x;
  Channels scale, shift, eta, row_scale, weight_scale, shift_out, column_scale;
  Rows bias;
  std::vector<std::vector<float>> z;
  std::vector<std::vector<bool>> kept;
};

// Rows that some token needs; the others stay NaN.
void fill_weight(Rows& weight, const Case& c, const Inputs& inputs) {
  for (int k = 0; k < c.in_features; ++k) {
    bool needed = false;
    for (int t = 0; t < c.tokens; ++t) needed |= inputs.kept[t][k];
    for (int o = 0; needed && o < c.out_features; ++o) {
      uint32_t bits = encode(uniform(), c.type);
      if (weight_bytes(c.weight_type) == 1) {
        do bits = engine() & 0xFF;
        while (std::isnan(decode_weight(bits, c.weight_type)));
      }
      weight.memory.put(k * weight.stride + o, bits, weight_bytes(c.weight_type));
    }
  }
}

// The error of an output, as a share of what is allowed: half a unit of its last place, and what float32 sums may lose.
double relative_error(const Case& c, const Inputs& inputs, const Rows& weight, int t, int o, float actual) {
  double sum = 0, size = 0;
  for (int k = 0; k < c.in_features; ++k) {
    if (!inputs.kept[t][k]) continue;
    const uint32_t bits = weight.memory.get(k * weight.stride + o, weight_bytes(c.weight_type));
    const double product = inputs.z[t][k] * decode_weight(bits, c.weight_type);
    sum += product;
    size += std::fabs(product);
  }
  const auto scale_by = [&](double factor) { sum *= factor, size *= std::fabs(factor); };
  if (inputs.weight_scale.wanted) scale_by(inputs.weight_scale.pointer()[o]);
  if (inputs.row_scale.wanted) scale_by(inputs.row_scale.pointer()[t]);
  if (inputs.shift_out.wanted)
    sum += (inputs.eta.wanted ? inputs.eta.pointer()[t] : 1.0) * inputs.shift_out.pointer()[o];
  if (inputs.column_scale.wanted) scale_by(inputs.column_scale.pointer()[o]);
  if (c.options.full_epilogue) sum += decode(inputs.bias.bits(0, o), c.type);
  if (decode(encode(sum, c.type), c.type) == actual) return 0;  // infinity among others
  return std::fabs(actual - sum) / (std::fabs(sum) * (c.type == kBf16 ? 0x1p-8 : 0x1p-11) + size * 1e-5 + 1e-6);
}

GatherParams params_of(const Case& c, const Rows& x, const Rows& weight, const Rows& y) {
  GatherParams params{};
  params.x = x.memory.data();
  params.x_stride = x.stride;
  params.weight = weight.memory.data();
  params.weight_stride = weight.stride;
  params.y = y.memory.data();
  params.tokens = c.tokens;
  params.in_features = c.in_features;
  params.out_features = c.out_features;
  params.pattern = c.pattern;
  params.x_type = c.type;
  params.weight_type = c.weight_type;
  return params;
}

void run_case(const Case& c, bool aligned) {
  current = describe(c);
  const Inputs inputs(c, aligned);
  const int vector = outputs_per_lane(c.weight_type);
  Rows weight(c.in_features, c.out_features, c.weight_type, vector, 0);
  fill_weight(weight, c, inputs);
  const Rows y(1, c.tokens * c.out_features, c.type, 0, 0);
  GatherParams params = params_of(c, inputs.x, weight, y);
  params.channel_scale = inputs.scale.pointer();
  params.shift = inputs.shift.pointer();
  params.eta = inputs.eta.pointer();
  params.row_scale = inputs.row_scale.pointer();
  params.weight_scale = inputs.weight_scale.pointer();
  params.shift_out = inputs.shift_out.pointer();
  params.column_scale = inputs.column_scale.pointer();
  params.bias = c.options.full_epilogue ? inputs.bias.memory.data() : nullptr;
  check(launch_gather(params, kHopper, c.config, nullptr) == cudaSuccess, "launch");
  const GatherProblem problem{c.tokens, c.out_features, c.in_features, c.weight_type, c.pattern, kHopper};
  check(emulation::last_one_block == blocks_fit_apart(problem, c.config), "one block a multiprocessor where all fit");

  double worst = 0;
  for (int t = 0; t < c.tokens; ++t) {
    for (int o = 0; o < c.out_features; ++o) {
      const float actual = decode(y.bits(0, t * c.out_features + o), c.type);
      const double error = relative_error(c, inputs, weight, t, o, actual);
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  check(worst <= 1.0, "off by " + std::to_string(worst) + " of what is allowed");
  check(y.memory.guards_are_intact() && inputs.x.memory.guards_are_intact(), "nothing beside the operands");
}

void run_types(Case c, int kind, bool aligned) {
  const ElementType types[][2] = {{kBf16, kBf16}, {kFp16, kFp16}, {kBf16, kFp8},
                                  {kFp16, kInt8}, {kFp16, kFp8},  {kBf16, kInt8}};
  c.type = types[kind][0];
  c.weight_type = types[kind][1];
  if (weight_bytes(c.weight_type) == 1) {
    c.out_features = ceil_div(c.out_features, 16) * 16;
    c.tokens = std::min(c.tokens, kFewTokens);
  }
  run_case(c, aligned);
}

void run_cases() {
  const Pattern patterns[] = {{1, 2, {}},  {2, 4, {}},   {4, 8, {}}, {8, 16, {}}, {16, 32, {}},
                              {3, 16, {}}, {31, 32, {}}, {1, 8, {}}, {0, 0, {}}};
  const GatherConfig configs[] = {{16, 1, 256, false}, {32, 2, 256, true}, {64, 3, 256, false}, {16, 8, 256, true},
                                  {32, 1, 512, false}, {16, 5, 512, true}, {128, 2, 512, true}, {64, 7, 512, false}};
  int step = 0;
  for (Pattern pattern : patterns) {
    for (const GatherConfig& config : configs) {
      for (int tokens : {1, 2, 3, 4, 7}) {
        if (tokens > kFewTokens && pattern.keep > 0) continue;
        for (int repeat = 0; repeat < 2; ++repeat, ++step) {
          const int groups = std::uniform_int_distribution<int>(1, 700 / std::max(pattern.group, 2))(engine);
          const bool plain = repeat == 0, shifted = pattern.keep > 0;
          const Options options{!plain && step % 3 != 0, !plain && shifted && step % 4 == 1, !plain && step % 4 == 3,
                                !plain, plain && step % 2 == 0};
          const int in = groups * std::max(pattern.group, 1);
          const int kind = tokens > kFewTokens ? step % 2 : static_cast<int>(engine() % 6);
          run_types({tokens, in, 8 * (1 + step % 50), kBf16, kBf16, pattern, config, options}, kind, step % 5 != 0);
        }
      }
    }
  }
}

// Slices as long as those of large layers, 512 threads as launches have them: configurations of our choice, then the
// kernel's own.
void run_long_slices() {
  const GatherConfig configs[] = {{32, 5, 512, true},  {64, 8, 512, false}, {128, 1, 512, true},
                                  {16, 4, 512, false}, {32, 8, 256, true},  {}};
  const Pattern patterns[] = {{8, 16, {}}, {2, 4, {}}, {16, 32, {}}};
  int step = 0;
  for (const GatherConfig& config : configs) {
    for (int in_features : {4096, 9024, 14336}) {
      for (int tokens : {1, 2, 3, 4}) {
        const bool plain = step % 2 == 0;
        const Options options{!plain, !plain && step % 3 == 0, false, !plain, plain && step % 4 == 0};
        const int kind = step % 6, out_features = 16 * (1 + step % 9);
        Case c{tokens, in_features, out_features, kBf16, kBf16, patterns[step++ % 3], config, options};
        const GatherProblem problem{tokens, 4096, in_features, kBf16, c.pattern, kHopper};
        if (config.threads == 0) c.config = select_gather_config(problem);
        if (is_valid(problem, c.config)) run_types(c, kind, step % 5 != 0);
      }
    }
  }
}

// With RMSNorm or a gated activation before the selection and a residual after the product: the same bits as without,
// from what the functions of activations.cuh make of the inputs (tests/native/producers.cpp has their formulas),
// rounded once more with the residual. kSandwich: a norm, a residual and a norm.
enum class Before { kNorm, kOffsetNorm, kSilu, kGelu, kSandwich, kOffsetSandwich };

bool is_gated(Before before) { return before == Before::kSilu || before == Before::kGelu; }
bool is_sandwich(Before before) { return before == Before::kSandwich || before == Before::kOffsetSandwich; }
bool has_offset(Before before) { return before == Before::kOffsetNorm || before == Before::kOffsetSandwich; }

template <class E>
nm_act::Chunk<E> chunk_of(const Rows& rows, int row, int at) {
  return nm_act::load_chunk<E, true>(reinterpret_cast<const uint16_t*>(rows.memory.data()) + row * rows.stride + at,
                                     kChunk);
}

template <class E>
void set_chunk(Rows& rows, int row, int at, const nm_act::Chunk<E>& z) {
  for (int i = 0; i < kChunk; ++i) rows.set(row, at + i, z.word[i / 2] >> 16 * (i % 2) & 0xFFFFu);
}

// The sum of a row's squares in the order of a block: by thread, by warp, over the warps.
template <class E>
float sum_of_squares(const Rows& x, int row, int features, int threads) {
  std::vector<float> own(threads), warps(32);
  for (int k = 0; k < features; k += kChunk) {
    float& sum = own[k / kChunk % threads];
    sum = nm_act::add_squares(chunk_of<E>(x, row, k), sum);
  }
  const auto tree = [](float* lanes) {
    for (int half = 16; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  };
  for (int warp = 0; warp < threads / 32; ++warp) warps[warp] = tree(&own[32 * warp]);
  return tree(warps.data());
}

// y = norm(x, weight), and with `residual` plus its rows; x and y may be the same.
template <class E>
void norm_rows(const Rows& x, const Rows& weight, const Rows* residual, bool offset, Rows& y, int tokens, int features,
               int threads) {
  for (int t = 0; t < tokens; ++t) {
    const float inverse = nm_act::inverse_rms(sum_of_squares<E>(x, t, features, threads), features, 1e-5f);
    for (int k = 0; k < features; k += kChunk) {
      nm_act::Chunk<E> z = chunk_of<E>(x, t, k);
      const nm_act::Chunk<E> by = chunk_of<E>(weight, 0, k);
      nm_act::normalise(z, inverse, make_uint4(by.word[0], by.word[1], by.word[2], by.word[3]), offset);
      if (residual != nullptr) nm_act::add(z, chunk_of<E>(*residual, t, k));
      set_chunk(y, t, k, z);
    }
  }
}

// `hidden` is written by sandwiches alone.
template <class E>
void produce(Before before, const Rows& x, const Rows& up, const Rows& weight, const Rows& x_weight, Rows& hidden,
             Rows& produced, int tokens, int features, int threads) {
  if (is_gated(before)) {
    for (int t = 0; t < tokens; ++t) {
      for (int k = 0; k < features; k += kChunk) {
        nm_act::Chunk<E> z = chunk_of<E>(x, t, k);
        nm_act::multiply_by_activated(z, chunk_of<E>(up, t, k),
                                      before == Before::kSilu ? Activation::kSilu : Activation::kGeluTanh);
        set_chunk(produced, t, k, z);
      }
    }
  } else if (is_sandwich(before)) {
    norm_rows<E>(x, x_weight, &up, has_offset(before), hidden, tokens, features, threads);
    norm_rows<E>(hidden, weight, nullptr, has_offset(before), produced, tokens, features, threads);
  } else {
    norm_rows<E>(x, weight, nullptr, has_offset(before), produced, tokens, features, threads);
  }
}

void run_around(Before before, ElementType type, ElementType weight_type, int tokens, int in_features,
                const GatherConfig& config, const Pattern& pattern) {
  const Case c{tokens, in_features, 48, type, weight_type, pattern, config, {}};
  current = describe(c) + ", before it " + std::to_string(int(before));
  // `up` has the residual of a sandwich, which is contiguous.
  const int padding = is_sandwich(before) ? 0 : 8;
  Rows x(tokens, in_features, type, 8, 0), up(tokens, in_features, type, padding, 0),
      weight(1, in_features, type, 0, 0), x_weight(1, in_features, type, 0, 0),
      expected_hidden(tokens, in_features, type, 0, 0), hidden(tokens, in_features, type, 0, 0),
      produced(tokens, in_features, type, 8, 0), matrix(in_features, c.out_features, weight_type, 16, 0),
      residual(tokens, c.out_features, type, 0, 0), alone(1, tokens * c.out_features, type, 0, 0),
      whole(1, tokens * c.out_features, type, 0, 0);
  Channels scale(true, c.out_features, false, 0);
  for (int k = 0; k < in_features; ++k) {
    weight.set(0, k, encode(uniform(), type));
    x_weight.set(0, k, encode(uniform(), type));
    for (int t = 0; t < tokens; ++t) {
      x.set(t, k, encode(std::round(8 * uniform()) / 4, type));
      up.set(t, k, encode(uniform(), type));
    }
    for (int o = 0; o < c.out_features; ++o) {
      const uint32_t bits = weight_bytes(weight_type) == 1 ? (engine() & 0x3F) : encode(uniform(), type);
      matrix.memory.put(k * matrix.stride + o, bits, weight_bytes(weight_type));
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int o = 0; o < c.out_features; ++o) residual.set(t, o, encode(uniform(), type));
  }
  if (type == kBf16) {
    produce<nm_act::BFloat16>(before, x, up, weight, x_weight, expected_hidden, produced, tokens, in_features,
                              config.threads);
  } else {
    produce<nm_act::Float16>(before, x, up, weight, x_weight, expected_hidden, produced, tokens, in_features,
                             config.threads);
  }
  GatherParams params = params_of(c, produced, matrix, alone);
  params.weight_scale = weight_bytes(weight_type) == 1 ? scale.pointer() : nullptr;
  check(launch_gather(params, kHopper, config, nullptr) == cudaSuccess, "launch of the product alone");
  params.x = x.memory.data();
  params.y = whole.memory.data();
  params.up = is_gated(before) ? up.memory.data() : nullptr;
  params.activation = before == Before::kGelu ? Activation::kGeluTanh : Activation::kSilu;
  params.norm_weight = is_gated(before) ? nullptr : weight.memory.data();
  params.unit_offset = has_offset(before);
  params.x_weight = is_sandwich(before) ? x_weight.memory.data() : nullptr;
  params.x_residual = is_sandwich(before) ? up.memory.data() : nullptr;
  params.hidden = is_sandwich(before) ? hidden.memory.data() : nullptr;
  params.epsilon = 1e-5f;
  params.residual = residual.memory.data();
  check(launch_gather(params, kHopper, config, nullptr) == cudaSuccess, "launch");
  int wrong = 0;
  for (int i = 0; i < tokens * c.out_features; ++i) {
    const float added = decode(residual.bits(i / c.out_features, i % c.out_features), type);
    wrong += whole.bits(0, i) != encode(decode(alone.bits(0, i), type) + added, type);
  }
  check(wrong == 0, std::to_string(wrong) + " outputs");
  wrong = 0;
  for (int i = 0; is_sandwich(before) && i < tokens * in_features; ++i) {
    wrong += hidden.bits(i / in_features, i % in_features) != expected_hidden.bits(i / in_features, i % in_features);
  }
  check(wrong == 0 && hidden.memory.guards_are_intact(), std::to_string(wrong) + " of the sums before the layer");
}

void run_what_stands_around() {
  const ElementType types[][2] = {{kBf16, kBf16}, {kFp16, kFp16}, {kBf16, kFp8}, {kFp16, kInt8}};
  const GatherConfig configs[] = {{16, 1, 256, false}, {32, 3, 256, true}, {16, 8, 512, true}};
  int step = 0;
  for (const auto& [type, weight_type] : types) {
    for (Before before : {Before::kNorm, Before::kOffsetNorm, Before::kSilu, Before::kGelu, Before::kSandwich,
                          Before::kOffsetSandwich}) {
      for (int tokens : {1, 2, 4}) {
        // One token has kernels of its own: slices of all sizes.
        for (int config = 0; config < (tokens == 1 ? 3 : 1); ++config, ++step) {
          const Pattern pattern = step % 2 == 0 ? Pattern{8, 16, {}} : Pattern{2, 4, {}};
          run_around(before, type, weight_type, tokens, 16 * (5 + 13 * (step % 4)),
                     configs[tokens == 1 ? config : step % 3], pattern);
        }
      }
    }
    // As many features as 256 and 512 threads hold eight of each, and more than 256 threads do.
    for (Before before : {Before::kNorm, Before::kOffsetNorm, Before::kSandwich}) {
      run_around(before, type, weight_type, 1, 2048, configs[1], Pattern{8, 16, {}});
      run_around(before, type, weight_type, 1, 4096, configs[2], Pattern{8, 16, {}});
      run_around(before, type, weight_type, 1, 2080, configs[step++ % 2], Pattern{8, 16, {}});
    }
  }
}

}  // namespace

int main() {
  return run_checks([] {
    run_cases();
    run_long_slices();
    run_what_stands_around();
    // Two types of inputs by one, two or four tokens and three types of weights, and eight tokens with 16-bit weights.
    check_every_kernel_ran(2 * (3 * 3 + 1));
  });
}
