// Enough of CUDA to run a kernel's source on a host: every thread of a cluster is a fiber that runs until its next
// barrier. Between barriers the fibers run in a random order, some only when the others can go no further, and so do
// the clusters of a launch: a missing barrier shows as a wrong result. Shared memory, dynamic or static, starts out as
// NaNs in every cluster; clusters run one after another. nm_act::launch_kernel is here, so launchers run as they are.
// Include it before any other header.
#pragma once

// With it, glibc refuses to jump from one stack to another.
#undef _FORTIFY_SOURCE
#include <cuda_runtime.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// What is thread-local lies in one place, also where templates declare it: poison_static_shared() finds it. All fibers
// run on one thread, so they share it.
#define __shared__ thread_local

#include "kernels/launch.cuh"

namespace emulation {

enum class Wait { kNothing, kWarp, kBlock, kCluster, kPreviousKernel, kForever };

struct Fiber {
  ucontext_t context;  // for its first step; from then on it continues at `here`
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  unsigned thread, block;
  int index;  // in the cluster
  bool started = false;
  Wait wait = Wait::kForever;
  uint64_t slot[2];  // what this lane shows to its warp, in turn
  int turn;
  bool arrived;  // at its cluster
};

struct Cluster {
  int threads;
  std::vector<std::vector<uint4>> shared;  // one a block
  std::function<void()> kernel;
};

inline Cluster* cluster = nullptr;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // of all clusters, one after another
inline Fiber* running = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;

// What the launches so far were, for tests of launchers.
inline long launches = 0;
inline std::set<const void*> kernels;
inline int most_threads = 0;
inline unsigned last_cluster = 0;  // blocks of a cluster of the last one
inline bool last_one_block = false;

// Blocks that run at once, for launchers that ask.
inline unsigned resident_blocks = 132;

// Hides global memory from a kernel that may still overlap the one before, if a test sets it.
inline void (*set_memory_visible)(bool) = nullptr;

inline Fiber& self() { return *running; }

inline void wait_for(Wait wait) {
  Fiber& fiber = self();
  fiber.wait = wait;
  if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}

inline Fiber& lane_of_warp(int lane) { return *fibers[self().index / 32 * 32 + lane]; }

inline void enter() {
  while (true) {
    cluster->kernel();
    wait_for(Wait::kForever);
  }
}

__attribute__((noinline)) inline void step(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  swapcontext(&scheduler_context, &fiber.context);
}

// Fibers [begin, end) all wait for this: let them run.
inline bool release(int begin, int end, Wait wait) {
  for (int i = begin; i < end; ++i) {
    if (fibers[i]->wait != wait) return false;
  }
  for (int i = begin; i < end; ++i) fibers[i]->wait = Wait::kNothing;
  return true;
}

// Shared memory of blocks that have left their cluster is gone.
inline void poison_blocks_that_left(Cluster& state) {
  for (size_t block = 0; block < state.shared.size(); ++block) {
    const auto begin = fibers.begin() + block * state.threads;
    const auto left = [](const std::unique_ptr<Fiber>& fiber) { return fiber->wait == Wait::kForever; };
    if (!std::all_of(begin, begin + state.threads, left)) continue;
    state.shared[block].assign(state.shared[block].size(), uint4{~0u, ~0u, ~0u, ~0u});
  }
}

inline int poison_thread_locals(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_TLS) std::memset(info->dlpi_tls_data, 0xFF, header.p_memsz);
  }
  return 1;  // the program itself comes first: the libraries' own are left alone
}

// Thread-local variables of the program are what kernels declare __shared__, and nothing else.
inline void poison_static_shared() { dl_iterate_phdr(poison_thread_locals, nullptr); }

