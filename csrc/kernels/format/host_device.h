// Lets one definition serve nvcc (host and device) and a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define NM_ACT_HOST_DEVICE __host__ __device__
#define NM_ACT_UNROLL _Pragma("unroll")
#else
#define NM_ACT_HOST_DEVICE
#define NM_ACT_UNROLL
#endif

// Internal linkage: every source gets a copy of its own, so a host copy that was compiled for a wide instruction set
// never stands in for that of another source.
#if defined(__CUDACC__)
#define NM_ACT_LOCAL static __host__ __device__ __forceinline__
#else
#define NM_ACT_LOCAL static inline
#endif
