#include <cuda_runtime_api.h>

#include "cuda/status.h"
#include "quant_cuda.h"

static_assert(QUANT_CUDA_NO_DRIVER == quant::kNoDriver &&
              QUANT_CUDA_DRIVER_TOO_OLD == quant::kDriverTooOld &&
              QUANT_CUDA_NO_DEVICE == quant::kNoDevice);

int quant_cuda_abi_version(void) { return QUANT_CUDA_ABI_VERSION; }

const char* quant_cuda_error_string(int status) {
  return status == QUANT_CUDA_NULL_POINTER ? "a pointer is null" : quant::sentence(status);
}

int quant_cuda_device_count(int* count) {
  if (count == nullptr) return QUANT_CUDA_NULL_POINTER;
  *count = 0;
  int found = 0;
  const int status = quant::explain(cudaGetDeviceCount(&found));
  if (status == QUANT_CUDA_OK) *count = found;
  return status;
}

int quant_cuda_device_capability(int device, int* major, int* minor) {
  if (major == nullptr || minor == nullptr) return QUANT_CUDA_NULL_POINTER;
  const int status =
      quant::explain(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
  if (status != QUANT_CUDA_OK) return status;
  return quant::explain(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
}
