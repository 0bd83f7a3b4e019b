// The decode kernel's own source, run on the host (emulate_cuda.h), against a plain selection and float64 products: all
// types, token counts, patterns and options, over configurations and sizes that do not fit them. Weight rows that no
// token needs, everything around the operands and unused shared memory are NaN. Then the choice of a configuration.
// Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernel.
#include <algorithm>
#include <string>

#include "kernels/gather/gather.cuh"

namespace {

using namespace nm_act;

long checks = 0;
long failures = 0;
std::mt19937 engine(7);

void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  ++failures;
  if (failures < 20) std::printf("FAILED %s\n", what.c_str());
}

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(engine); }

template <class E>
uint16_t to_bits(float value) {
  return static_cast<uint16_t>(E::pack(value, 0.0f));
}

// What a weight's bytes mean, for the oracle.
template <class W>
double decode(const unsigned char* bytes);
template <>
double decode<Weight16<BFloat16>>(const unsigned char* bytes) {
  return BFloat16::low(bytes[0] | bytes[1] << 8);
}
template <>
double decode<Weight16<Float16>>(const unsigned char* bytes) {
  return Float16::low(bytes[0] | bytes[1] << 8);
}
template <>
double decode<WeightInt8>(const unsigned char* bytes) {
  return static_cast<int8_t>(*bytes);
}
template <>
double decode<WeightE4M3>(const unsigned char* bytes) {
  const int exponent = *bytes >> 3 & 15, mantissa = *bytes & 7;
  if ((*bytes & 0x7F) == 0x7F) return NAN;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return *bytes & 0x80 ? -magnitude : magnitude;
}

struct Options {
  bool channel_scale, shift, eta, full_epilogue, ties;
};

struct Case {
  int tokens, in_features, out_features;
  Pattern pattern;
  GatherConfig config;
  Options options;
};

std::string describe(const Case& c) {
  return std::to_string(c.tokens) + " x " + std::to_string(c.out_features) + " x " + std::to_string(c.in_features) +
         " " + std::to_string(c.pattern.keep) + ":" + std::to_string(c.pattern.group) + ", lanes " +
         std::to_string(c.config.lanes) + " splits " + std::to_string(c.config.splits) + " threads " +
         std::to_string(c.config.threads);
}

std::vector<float> vector_or_none(bool wanted, int size) {
  std::vector<float> values(wanted ? size : 0);
  for (float& value : values) value = uniform();
  return values;
}

const float* pointer(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// The contract, in a plain way: by key, then by position.
std::vector<bool> survivors_of(const std::vector<float>& z, Pattern pattern, const std::vector<float>& scale) {
  std::vector<bool> kept(z.size());
  if (pattern.keep == 0) {
    for (size_t i = 0; i < z.size(); ++i) kept[i] = z[i] != 0.0f;
    return kept;
  }
  for (size_t begin = 0; begin < z.size(); begin += pattern.group) {
    std::vector<int> order(pattern.group);
    for (int i = 0; i < pattern.group; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      const auto key = [&](int i) {
        return std::fabs(z[begin + i]) * (scale.empty() ? 1.0f : std::fabs(scale[begin + i]));
      };
      return key(a) > key(b);
    });
    for (int i = 0; i < pattern.keep; ++i) kept[begin + order[i]] = true;
  }
  return kept;
}