inline void prepare_fibers(unsigned first_block, unsigned blocks, int threads) {
  constexpr size_t kStack = 64 * 1024;
  for (int i = 0; i < static_cast<int>(blocks) * threads; ++i) {
    if (i == static_cast<int>(fibers.size())) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.stack.reset(new char[kStack]);
      fiber.index = i;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, enter, 0);
    }
    Fiber& fiber = *fibers[i];
    fiber.thread = static_cast<unsigned>(i % threads);
    fiber.block = first_block + i / threads;
    fiber.wait = Wait::kNothing;
    fiber.turn = 0;
    fiber.arrived = false;
  }
}

// Half of the threads, or of the warps: until the next barrier they run when the others can go no further.
inline std::vector<bool> choose_late(int count, std::mt19937& random) {
  const int unit = random() % 2 == 0 ? 1 : 32;
  std::vector<bool> late(count);
  for (int i = 0; i < count; ++i) late[i] = i % unit == 0 ? random() % 2 == 0 : late[i - 1];
  return late;
}

inline void run_cluster(unsigned first_block, unsigned blocks, int threads, int shared_bytes, std::mt19937& random,
                        const std::function<void()>& kernel) {
  Cluster state{threads, {}, kernel};
  state.shared.assign(blocks, std::vector<uint4>((shared_bytes + 15) / 16, uint4{~0u, ~0u, ~0u, ~0u}));
  poison_static_shared();
  cluster = &state;
  prepare_fibers(first_block, blocks, threads);
  const int count = static_cast<int>(blocks) * threads;
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = i;
  std::vector<bool> late = choose_late(count, random);
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (int i : order) {
      if (fibers[i]->wait != Wait::kNothing || late[i]) continue;
      step(*fibers[i]);
      progress = true;
    }
    if (release(0, count, Wait::kForever)) break;
    if (blocks > 1) poison_blocks_that_left(state);
    if (release(0, count, Wait::kPreviousKernel)) {
      if (set_memory_visible != nullptr) set_memory_visible(true);
      progress = true;
    }
    bool is_phase_over = release(0, count, Wait::kCluster);
    for (int i = 0; i < count; i += threads) is_phase_over |= release(i, i + threads, Wait::kBlock);
    for (int i = 0; i < count; i += 32) progress |= release(i, std::min(i + 32, count), Wait::kWarp);
    if (is_phase_over) {
      late = choose_late(count, random);
    } else if (!progress) {
      if (std::find(late.begin(), late.end(), true) == late.end()) {
        std::printf("FAILED: the threads wait for different barriers\n");
        std::exit(1);
      }
      late.assign(count, false);
    }
  }
  cluster = nullptr;
}

}  // namespace emulation

namespace nm_act {

inline void wait_for_previous_kernel() { emulation::wait_for(emulation::Wait::kPreviousKernel); }
inline void allow_next_kernel() {}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t, Arguments&&... arguments) {
  if (shape.blocks == 0 || shape.blocks % shape.cluster != 0 || shape.threads < 1 || shape.threads > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  ++emulation::launches;
  emulation::kernels.insert(reinterpret_cast<const void*>(kernel));
  emulation::most_threads = std::max(emulation::most_threads, shape.threads);
  emulation::last_cluster = shape.cluster;
  emulation::last_one_block = shape.one_block;
  static std::mt19937 random(11);
  const std::tuple<Parameters...> parameters(arguments...);
  std::vector<unsigned> first_block(shape.blocks / shape.cluster);
  for (unsigned i = 0; i < first_block.size(); ++i) first_block[i] = i * shape.cluster;
  std::shuffle(first_block.begin(), first_block.end(), random);
  const auto set_visible = [](bool visible) {
    if (emulation::set_memory_visible != nullptr) emulation::set_memory_visible(visible);
  };
  for (unsigned first : first_block) {
    set_visible(!shape.overlaps);
    emulation::run_cluster(first, shape.cluster, shape.threads, shape.shared_bytes, random,
                           [&] { std::apply(kernel, parameters); });
    set_visible(true);
  }
  return cudaSuccess;
}

template <auto kKernel, int kCluster>
int resident_clusters(const LaunchShape&) {
  return static_cast<int>(emulation::resident_blocks / kCluster);
}

}  // namespace nm_act

#include "emulate_device.h"
