// Launches that may overlap the end of the previous kernel on the stream (programmatic dependent launch on compute
// capability 9; ordinary launches elsewhere). Such a kernel calls wait_for_previous_kernel() before it touches global
// memory, and allow_next_kernel() as soon as it may share the device: once every block has called it, blocks of the
// next kernel occupy multiprocessors as they become free. This hides 1 to 2 us of launch and ramp-up; a 4096 x 4096
// compression takes 12 us. In host builds tests/native/emulate_cuda.h defines these functions.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace nm_act {

// Shape of a launch. `cluster` consecutive blocks form a thread-block cluster (1: no clusters); `shared_bytes` is
// dynamic shared memory. `overlaps` must be false for a kernel that does not call wait_for_previous_kernel().
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

// An attribute of the current device, queried once per device; 0 if the query fails.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not queried yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0 && cudaDeviceGetAttribute(&value, kAttribute, device) == cudaSuccess) {
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

// Whether the current device overlaps launches. Only compute capability 9 does: later devices run the compute_80 PTX,
// which has no griddepcontrol.
inline bool launches_overlap() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }

// Clears the runtime's last error when its status is returned, or the next kernel's check would report it again.
inline cudaError_t forget(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedWithoutAsking) {
    // The most that a block may have, not what this launch needs: the attribute belongs to the kernel, and a thread
    // that lowered it would make another thread's launch fail. These kernels have no static shared memory, which would
    // count towards the limit.
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
