// Enough of CUDA to run a kernel's source on a host: every thread of a cluster is a fiber that runs until its next
// barrier. Between barriers the fibers run in a random order, so that a missing barrier shows as a wrong result, and
// shared memory starts out as NaNs. Include it before the kernel's headers.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

enum class Wait { kNothing, kWarp, kBlock, kCluster, kForever };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned thread, block;
  int index;  // in the cluster
  Wait wait = Wait::kNothing;
  uint32_t slot = 0;  // what this lane shows to its warp
};

struct Cluster {
  int threads;
  int shared_bytes;
  std::vector<Fiber> fibers;
  std::vector<std::vector<uint4>> shared;  // one a block
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
};

inline Cluster* cluster = nullptr;

inline Fiber& self() { return *cluster->running; }

inline void wait_for(Wait wait) {
  Fiber& fiber = self();
  fiber.wait = wait;
  swapcontext(&fiber.context, &cluster->scheduler);
}

inline Fiber& lane_of_warp(int lane) { return cluster->fibers[self().index / 32 * 32 + lane]; }

inline void enter() {
  cluster->kernel();
  wait_for(Wait::kForever);
}

// Fibers [begin, end) all wait for this: let them run.
inline bool release(int begin, int end, Wait wait) {
  for (int i = begin; i < end; ++i) {
    if (cluster->fibers[i].wait != wait) return false;
  }
  for (int i = begin; i < end; ++i) cluster->fibers[i].wait = Wait::kNothing;
  return true;
}

inline void run_cluster(unsigned first_block, unsigned blocks, int threads, int shared_bytes, std::mt19937& random,
                        const std::function<void()>& kernel) {
  constexpr size_t kStack = 64 * 1024;
  Cluster state{};
  state.threads = threads;
  state.shared_bytes = shared_bytes;
  state.kernel = kernel;
  state.shared.assign(blocks, std::vector<uint4>((shared_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u}));
  state.fibers = std::vector<Fiber>(blocks * threads);
  cluster = &state;
  const int count = static_cast<int>(state.fibers.size());
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = state.fibers[i];
    fiber.stack.reset(new char[kStack]);
    fiber.thread = static_cast<unsigned>(i % threads);
    fiber.block = first_block + i / threads;
    fiber.index = order[i] = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      if (state.fibers[i].wait != Wait::kNothing) continue;
      state.running = &state.fibers[i];
      swapcontext(&state.scheduler, &state.fibers[i].context);
    }
    if (release(0, count, Wait::kForever)) break;
    bool progress = release(0, count, Wait::kCluster);
    for (int i = 0; i < count; i += threads) progress |= release(i, i + threads, Wait::kBlock);
    for (int i = 0; i < count; i += 32) progress |= release(i, i + 32, Wait::kWarp);
    if (!progress) {
      std::printf("FAILED: the threads wait for different barriers\n");
      std::exit(1);
    }
  }
  cluster = nullptr;
}

}  // namespace emulation

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

// Every lane shows a word, then reads what the others showed.
template <class Read>
auto exchange_in_warp(uint32_t shown, const Read& read) {
  emulation::self().slot = shown;
  emulation::wait_for(emulation::Wait::kWarp);
  const auto result = read();
  emulation::wait_for(emulation::Wait::kWarp);
  return result;
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return exchange_in_warp(predicate, [] {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= emulation::lane_of_warp(lane).slot << lane;
    return mask;
  });
}

inline int __shfl_sync(uint32_t, int value, int source) {
  return exchange_in_warp(value, [=] { return static_cast<int>(emulation::lane_of_warp(source).slot); });
}

inline int __shfl_up_sync(uint32_t, int value, int distance) {
  const int lane = static_cast<int>(emulation::self().thread) % 32;
  return exchange_in_warp(
      value, [=] { return lane < distance ? value : static_cast<int>(emulation::lane_of_warp(lane - distance).slot); });
}

inline int __popc(uint32_t word) { return __builtin_popcount(word); }

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

namespace nm_act {

inline unsigned char* dynamic_shared() {
  const int block = emulation::self().index / emulation::cluster->threads;
  return reinterpret_cast<unsigned char*>(emulation::cluster->shared[block].data());
}

inline void sync_cluster() { emulation::wait_for(emulation::Wait::kCluster); }

inline void leave_cluster() { sync_cluster(); }

inline float2 read_peer(const float2* local, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(local) - dynamic_shared();
  float2 value;
  std::memcpy(&value, reinterpret_cast<const unsigned char*>(emulation::cluster->shared[rank].data()) + offset,
              sizeof value);
  return value;
}

inline uint4 load_weight(const void* source) { return *static_cast<const uint4*>(source); }

}  // namespace nm_act
