// What the emulated threads of emulate_cuda.h, which includes this, call: coordinates, barriers, exchanges within a warp
// and a cluster, intrinsics, loads, tensor cores.
#pragma once

// Objects, not macros: CUDA's headers have members of these names.
struct Coordinate {
  unsigned (*read)();
  operator unsigned() const { return read(); }
};
struct Coordinates {
  Coordinate x;
};
inline constexpr Coordinates threadIdx{{[] { return emulation::self().thread; }}};
inline constexpr Coordinates blockIdx{{[] { return emulation::self().block; }}};
inline constexpr Coordinates blockDim{{[] { return static_cast<unsigned>(emulation::cluster->threads); }}};

inline void __syncthreads() { emulation::wait_for(emulation::Wait::kBlock); }

// Every lane shows a value, then reads what the others showed: read(lane) gives that of a lane. Of two slots used in
// turn, one is free again when all lanes show the next.
template <class T, class Combine>
auto exchange_in_warp(T shown, const Combine& combine) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (emulation::cluster->threads % 32 != 0) {
    std::printf("FAILED: a warp without all of its lanes exchanges values\n");
    std::exit(1);
  }
  emulation::Fiber& own = emulation::self();
  const int turn = own.turn;
  own.turn ^= 1;
  std::memcpy(&own.slot[turn], &shown, sizeof shown);
  emulation::wait_for(emulation::Wait::kWarp);
  return combine([turn](int lane) {
    T value;
    std::memcpy(&value, &emulation::lane_of_warp(lane).slot[turn], sizeof value);
    return value;
  });
}

inline void __syncwarp() { emulation::wait_for(emulation::Wait::kWarp); }

inline int lane_in_warp() { return static_cast<int>(emulation::self().thread) % 32; }

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return exchange_in_warp<uint32_t>(predicate, [](const auto& read) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= read(lane) << lane;
    return mask;
  });
}

template <class T>
T __shfl_sync(uint32_t, T value, int source) {
  return exchange_in_warp(value, [=](const auto& read) { return read(source % 32); });
}

template <class T>
T __shfl_up_sync(uint32_t, T value, int distance) {
  const int source = lane_in_warp() - distance;
  return exchange_in_warp(value, [=](const auto& read) { return source < 0 ? value : read(source); });
}

template <class T>
T __shfl_down_sync(uint32_t, T value, int distance) {
  const int source = lane_in_warp() + distance;
  return exchange_in_warp(value, [=](const auto& read) { return source > 31 ? value : read(source); });
}

template <class T>
T __shfl_xor_sync(uint32_t, T value, int bits) {
  const int source = lane_in_warp() ^ bits;
  return exchange_in_warp(value, [=](const auto& read) { return read(source); });
}

inline bool __any_sync(uint32_t lanes, bool predicate) { return __ballot_sync(lanes, predicate) != 0; }

inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  return exchange_in_warp(value, [](const auto& read) {
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += read(lane);
    return sum;
  });
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return exchange_in_warp(value, [](const auto& read) {
    uint32_t largest = 0;
    for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, read(lane));
    return largest;
  });
}

// Approximations on a device; exact here, but for the range in which the quotient is 0.
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f ? x * 0.0f : x / y; }
inline float __expf(float x) { return std::exp(x); }

// One fiber runs at a time.
inline uint32_t atomicAdd(uint32_t* sum, uint32_t value) {
  const uint32_t before = *sum;
  *sum += value;
  return before;
}

// Four of the eight bytes of two words, by the selector's nibbles.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline int __clz(int word) { return word == 0 ? 32 : __builtin_clz(static_cast<unsigned>(word)); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T>
T __ldg(const T* source) {
  return *source;
}

template <class T>
T __ldcs(const T* source) {
  return *source;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a < b ? b : a; }

namespace nm_act {

inline unsigned char* dynamic_shared() {
  const int block = emulation::self().index / emulation::cluster->threads;
  return reinterpret_cast<unsigned char*>(emulation::cluster->shared[block].data());
}

// The later of a barrier's two halves stops a thread: what it does in between may come at any time on a device.
inline void change_arrived(bool before) {
  if (emulation::self().arrived == before) {
    emulation::self().arrived = !before;
    return;
  }
  std::printf("FAILED: a thread arrives at its cluster and waits for it, in turn\n");
  std::exit(1);
}

inline void arrive_at_cluster() { change_arrived(false); }

inline void wait_for_cluster() {
  change_arrived(true);
  emulation::wait_for(emulation::Wait::kCluster);
}

inline void write_peer(float* local, int rank, float value) {
  const auto offset = reinterpret_cast<const unsigned char*>(local) - dynamic_shared();
  std::memcpy(reinterpret_cast<unsigned char*>(emulation::cluster->shared[rank].data()) + offset, &value, sizeof value);
}

inline void prefetch_line(const void*) {}

inline void prefetch_kept_line(const void*) {}
inline uint64_t read_once_policy() { return 0; }
inline uint4 load_weight(const void* source, uint64_t) { return *static_cast<const uint4*>(source); }

// What the lanes of a warp show, two words each.
inline std::vector<uint64_t> words_of_warp(uint32_t first, uint32_t second) {
  return exchange_in_warp(uint64_t{second} << 32 | first, [](const auto& read) {
    std::vector<uint64_t> words(32);
    for (int lane = 0; lane < 32; ++lane) words[lane] = read(lane);
    return words;
  });
}

// Tensor cores. Lane 4 * i + j has rows i and 8 + i of a and column i of b, of the 16 products those of 2 * j and 8 + 2
// * j and the next of each, and of c columns 2 * j and 2 * j + 1 of its two rows.
template <class E>
void multiply_tile(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const std::vector<uint64_t> a[2] = {words_of_warp(a0, a2), words_of_warp(a1, a3)}, b = words_of_warp(b0, b1);
  const int row = lane_in_warp() / 4, column = lane_in_warp() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const uint64_t left = a[i / 2][4 * row + j], right = b[4 * (column + i % 2) + j];
      for (int half = 0; half < 64; half += 32) {
        const uint32_t x = static_cast<uint32_t>(left >> half), y = static_cast<uint32_t>(right >> half);
        c[i] += E::low(x) * E::low(y) + E::high(x) * E::high(y);
      }
    }
  }
}

}  // namespace nm_act
