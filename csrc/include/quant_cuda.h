// The C ABI of libquant_cuda.so. The library loads, and says what is wrong, on a machine that has
// no driver and no GPU.
//
// Every function that can fail returns a status: QUANT_CUDA_OK, or one of our own negative
// QuantCudaStatus, or a positive cudaError_t as it came.
#ifndef QUANT_CUDA_H_
#define QUANT_CUDA_H_

#define QUANT_CUDA_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CUDA_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCudaStatus {
  QUANT_CUDA_OK = 0,
  QUANT_CUDA_NULL_POINTER = -1,
  QUANT_CUDA_NO_DRIVER = -2,
  QUANT_CUDA_DRIVER_TOO_OLD = -3,
  QUANT_CUDA_NO_DEVICE = -4,
};

// QUANT_CUDA_ABI_VERSION of the library, as opposed to that of this header.
QUANT_CUDA_API int quant_cuda_abi_version(void);

// One English sentence for a status, CUDA's own where it is CUDA's; static storage, never null.
QUANT_CUDA_API const char* quant_cuda_error_string(int status);

// *count = the number of visible GPUs; 0 with QUANT_CUDA_NO_DRIVER, _DRIVER_TOO_OLD or _NO_DEVICE.
// Starts the driver in this process: a process forked afterwards cannot use CUDA.
QUANT_CUDA_API int quant_cuda_device_count(int* count);

// (*major, *minor) = compute capability of a visible GPU, (9, 0) for Hopper.
QUANT_CUDA_API int quant_cuda_device_capability(int device, int* major, int* minor);

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CUDA_H_
