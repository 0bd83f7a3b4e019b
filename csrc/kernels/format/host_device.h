// Lets one definition serve nvcc (host and device) and a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define NM_ACT_HOST_DEVICE __host__ __device__
#else
#define NM_ACT_HOST_DEVICE
#endif