template <class E, class W, int kTokens>
void run_case(const Case& c, bool aligned) {
  constexpr int kOutputs = 4 * W::kPerWord, kBytes = kGatherVector / kOutputs;
  const int tokens = c.tokens, in = c.in_features, out = c.out_features;
  const int x_stride = aligned ? (in + 15) / 8 * 8 : in + 3, x_offset = aligned ? 8 : 1, row = out + kOutputs;
  std::vector<uint16_t> x(x_offset + tokens * x_stride + 16, 0xFFFF);
  const auto scale = vector_or_none(c.options.channel_scale, in), shift = vector_or_none(c.options.shift, in);
  const auto eta = vector_or_none(c.options.eta, tokens);
  const bool full = c.options.full_epilogue;
  const auto row_scale = vector_or_none(full, tokens), weight_scale = vector_or_none(full || kBytes == 1, out);
  const auto shift_out = vector_or_none(full || c.options.eta || c.options.shift, out),
             column_scale = vector_or_none(full, out);
  std::vector<uint16_t> bias(full ? out : 0);
  for (uint16_t& value : bias) value = to_bits<E>(uniform());

  std::vector<std::vector<float>> z(tokens, std::vector<float>(in));
  std::vector<std::vector<bool>> kept(tokens);
  for (int t = 0; t < tokens; ++t) {
    for (int k = 0; k < in; ++k) {
      const bool zero = c.pattern.keep == 0 && uniform() < 0.2f;
      const float drawn = zero ? 0.0f : c.options.ties ? std::round(2 * uniform()) : uniform();
      uint16_t& bits = x[x_offset + t * x_stride + k];
      bits = to_bits<E>(drawn);
      if (drawn == 0.0f && k % 3 == 0) bits = 0x8000;  // -0.0
      float value = E::low(bits);
      if (c.pattern.keep > 0 && !eta.empty()) value = E::low(to_bits<E>(value - eta[t]));
      if (c.pattern.keep > 0 && !shift.empty()) value = E::low(to_bits<E>(value - shift[k]));
      z[t][k] = value;
    }
    kept[t] = survivors_of(z[t], c.pattern, scale);
  }

  std::vector<unsigned char> storage((size_t(in) * row + kOutputs) * kBytes + 32, 0xFF);
  unsigned char* weight = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16;
  for (int k = 0; k < in; ++k) {
    bool needed = false;
    for (int t = 0; t < tokens; ++t) needed |= kept[t][k];
    for (int o = 0; needed && o < out; ++o) {
      unsigned char* place = weight + (size_t(k) * row + o) * kBytes;
      if (kBytes == 2) {
        const uint16_t bits = to_bits<E>(uniform());
        std::memcpy(place, &bits, 2);
      } else {
        do *place = static_cast<unsigned char>(engine());
        while (std::isnan(decode<W>(place)));
      }
    }
  }

  std::vector<uint32_t> y(size_t(tokens) * out / 2 + 4, 0xFFFFFFFFu);
  GatherParams params{};
  params.x = x.data() + x_offset;
  params.x_stride = x_stride;
  params.weight = weight;
  params.weight_stride = row;
  params.y = y.data();
  params.channel_scale = pointer(scale);
  params.shift = pointer(shift);
  params.eta = pointer(eta);
  params.row_scale = pointer(row_scale);
  params.weight_scale = pointer(weight_scale);
  params.shift_out = pointer(shift_out);
  params.column_scale = pointer(column_scale);
  params.bias = bias.empty() ? nullptr : bias.data();
  params.tokens = tokens;
  params.in_features = in;
  params.out_features = out;
  params.pattern = c.pattern;
  const int tile = c.config.lanes * kOutputs, tiles = ceil_div(out, tile);
  const int bytes = gather_shared(kTokens, slice_features(in, c.config.splits), tile, c.config.threads, kOutputs).bytes;
  for (int i = 0; i < tiles; ++i) {
    emulation::run_cluster(i * c.config.splits, c.config.splits, c.config.threads, bytes, engine,
                           [&] { gather_kernel<E, W, kTokens>(params, c.config, aligned); });
  }

  double worst = 0;
  for (int t = 0; t < tokens; ++t) {
    for (int o = 0; o < out; ++o) {
      double sum = 0, size = 0;
      for (int k = 0; k < in; ++k) {
        if (!kept[t][k]) continue;
        const double product = z[t][k] * decode<W>(weight + (size_t(k) * row + o) * kBytes);
        sum += product;
        size += std::fabs(product);
      }
      if (!weight_scale.empty()) sum *= weight_scale[o], size *= std::fabs(weight_scale[o]);
      if (!row_scale.empty()) sum *= row_scale[t], size *= std::fabs(row_scale[t]);
      if (!shift_out.empty()) sum += (eta.empty() ? 1.0 : eta[t]) * shift_out[o];
      if (!column_scale.empty()) sum *= column_scale[o], size *= std::fabs(column_scale[o]);
      if (!bias.empty()) sum += E::low(bias[o]);
      const uint16_t bits = static_cast<uint16_t>(y[(size_t(t) * out + o) / 2] >> 16 * (o % 2));
      // Half a unit of the output's last place, and what float32 sums may lose.
      const double allowed =
          std::fabs(sum) * (E::kNanKeys == BFloat16::kNanKeys ? 0x1p-8 : 0x1p-11) + size * 1e-5 + 1e-6;
      const double error = std::fabs(E::low(bits) - sum) / allowed;
      worst = error > worst || std::isnan(error) ? error : worst;
    }
  }
  check(worst <= 1.0, describe(c) + " off by " + std::to_string(worst) + " of what is allowed");
  for (size_t i = size_t(tokens) * out / 2; i < y.size(); ++i)
    check(y[i] == 0xFFFFFFFFu, describe(c) + " wrote too far");
}

template <class E, class W>
void run_tokens(const Case& c, bool aligned) {
  switch (compiled_tokens(c.tokens)) {
    case 1: return run_case<E, W, 1>(c, aligned);
    case 2: return run_case<E, W, 2>(c, aligned);
    case 4: return run_case<E, W, 4>(c, aligned);
    default: return run_case<E, W, 8>(c, aligned);
  }
}

