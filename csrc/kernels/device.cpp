// Device facts that the GEMMs need, and error texts: callers do not link the CUDA runtime themselves.
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
