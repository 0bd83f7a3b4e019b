// What the GEMMs need to know of a device, and error texts: the callers link no CUDA runtime of their own.
#include "nm_act.h"

namespace nm_act {

cudaError_t query_gemm_device(int device, GemmDevice* result) {
  cudaError_t status =
      cudaDeviceGetAttribute(&result->compute_capability_major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&result->multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

const char* cuda_error_text(cudaError_t status) { return cudaGetErrorString(status); }

}  // namespace nm_act
