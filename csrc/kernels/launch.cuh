// Launches that may overlap the end of the kernel before them on the stream (programmatic dependent launch, compute
// capability 9; elsewhere ordinary launches). A kernel launched so calls wait_for_previous_kernel() before it
// touches global memory, and allow_next_kernel() once its blocks are all running: from then on the next kernel's blocks
// take multiprocessors as they become free. It hides 1 to 2 us of launch and ramp, of 12 that a 4096 x 4096 compression
// takes.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace nm_act {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Does the current device overlap launches? Asked once a device.
inline bool launches_overlap() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0 unknown, 1 no, 2 yes
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    // Not beyond: there the PTX of compute_80 runs, which has no griddepcontrol.
    answer = major == 9 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// Blocks of a launch; `cluster` consecutive ones share memory (1: no clusters), `shared_bytes` is dynamic.
struct LaunchShape {
  unsigned blocks;
  int threads;
  unsigned cluster = 1;
  int shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (launches_overlap()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_kernel(kernel, LaunchShape{blocks, threads}, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace nm_act
