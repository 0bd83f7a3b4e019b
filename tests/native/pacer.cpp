// Clusters of launches in simulated time: what keeps them in step, what ends a wait, and how the counter is left.
#include "kernels/matmul/pacer.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <vector>

using nm_act::Pacer;

namespace {

long checks = 0, failed = 0;
void check(bool ok, const char* what) {
  ++checks;
  if (!ok && ++failed <= 10) std::printf("FAILED: %s\n", what);
}

// Fibers, of which the one with the earliest time runs.
class Simulation {
 public:
  void start(double time, std::function<void()> run) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.time = time, fiber.run = std::move(run), fiber.stack.resize(64 * 1024);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Simulation::enter), 0);
  }
  void run() {
    current_simulation = this;
    for (;;) {
      running_ = nullptr;
      for (const auto& fiber : fibers_) {
        if (!fiber->ended && (running_ == nullptr || fiber->time < running_->time)) running_ = fiber.get();
      }
      if (running_ == nullptr) return;
      swapcontext(&scheduler_, &running_->context);
    }
  }
  void pass(double time) {
    running_->time += time;
    swapcontext(&running_->context, &scheduler_);
  }
  double now() const { return running_->time; }

 private:
  struct Fiber {
    double time;
    bool ended = false;
    std::function<void()> run;
    ucontext_t context;
    std::vector<char> stack;
  };
  static void enter() {
    Fiber& fiber = *current_simulation->running_;
    fiber.run();
    fiber.ended = true;
  }
  static Simulation* current_simulation;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_;
  Fiber* running_ = nullptr;
};
Simulation* Simulation::current_simulation = nullptr;

constexpr double kReadClocks = 100, kTileClocks = 600;

struct Memory {
  unsigned arrived = 0, done = 0;
  bool as_found() const { return arrived == 0 && done == 0; }
};

struct Counter {
  Memory* memory;
  Simulation* simulation;
  void count() { ++memory->arrived; }
  unsigned counts() {
    simulation->pass(kReadClocks);
    return memory->arrived;
  }
  bool leave(unsigned clusters) {
    if (++memory->done < clusters) return false;
    memory->done = 0;
    return true;
  }
  void clear() { memory->arrived = 0; }
  unsigned now() { return static_cast<unsigned>(static_cast<int64_t>(simulation->now())); }
};

struct Launch {
  unsigned clusters;
  uint32_t waves, k_tiles;  // waves of all clusters; k-tiles of a tile
  bool paced = true;
};

struct Outcome {
  double end = 0, furthest = 0;  // furthest: k-tiles ahead of the mean, of a cluster in step
  int alone = 0;                 // clusters that ran out of patience
};

// Adds the clusters of a launch to a simulation. slower: how much longer than kTileClocks a cluster's k-tiles take;
// starts: when it begins.
void add(Simulation& simulation, Memory& memory, const Launch& launch, Outcome& outcome, std::mt19937& random,
         const std::function<double(unsigned)>& slower, const std::function<double(unsigned)>& starts) {
  auto progress = std::make_shared<std::vector<uint32_t>>(launch.clusters, 0);
  const uint32_t steps = launch.paced ? launch.waves * launch.k_tiles : 0;
  for (unsigned cluster = 0; cluster < launch.clusters; ++cluster) {
    const double clocks = kTileClocks * (1 + slower(cluster));
    simulation.start(starts(cluster), [=, &simulation, &memory, &outcome, &random] {
      bool alone = false;
      // One more tile than all clusters have, for every other one.
      const uint32_t tiles = launch.waves + cluster % 2;
      for (uint32_t tile = 0; tile < tiles; ++tile) {
        Pacer<Counter> pacer({&memory, &simulation}, launch.clusters, steps);
        for (uint32_t i = 0; i < launch.k_tiles; ++i) {
          const uint32_t k_tile = tile * launch.k_tiles + i;
          if (!alone && !pacer.step(k_tile)) alone = true, ++outcome.alone;
          if (k_tile < steps && !alone) {
            double mean = 0;
            for (const uint32_t each : *progress) mean += each;
            outcome.furthest = std::max(outcome.furthest, k_tile - mean / launch.clusters);
          }
          simulation.pass(clocks * std::uniform_real_distribution<>(0.7, 1.3)(random));
          (*progress)[cluster] = k_tile + 1;
        }
        pacer.finish(tile * launch.k_tiles, launch.k_tiles);
      }
      outcome.end = std::max(outcome.end, simulation.now());
    });
  }
}

