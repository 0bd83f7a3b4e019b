// The latest results of a pure function whose search costs the host more than a lookup.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

namespace nm_act {

// Two entries for each value of the first bits of hash_of, the one used last in front. `holds` compares a key with the
// one that is looked up, which is not the key that is all zeros.
template <class Key, class Value, int kBits>
class Latest {
 public:
  template <class Holds, class Compute>
  Value find(const Key& key, uint64_t hash, const Holds& holds, const Compute& compute) {
    auto& [latest, earlier] = entries_[hash >> (64 - kBits)];
    if (holds(latest.first)) return latest.second;
    std::swap(latest, earlier);
    if (!holds(latest.first)) latest = {key, compute()};
    return latest.second;
  }

 private:
  std::array<std::array<std::pair<Key, Value>, 2>, 1 << kBits> entries_{};
};

// A number that depends on all of these and on their order.
template <class... Facts>
uint64_t hash_of(Facts... facts) {
  uint64_t hash = 0;
  ((hash = (hash ^ static_cast<uint64_t>(facts)) * 0x9E3779B97F4A7C15u), ...);
  return hash;
}

}  // namespace nm_act
