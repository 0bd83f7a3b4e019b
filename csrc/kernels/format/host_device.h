// Lets one definition serve nvcc (host and device) and a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define NM_ACT_HOST_DEVICE __host__ __device__
#define NM_ACT_DEVICE __device__ __forceinline__
#define NM_ACT_UNROLL _Pragma("unroll")
#else
#define NM_ACT_HOST_DEVICE
#define NM_ACT_DEVICE inline
#define NM_ACT_UNROLL
#endif

// Internal linkage gives every translation unit its own copy, so the linker cannot replace one source's host copy by
// another's that was compiled for a wider instruction set.
#if defined(__CUDACC__)
#define NM_ACT_LOCAL static __host__ __device__ __forceinline__
#else
#define NM_ACT_LOCAL static inline
#endif
