// The C ABI of libquant_cpu.so.
//
// Every function that can fail returns a QuantCpuStatus and writes nothing unless that is
// QUANT_CPU_OK. Sizes and strides count elements. Nothing keeps a pointer of the caller's.
#ifndef QUANT_CPU_H_
#define QUANT_CPU_H_

#include <stdint.h>

#define QUANT_CPU_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CPU_ABI_VERSION 3

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCpuStatus {
  QUANT_CPU_OK = 0,
  QUANT_CPU_NULL_POINTER = 1,
  QUANT_CPU_NEGATIVE_SIZE = 2,
  QUANT_CPU_COLUMNS_OUT_OF_RANGE = 3,
  QUANT_CPU_UNKNOWN_TYPE = 4,
  QUANT_CPU_RAGGED_GROUPS = 5,
  QUANT_CPU_NOT_A_PAIR = 6,
  QUANT_CPU_OUT_OF_MEMORY = 7,
  QUANT_CPU_ISA_UNAVAILABLE = 8,
};

enum QuantCpuType { QUANT_CPU_FP32 = 0, QUANT_CPU_BF16 = 1, QUANT_CPU_FP16 = 2 };

// What a GEMM multiplies: INT8 codes with q t, or E4M3 codes with E4M3(q t) or with q t in FP32.
enum QuantCpuNumerics { QUANT_CPU_INT8 = 0, QUANT_CPU_LUT = 1, QUANT_CPU_EXACT = 2 };

// QUANT_CPU_ABI_VERSION of the library, as opposed to that of this header.
QUANT_CPU_API int quant_cpu_abi_version(void);

// One English sentence for a status; static storage, never null.
QUANT_CPU_API const char* quant_cpu_error_string(int status);

// INT4 codes out of the compressed-tensors "pack-quantized" layout:
//
//   codes[n, k] = ((packed[n, k / 8] >> 4 (k mod 8)) & 15) - 8        in -8..7
//
// packed [rows, words_per_row] and codes [rows, columns] are row-major and dense, and must not
// overlap. 0 <= columns <= 8 * words_per_row: nibbles at and beyond `columns` are padding and are
// not read out. Pointers may be null where rows or columns is 0.
QUANT_CPU_API int quant_cpu_unpack_int4(const int32_t* packed, int64_t rows, int64_t words_per_row,
                                        int64_t columns, int8_t* codes);

// The values of E4M3 codes (1 sign, 4 exponent, 3 mantissa bits, bias 7; no infinities):
//
//   values[i] = +-2^(e - 7) (1 + m / 8), or +-2^-6 m / 8 where e = 0; NaN where e = 15 and m = 7
//
// codes and values [count] are dense and must not overlap. Pointers may be null where count is 0.
QUANT_CPU_API int quant_cpu_e4m3_to_float(const uint8_t* codes, int64_t count, float* values);

// Instruction sets that this machine runs, best first, separated by spaces, out of amx,
// avx512_vnni, avx_vnni, avx2, portable; static storage.
QUANT_CPU_API const char* quant_cpu_isas(void);

// The one in use: that of quant_cpu_set_isa, of the environment's QUANT_CPU_ISA, or the best; empty
// where QUANT_CPU_ISA names none of quant_cpu_isas.
QUANT_CPU_API const char* quant_cpu_isa(void);

// Use this instruction set from now on; null or "": the environment's or the best again.
QUANT_CPU_API int quant_cpu_set_isa(const char* name);

// Y = X W^T with INT4 weights in blocks, codes and scales as quant_kernels/packing.py lays them
// out:
//
//   y[m, n] = sum_k x[m, k] P(q, t)[n, k] * x_scale[m] * c[n] (+ bias[n]) (+ residual[m, n])
//
// x [m, k] are INT8 or E4M3 codes, as `numerics` says. group_size is 32, 64 or 128 and divides k,
// or negative for one scale an output; t may then be null. k is a multiple of 8. silu_mul: y
// becomes silu(y[:, :n / 2]) * y[:, n / 2:], and out is [m, n / 2]; no residual then. Strides are
// those of the first dimension; the last is dense. bias [n] and residual [m, n] may be null, and
// residual may be out. An INT8 sum is exact where it fits INT32; FP32 sums depend neither on m nor
// on `threads`. Memory for intermediate results belongs to the calling thread, which keeps it.
QUANT_CPU_API int quant_cpu_gemm(const void* x, int64_t x_stride, const float* x_scale,
                                 int64_t x_scale_stride, const uint8_t* codes, const void* t,
                                 const float* c, int64_t m, int64_t n, int64_t k,
                                 int64_t group_size, int numerics, void* out, int64_t out_stride,
                                 int out_type, const void* bias, int bias_type,
                                 const void* residual, int64_t residual_stride, int residual_type,
                                 int silu_mul, int threads);

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CPU_H_
