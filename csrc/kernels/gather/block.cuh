// What the decode kernel asks of its block and its cluster. tests/native/emulate_cuda.h answers the same on a host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

namespace nm_act {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// All blocks of the cluster, their writes to shared memory included.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// As sync_cluster, for blocks that are done: they have used what they read from others, and write nothing more for
// them. Without the fence, which would wait for the outputs to reach memory.
__device__ __forceinline__ void leave_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#endif
}

// What block `rank` of the cluster has where `local` is in this block's shared memory.
__device__ __forceinline__ float2 read_peer(const float2* local, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t remote;
  float2 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(remote) : "memory");
  return value;
#else
  return *local;
#endif
}

// 16 bytes of a weight, which is read once: not through L1.
__device__ __forceinline__ uint4 load_weight(const void* source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

}  // namespace nm_act

#endif
