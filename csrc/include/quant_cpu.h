// The C ABI of libquant_cpu.so.
//
// Every function that can fail returns a QuantCpuStatus and writes nothing unless that is
// QUANT_CPU_OK. Sizes count elements. Nothing here allocates, and nothing keeps a pointer.
#ifndef QUANT_CPU_H_
#define QUANT_CPU_H_

#include <stdint.h>

#define QUANT_CPU_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CPU_ABI_VERSION 2

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCpuStatus {
  QUANT_CPU_OK = 0,
  QUANT_CPU_NULL_POINTER = 1,
  QUANT_CPU_NEGATIVE_SIZE = 2,
  QUANT_CPU_COLUMNS_OUT_OF_RANGE = 3,
};

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

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CPU_H_
