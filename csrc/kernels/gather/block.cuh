// The block and cluster operations of the gather kernel. tests/native/emulate_cuda.h implements them for host builds.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

namespace nm_act {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// A split barrier over the cluster: what a block writes to any block's shared memory before it arrives is visible to
// every thread that has waited. Every thread must arrive and wait.
__device__ __forceinline__ void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to the address in block `rank`'s shared memory that corresponds to `local` in this block's.
__device__ __forceinline__ void write_peer(float* local, int rank, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  *local = value;
#endif
}

// Prefetches a line to L2. L2 is coherent, so this is allowed before wait_for_previous_kernel(). Any address is valid.
__device__ __forceinline__ void prefetch_line(const void* source) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

// The same, for data that is read at the end of a kernel that streams more than L2 holds.
__device__ __forceinline__ void prefetch_kept_line(const void* source) {
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(source));
}

// The L2 policy of weights: each byte is read once per step, so it is evicted before the vectors that every layer
// reads.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Loads 16 bytes of a weight without allocating in L1: each byte is read once.
__device__ __forceinline__ uint4 load_weight(const void* source, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source), "l"(policy));
  return v;
}

}  // namespace nm_act

#endif
