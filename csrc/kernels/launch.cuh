// Launches that may overlap the end of the previous kernel on the stream (programmatic dependent launch on compute
// capability 9; ordinary launches elsewhere). Such a kernel calls wait_for_previous_kernel() before it reads or writes
// global memory (prefetches to L2, which is coherent, may come earlier), and allow_next_kernel() as soon as it may share
// the device. Once every block has called the latter, blocks of the next kernel occupy multiprocessors as they become
// free. This hides 1 to 2 us of launch and ramp-up; a 4096 x 4096 compression takes 12 us. In host builds
// tests/native/emulate_cuda.h defines these functions.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace nm_act {

// Shape of a launch. `cluster` consecutive blocks form a thread-block cluster (1: no clusters); `shared_bytes` is
// dynamic shared memory. `overlaps` must be false for a kernel that does not call wait_for_previous_kernel().
// `one_block`: multiprocessors are configured with the least shared memory that a block needs, and the rest as L1, so
// that usually no second block fits.
struct LaunchShape {
  unsigned blocks;
  int threads;
  unsigned cluster = 1;
  int shared_bytes = 0;
  bool overlaps = true;
  bool one_block = false;
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

// Clears the runtime's last error when a status is returned; otherwise the next kernel's check would report it again.
inline cudaError_t forget(cudaError_t status) {
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// The result of `query` for the current device, queried once per device and type of query; 0 if it fails.
template <class Query>
int once_per_device(const Query& query) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // one more than the value; 0: not queried yet
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  if (const int found = known[device].load(std::memory_order_relaxed)) return found - 1;
  int value = 0;
  if (forget(query(device, value)) != cudaSuccess) return 0;
  known[device].store(value + 1, std::memory_order_relaxed);
  return value;
}

// An attribute of the current device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  return once_per_device([](int device, int& value) { return cudaDeviceGetAttribute(&value, kAttribute, device); });
}

// Whether the current device overlaps launches. Only compute capability 9 does: later devices run the compute_80 PTX,
// which has no griddepcontrol.
inline bool launches_overlap() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }

// Allows a kernel more dynamic shared memory than the default limit.
template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), const LaunchShape& shape) {
  constexpr int kSharedWithoutAsking = 48 * 1024;
  if (shape.shared_bytes <= kSharedWithoutAsking) return cudaSuccess;
  // Sets the most that a block may have, not what this launch needs: the attribute belongs to the kernel, and a host
  // thread that lowered it would make another thread's launch fail. These kernels have no static shared memory, which
  // would count towards the limit.
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
  return forget(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most > shape.shared_bytes ? most : shape.shared_bytes));
}

// Allows a kernel clusters of more blocks than the portable limit.
template <class... Parameters>
cudaError_t allow_cluster(void (*kernel)(Parameters...), const LaunchShape& shape) {
  constexpr unsigned kPortable = 8;
  if (shape.cluster <= kPortable) return cudaSuccess;
  return forget(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

// Sets the attributes that a kernel needs before a launch of this shape.
template <class... Parameters>
cudaError_t allow_shape(void (*kernel)(Parameters...), const LaunchShape& shape) {
  const cudaError_t status = allow_cluster(kernel, shape);
  return status != cudaSuccess ? status : allow_shared_memory(kernel, shape);
}

// The shape as the runtime takes it; its cluster is the first of `attributes`.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = shape.cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  return config;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments) {
  const cudaError_t status = allow_shape(kernel, shape);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[3]{};
  cudaLaunchConfig_t config = launch_config(shape, attributes);
  config.stream = stream;
  if (shape.overlaps && launches_overlap()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
#if CUDART_VERSION >= 13000  // the oldest that this was built with
  if (shape.one_block) {
    attributes[config.numAttrs].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[config.numAttrs++].val.sharedMemCarveout = cudaSharedmemCarveoutMaxL1;
  }
#endif
  return forget(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// How many clusters of this shape the current device runs at once; 0 if it does not say. Asked once per device, kernel
// and size of a cluster: the kernel's other launches must have the same threads and shared memory. Nothing is enqueued,
// so a stream may be capturing.
template <auto kKernel, int kCluster>
int resident_clusters(const LaunchShape& shape) {
  return once_per_device([&](int, int& clusters) {
    const cudaError_t status = allow_shape(kKernel, shape);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(shape, &attribute);
    return cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
  });
}

#else

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                          Arguments&&... arguments);

template <auto kKernel, int kCluster>
int resident_clusters(const LaunchShape& shape);

#endif

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads, cudaStream_t stream,
                          Arguments&&... arguments) {
  return launch_kernel(kernel, LaunchShape{blocks, threads}, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace nm_act
