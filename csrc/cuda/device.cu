#include <cuda_runtime_api.h>

#include "quant_cuda.h"

namespace {

// CUDA has one code for "there is no driver" and "the driver is older than this runtime": people
// need to know which.
int explain(cudaError_t error) {
  if (error == cudaSuccess) return QUANT_CUDA_OK;
  cudaGetLastError();  // reported here; a later call must not find it again
  if (error == cudaErrorNoDevice) return QUANT_CUDA_NO_DEVICE;
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 ? QUANT_CUDA_NO_DRIVER : QUANT_CUDA_DRIVER_TOO_OLD;
  }
  return static_cast<int>(error);
}

}  // namespace

int quant_cuda_abi_version(void) { return QUANT_CUDA_ABI_VERSION; }

const char* quant_cuda_error_string(int status) {
  switch (status) {
    case QUANT_CUDA_OK:
      return "no error";
    case QUANT_CUDA_NULL_POINTER:
      return "a pointer is null";
    case QUANT_CUDA_NO_DRIVER:
      return "there is no NVIDIA driver";
    case QUANT_CUDA_DRIVER_TOO_OLD:
      return "the NVIDIA driver is older than the CUDA runtime that this library was built with";
    case QUANT_CUDA_NO_DEVICE:
      return "there is an NVIDIA driver, but no visible GPU";
    default:
      return status < 0 ? "unknown status" : cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

int quant_cuda_device_count(int* count) {
  if (count == nullptr) return QUANT_CUDA_NULL_POINTER;
  *count = 0;
  int found = 0;
  const int status = explain(cudaGetDeviceCount(&found));
  if (status == QUANT_CUDA_OK) *count = found;
  return status;
}

int quant_cuda_device_capability(int device, int* major, int* minor) {
  if (major == nullptr || minor == nullptr) return QUANT_CUDA_NULL_POINTER;
  const int status =
      explain(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
  if (status != QUANT_CUDA_OK) return status;
  return explain(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
}
