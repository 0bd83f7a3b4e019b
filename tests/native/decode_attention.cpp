// launch_decode_attention with its kernel's own source, run on the host (emulate_cuda.h), against a softmax in float64:
// the new token's key and value in the cache bit for bit, nothing else changed, lengths out of range beside valid ones.
// What lies beyond a sequence's length is NaN, what lies beyond the cache is unreadable. Without norms of the heads,
// which exchange values in parts of a warp. Prints "N checks, 0 failed"; exits 1 on a mismatch.
#include "emulate_cuda.h"
// After it: the kernel.
#include "kernels/attention/decode_attention.cu"
#include "operands.h"

namespace {

using namespace operands;

struct Case {
  ElementType type;
  int q_heads, k_heads, dim, max_tokens, window;
  bool one_angle;  // of all sequences
  std::vector<int> lengths;
  unsigned resident_blocks;
};

std::string describe(const Case& c) {
  std::string lengths;
  for (int length : c.lengths) lengths += " " + std::to_string(length);
  return "type " + std::to_string(int(c.type)) + ", " + std::to_string(c.q_heads) + " and " +
         std::to_string(c.k_heads) + " heads of " + std::to_string(c.dim) + ", cache " + std::to_string(c.max_tokens) +
         ", window " + std::to_string(c.window) + ", resident " + std::to_string(c.resident_blocks) + ", lengths" +
         lengths;
}

bool is_valid(const Case& c, int sequence) { return c.lengths[sequence] >= 1 && c.lengths[sequence] <= c.max_tokens; }

void fill(Rows& rows) {
  for (int64_t t = 0; t < rows.tokens; ++t) {
    for (int k = 0; k < rows.in_features; ++k) rows.set(t, k, encode(normal(), rows.type));
  }
}

float value_of(const Rows& rows, int64_t row, int feature) { return decode(rows.bits(row, feature), rows.type); }

// The bits of a rotated feature of the head that begins at `first` of a row.
uint32_t rotated(const Rows& x, int64_t row, int first, int feature, int dim, const Rows& cos, const Rows& sin,
                 int64_t angle) {
  const bool low = feature < dim / 2;
  const float other = value_of(x, row, first + (low ? feature + dim / 2 : feature - dim / 2));
  const auto product = [&](float a, float b) { return decode(encode(a * b, x.type), x.type); };
  return encode(product(value_of(x, row, first + feature), value_of(cos, angle, feature)) +
                    product(low ? -other : other, value_of(sin, angle, feature)),
                x.type);
}

struct Operands {
  explicit Operands(const Case& c)
      : batch(int(c.lengths.size())),
        q(batch, c.q_heads * c.dim, c.type, 8, 0),
        k(batch, c.k_heads * c.dim, c.type, 16, 0),
        v(batch, c.k_heads * c.dim, c.type, 24, 0),
        cos(c.one_angle ? 1 : batch, c.dim, c.type, 0, 0),
        sin(c.one_angle ? 1 : batch, c.dim, c.type, 0, 0),
        keys(int64_t{batch} * c.k_heads * c.max_tokens, c.dim, c.type, 0, 0),
        values(int64_t{batch} * c.k_heads * c.max_tokens, c.dim, c.type, 0, 0),
        y(batch, c.q_heads * c.dim, c.type, 0, 0) {
    for (Rows* rows : {&q, &k, &v, &cos, &sin, &keys, &values}) fill(*rows);
    for (int64_t row = 0; row < keys.tokens; ++row) {
      const int sequence = int(row / (c.k_heads * c.max_tokens)), place = int(row % c.max_tokens);
      if (!is_valid(c, sequence) || place < c.lengths[sequence] - 1) continue;
      for (Rows* cache : {&keys, &values}) {
        for (int i = 0; i < c.dim; ++i) cache->set(row, i, any_nan(c.type));
      }
    }
  }
  int batch;
  Rows q, k, v, cos, sin, keys, values, y;
};

DecodeAttentionParams params_of(const Case& c, const Operands& o) {
  DecodeAttentionParams params{};
  params.q = o.q.memory.data();
  params.k = o.k.memory.data();
  params.v = o.v.memory.data();
  params.q_stride = o.q.stride;
  params.k_stride = o.k.stride;
  params.v_stride = o.v.stride;
  params.cos = o.cos.memory.data();
  params.sin = o.sin.memory.data();
  params.cos_batch = int(o.cos.tokens);
  params.keys = o.keys.memory.data();
  params.values = o.values.memory.data();
  params.y = o.y.memory.data();
  params.scaling = 1 / std::sqrt(float(c.dim));
  params.window = c.window;
  params.batch = o.batch;
  params.q_heads = c.q_heads;
  params.k_heads = c.k_heads;
  params.max_tokens = c.max_tokens;
  params.dim = c.dim;
  params.type = c.type;
  return params;
}

// Writes the new keys and values of valid sequences, as the kernel should.
void write_new(const Case& c, Operands& o) {
  for (int sequence = 0; sequence < o.batch; ++sequence) {
    if (!is_valid(c, sequence)) continue;
    for (int head = 0; head < c.k_heads; ++head) {
      const int64_t row = (int64_t{sequence} * c.k_heads + head) * c.max_tokens + c.lengths[sequence] - 1;
      for (int i = 0; i < c.dim; ++i) {
        o.keys.set(row, i, rotated(o.k, sequence, head * c.dim, i, c.dim, o.cos, o.sin, c.one_angle ? 0 : sequence));
        o.values.set(row, i, o.v.bits(sequence, head * c.dim + i));
      }
    }
  }
}

// How far the output of a query head is off, as a share of what rounding the probabilities and the output may cost.
double error_of(const Case& c, const Operands& o, int sequence, int head) {
  const int length = c.lengths[sequence], first = c.window > 0 ? std::max(0, length - c.window) : 0;
  const int64_t begin = (int64_t{sequence} * c.k_heads + head / (c.q_heads / c.k_heads)) * c.max_tokens;
  std::vector<double> score;
  double top = -INFINITY, sum = 0;
  for (int token = first; token < length; ++token) {
    double dot = 0;
    for (int i = 0; i < c.dim; ++i) {
      const uint32_t query = rotated(o.q, sequence, head * c.dim, i, c.dim, o.cos, o.sin, c.one_angle ? 0 : sequence);
      dot += double{decode(query, c.type)} * value_of(o.keys, begin + token, i);
    }
    score.push_back(dot / std::sqrt(double(c.dim)));
    top = std::max(top, score.back());
  }
  for (double& each : score) sum += each = std::exp(each - top);
  double worst = 0;
  for (int i = 0; i < c.dim; ++i) {
    double exact = 0, size = 0;
    for (int token = first; token < length; ++token) {
      const double part = score[token - first] / sum * value_of(o.values, begin + token, i);
      exact += part;
      size += std::fabs(part);
    }
    const double allowed = (size + std::fabs(exact)) * (c.type == kBf16 ? 0x1p-8 : 0x1p-11) + 1e-5;
    const double error = std::fabs(value_of(o.y, sequence, head * c.dim + i) - exact) / allowed;
    if (!(error <= worst)) worst = error;
  }
  return worst;
}

void run_case(const Case& c, unsigned splits) {
  current = describe(c);
  Operands o(c);
  Buffer lengths(c.lengths.size() * sizeof(int32_t));
  std::memcpy(lengths.data(), c.lengths.data(), lengths.size());
  DecodeAttentionParams params = params_of(c, o);
  params.lengths = lengths.data<int32_t>();
  const auto keys = o.keys.memory.copy(), values = o.values.memory.copy();
  emulation::resident_blocks = c.resident_blocks;
  check(launch_decode_attention(params, {9, 132}, nullptr) == cudaSuccess, "launch");
  check(emulation::last_cluster == splits, "clusters of " + std::to_string(emulation::last_cluster));
  const auto keys_after = o.keys.memory.copy(), values_after = o.values.memory.copy();
  std::memcpy(o.keys.memory.data(), keys.data(), keys.size());
  std::memcpy(o.values.memory.data(), values.data(), values.size());
  write_new(c, o);
  check(o.keys.memory.copy() == keys_after, "keys");
  check(o.values.memory.copy() == values_after, "values");
  for (int sequence = 0; sequence < o.batch; ++sequence) {
    for (int head = 0; head < c.q_heads; ++head) {
      if (is_valid(c, sequence)) {
        const double error = error_of(c, o, sequence, head);
        check(error <= 1.0,
              "off by " + std::to_string(error) + " of what is allowed, sequence " + std::to_string(sequence));
        continue;
      }
      bool all = true;
      for (int i = 0; i < c.dim; ++i) all &= is_nan(o.y.bits(sequence, head * c.dim + i), c.type);
      check(all, "NaN of sequence " + std::to_string(sequence));
    }
  }
  for (const Rows* rows : {&o.q, &o.k, &o.v, &o.keys, &o.values, &o.y}) {
    check(rows->memory.guards_are_intact(), "nothing beside the operands");
  }
}

void run_all() {
  const int heads[][2] = {{8, 1}, {3, 1}, {4, 2}, {2, 2}, {7, 1}};
  for (ElementType type : {kBf16, kFp16}) {
    for (int dim : {64, 128, 256}) {
      int step = 0;
      for (const auto& [q_heads, k_heads] : heads) {
        const bool one_angle = step % 2 == 0;
        // As many blocks at once as clusters of 16, of 8, of 4, of 2 and of 1 need.
        const unsigned splits = 16u >> step++ % 5;
        const std::vector<std::vector<int>> batches = {{1}, {17}, {300, 1}, {299, 33, 128}};
        for (const auto& lengths : batches) {
          const unsigned resident = unsigned(lengths.size() * k_heads) * splits;
          run_case({type, q_heads, k_heads, dim, 300, int(engine() % 3) * 20, one_angle, lengths, resident}, splits);
        }
        // Out of range: no length, one more than the cache has, far beyond, and the ends of the type.
        const std::vector<int> mixed = {8, 0, 9, 1, 1000, -1, 5, INT32_MAX, INT32_MIN};
        const unsigned resident = unsigned(mixed.size() * k_heads) * splits;
        run_case({type, q_heads, k_heads, dim, 8, 0, one_angle, mixed, resident}, splits);
        run_case({type, q_heads, k_heads, dim, 8, 3, one_angle, mixed, resident}, splits);
      }
    }
  }
  // Clusters run at once, or there are fewer blocks a cluster; many heads take whole blocks, in turn.
  run_case({kBf16, 2, 2, 64, 40, 0, true, {40, 7, 3, 9, 1, 2, 40, 8}, 127}, 4);  // 16 heads, 15 clusters of 8, 7 of 16
  run_case({kBf16, 2, 2, 64, 40, 0, true, {40, 7, 3, 9, 1, 2, 40, 8}, 128}, 8);
  run_case({kBf16, 2, 2, 64, 40, 0, true, {40, 7, 3, 9, 1, 2, 40, 8}, 3}, 1);
  check_every_kernel_ran(6);
}

}  // namespace

int main() { return run_checks(run_all); }