void run_types(Case c, int step, bool aligned) {
  switch (step % 6) {
    case 0: return run_tokens<BFloat16, Weight16<BFloat16>>(c, aligned);
    case 1: return run_tokens<Float16, Weight16<Float16>>(c, aligned);
    default: break;
  }
  c.out_features = ceil_div(c.out_features, 16) * 16;
  if (c.tokens > kMaxDecodeTokens) c.tokens = kMaxDecodeTokens;
  switch (step % 6) {
    case 2: return run_tokens<BFloat16, WeightE4M3>(c, aligned);
    case 3: return run_tokens<Float16, WeightInt8>(c, aligned);
    case 4: return run_tokens<Float16, WeightE4M3>(c, aligned);
    default: return run_tokens<BFloat16, WeightInt8>(c, aligned);
  }
}

void run_cases() {
  const Pattern patterns[] = {{1, 2}, {2, 4}, {4, 8}, {8, 16}, {16, 32}, {3, 16}, {31, 32}, {1, 8}, {0, 0}};
  const GatherConfig configs[] = {{16, 1, 128}, {32, 2, 128}, {64, 3, 128}, {16, 8, 128}, {32, 1, 256}, {128, 2, 256}};
  int step = 0;
  for (Pattern pattern : patterns) {
    for (const GatherConfig& config : configs) {
      for (int tokens : {1, 2, 3, 4, 7}) {
        if (tokens > kMaxDecodeTokens && pattern.keep > 0) continue;
        for (int repeat = 0; repeat < 2; ++repeat, ++step) {
          const int groups = std::uniform_int_distribution<int>(1, 700 / std::max(pattern.group, 2))(engine);
          const bool plain = repeat == 0, shifted = pattern.keep > 0;
          const Options options{!plain && step % 3 != 0, !plain && shifted && step % 4 == 1, !plain && step % 4 == 3,
                                !plain, plain && step % 2 == 0};
          const int in = groups * std::max(pattern.group, 1);
          run_types({tokens, in, 8 * (1 + step % 50), pattern, config, options}, step / 2 + step, step % 5 != 0);
        }
      }
    }
  }
}

void check_configs() {
  const int shapes[][2] = {{6144, 4096},  {4096, 4096},   {28672, 4096}, {4096, 14336}, {10240, 8192},
                           {8192, 8192},  {57344, 8192},  {8192, 28672}, {16, 32},      {48, 4},
                           {1024, 32768}, {128256, 4096}, {576, 1536}};
  for (const auto& [out, in] : shapes) {
    for (int tokens : {1, 2, 3, 4}) {
      for (ElementType type : {ElementType::kBFloat16, ElementType::kE4M3}) {
        for (const GemmDevice device : {GemmDevice{9, 132}, GemmDevice{8, 108}, GemmDevice{12, 170}}) {
          const GatherProblem problem{tokens, out, in, type, {8, 16}, device};
          const GatherConfig config = select_gather_config(problem);
          const std::string what = std::to_string(tokens) + " x " + std::to_string(out) + " x " + std::to_string(in);
          // Without clusters a block selects from all inputs, which must fit its shared memory.
          if (device.compute_capability_major != 9 && compiled_tokens(tokens) * in > 12000) {
            check(config.splits == 0 || is_valid(problem, config), "a configuration or none for " + what);
            continue;
          }
          check(config.splits > 0 && is_valid(problem, config), "a configuration for " + what);
          if (config.splits == 0) continue;
          check(device.compute_capability_major == 9 || config.splits == 1, "clusters only on 9.0, " + what);
          check((config.splits - 1) * slice_features(in, config.splits) < in, "no empty slice, " + what);
          const int tiles = ceil_div(out, config.lanes * outputs_per_lane(type)), blocks = tiles * config.splits;
          const bool large = double(out) * in >= 4096 * 4096 && device.compute_capability_major == 9;
          if (tokens == 1 && large) check(blocks <= resident_blocks(problem, config), "one wave, " + what);
          if (large && out >= 4096) check(blocks >= 0.7 * device.multiprocessors, "enough blocks, " + what);
          if (std::getenv("VERBOSE") != nullptr && device.compute_capability_major == 9)
            std::printf("%s type %d: lanes %d splits %d threads %d, %d blocks, %d bytes shared\n", what.c_str(),
                        int(type), config.lanes, config.splits, config.threads, blocks, shared_bytes(problem, config));
        }
      }
    }
  }
  check(gather_pays(ElementType::kBFloat16, {8, 16}, 4), "four tokens at half");
  check(!gather_pays(ElementType::kBFloat16, {12, 16}, 4), "four tokens at three quarters");
  check(gather_pays(ElementType::kInt8, {12, 16}, 4), "8-bit weights always");
}

}  // namespace

int main() {
  run_cases();
  check_configs();
  std::printf("%ld checks, %ld failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
