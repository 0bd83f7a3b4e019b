// Launches that may overlap the end of the kernel before them on the stream (programmatic dependent launch, compute
// capability 9; elsewhere ordinary launches). A kernel launched so calls wait_for_previous_kernel() before it
// touches global memory, and allow_next_kernel() once its blocks are all running: from then on the next kernel's blocks
// take multiprocessors as they become free. It hides 1 to 2 us of launch and ramp, of 12 that a 4096 x 4096 compression
// takes. Where nvcc does not compile, tests/native/emulate_cuda.h launches and waits.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace nm_act {

// Blocks of a launch; `cluster` consecutive ones share memory (1: no clusters), `shared_bytes` is dynamic. A kernel
// that does not wait for the one before must not overlap it.
struct LaunchShape {
  unsigned blocks;
  int threads;
  unsigned cluster = 1;
  int shared_bytes = 0;
  bool overlaps = true;
};

#if defined(__CUDACC__)

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

// An attribute of the current device, asked for once a device; 0 if it cannot be had.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0 && cudaDeviceGetAttribute(&value, kAttribute, device) == cudaSuccess) {
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Does the current device overlap launches? Not beyond 9: there the PTX of compute_80 runs, which has no
// griddepcontrol.
inline bool launches_overlap() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }

// A status that is returned is not left behind as the runtime's last error, which the next kernel's check would report.
inline cudaError_t forget(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    // Always all that a block may have, not this launch's share: the attribute belongs to the kernel, and a thread that
    // lowers it makes another's launch fail. Such kernels have no static shared memory, which counts too.
    const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    most > shape.shared_bytes ? most : shape.shared_bytes);
    if (status != cudaSuccess) return forget(status);
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.overlaps && launches_overlap()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  return forget(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

#else

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments);

#endif

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_kernel(kernel, LaunchShape{blocks, threads}, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace nm_act
