// What the statuses of all CUDA libraries have in common.
#pragma once

#include <cuda_runtime_api.h>

namespace quant {

constexpr int kNoDriver = -2;
constexpr int kDriverTooOld = -3;
constexpr int kNoDevice = -4;

// 0, one of the above, or the error itself. CUDA has one code for "there is no driver" and "the
// driver is older than this runtime": people need to know which.
inline int explain(cudaError_t error) {
  if (error == cudaSuccess) return 0;
  cudaGetLastError();  // reported here; a later call must not find it again
  if (error == cudaErrorNoDevice) return kNoDevice;
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 ? kNoDriver : kDriverTooOld;
  }
  return static_cast<int>(error);
}

// A sentence for 0, the above, CUDA's errors and what is unknown; static storage, never null.
inline const char* sentence(int status) {
  switch (status) {
    case 0:
      return "no error";
    case kNoDriver:
      return "there is no NVIDIA driver";
    case kDriverTooOld:
      return "the NVIDIA driver is older than the CUDA runtime that this library was built with";
    case kNoDevice:
      return "there is an NVIDIA driver, but no visible GPU";
    default:
      return status < 0 ? "unknown status" : cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

}  // namespace quant