Outcome run(Memory& memory, const Launch& launch, std::mt19937& random, const std::function<double(unsigned)>& slower,
            const std::function<double(unsigned)>& starts) {
  Simulation simulation;
  Outcome outcome;
  add(simulation, memory, launch, outcome, random, slower, starts);
  simulation.run();
  return outcome;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const auto at_once = [](unsigned) { return 0.0; };
  const auto alike = [](unsigned) { return 0.0; };
  Memory memory;
  for (int repeat = 0; repeat < 300; ++repeat) {
    const auto draw = [&](unsigned low, unsigned high) {
      return std::uniform_int_distribution<unsigned>(low, high)(random);
    };
    Launch launch{draw(2, 12), draw(2, 6), draw(1, 90)};
    const uint32_t counts = (launch.waves * launch.k_tiles + 7) / Pacer<Counter>::kPeriod;

    // Clusters of one speed: none runs out of patience, and reading the counter is all that it costs.
    const Outcome even = run(memory, launch, random, alike, at_once);
    check(even.alone == 0, "none is left alone");
    check(memory.as_found(), "the counter is as it was found");
    launch.paced = false;
    const Outcome free = run(memory, launch, random, alike, at_once);
    launch.paced = true;
    check(even.end < free.end * 1.1 + counts * kReadClocks * 2 + 16 * kTileClocks, "even clusters hardly wait");

    // Of several speeds: the fast ones stay within two counts of the mean, however long the launch, or gave up.
    std::vector<double> speeds(launch.clusters);
    for (double& speed : speeds) speed = std::uniform_real_distribution<>(0, 0.3)(random);
    const auto uneven = [&](unsigned cluster) { return speeds[cluster]; };
    const Outcome mixed = run(memory, launch, random, uneven, at_once);
    check(mixed.furthest <= 2 * Pacer<Counter>::kPeriod, "none gets far ahead of the mean");
    check(memory.as_found(), "the counter is as it was found by uneven clusters");

    // One that starts after the others ended: they wait once, and it finds what it needs.
    const unsigned late = draw(0, launch.clusters - 1);
    const double end = free.end * 2 + launch.clusters * double{Pacer<Counter>::kPatience};
    const auto starts = [&](unsigned cluster) { return cluster == late ? end : 0.0; };
    const Outcome waited = run(memory, launch, random, alike, starts);
    check(waited.alone <= static_cast<int>(launch.clusters), "each gives up once at most");
    // The others' counts make up for those of one until it is as many behind as there are clusters.
    check(counts <= launch.clusters + 1 || waited.alone > 0, "and some do");
    check(waited.end < end + free.end * 2 + Pacer<Counter>::kPatience, "the late one is not kept");
    check(memory.as_found(), "the counter is as it was found by late clusters");

    // Two launches in one slot.
    Simulation both;
    Outcome first, second;
    const double later = std::uniform_real_distribution<>(0, free.end)(random);
    add(both, memory, launch, first, random, uneven, at_once);
    add(both, memory, launch, second, random, alike, [&](unsigned) { return later; });
    both.run();
    check(memory.as_found(), "the counter is as it was found by two launches");
    check(std::max(first.end, second.end) < later + 3 * free.end + 2.0 * Pacer<Counter>::kPatience, "both end");
  }
  std::printf("%ld checks, %ld failed\n", checks, failed);
  return failed != 0;
}
