// The C ABI of libquant_cutlass.so: CUTLASS's INT4 x FP8 GEMM for Hopper, put together from its
// collectives. It is what our own kernels are measured against, and reads what vLLM's W4A8-FP8 path
// reads. It loads, and says what is wrong, on a machine that has no driver and no GPU.
//
//   out[m, n] = BF16(a[m] c[n] sum_k x[m, k] E4M3(q[n, k] t[n, k / group]) + bias[n])
//
// Every function that can fail returns a status: QUANT_CUTLASS_OK, or one of our own negative
// QuantCutlassStatus, or a positive cudaError_t as it came.
#ifndef QUANT_CUTLASS_H_
#define QUANT_CUTLASS_H_

#include <stdint.h>

#define QUANT_CUTLASS_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CUTLASS_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCutlassStatus {
  QUANT_CUTLASS_OK = 0,
  QUANT_CUTLASS_NULL_POINTER = -1,
  QUANT_CUTLASS_NO_DRIVER = -2,
  QUANT_CUTLASS_DRIVER_TOO_OLD = -3,
  QUANT_CUTLASS_NO_DEVICE = -4,
  QUANT_CUTLASS_UNKNOWN_TILE = -5,
  QUANT_CUTLASS_SIZE_OUT_OF_RANGE = -6,
  QUANT_CUTLASS_RAGGED_ROWS = -7,
  QUANT_CUTLASS_RAGGED_GROUPS = -8,
  QUANT_CUTLASS_MISALIGNED = -9,
  QUANT_CUTLASS_WORKSPACE_TOO_SMALL = -10,
  QUANT_CUTLASS_NOT_HOPPER = -11,
  QUANT_CUTLASS_REFUSED = -12,
  QUANT_CUTLASS_LAUNCH_FAILED = -13,
};

// QUANT_CUTLASS_ABI_VERSION of the library, as opposed to that of this header.
QUANT_CUTLASS_API int quant_cutlass_abi_version(void);

// One English sentence for a status, CUDA's own where it is CUDA's; static storage, never null.
QUANT_CUTLASS_API const char* quant_cutlass_error_string(int status);

// Whether m tokens by n output and k input features can run, and if not why; needs no GPU.
//
// tile: tokens of a tile, 16, 32, 64, 128 or 256; it has 128 output features. group: consecutive k
// that share a group scale, a multiple of 128 that divides k, or k itself. n is a multiple of 16, k
// of 32.
QUANT_CUTLASS_API int quant_cutlass_can_run(int64_t m, int64_t n, int64_t k, int64_t group,
                                            int tile);

// *bytes = what `quant_cutlass_gemm` needs as workspace; needs no GPU.
QUANT_CUTLASS_API int quant_cutlass_workspace_bytes(int64_t m, int64_t n, int64_t k, int64_t group,
                                                    int tile, int64_t* bytes);

// The GEMM at the head of this file, on a stream of GPU `device`. All memory is that GPU's, dense,
// and aligned to 16 bytes; nothing is kept after the work on the stream is done.
//
//   x       [m, k] E4M3         x_scale [m] FP32 (a)
//   codes   [n k / 2] bytes: INT4 codes, encoded for the lookup table and shuffled
//           (cuda/baseline/weight_layout.cuh)
//   tables  [k / group, n, 8] E4M3: -8 t, -7 t, ..., -t
//   c       [n] FP32            bias    [n] BF16, or null
//   out     [m, n] BF16
//   workspace: may be null where none is needed.
QUANT_CUTLASS_API int quant_cutlass_gemm(const void* x, const float* x_scale, const void* codes,
                                         const void* tables, const float* c, const void* bias,
                                         void* out, int64_t m, int64_t n, int64_t k, int64_t group,
                                         int tile, void* workspace, int64_t workspace_bytes,
                                         int device, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CUTLASS_H_
