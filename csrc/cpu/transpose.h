// 16 x 16 numbers of 32 bits, turned in registers (AVX-512).
#ifndef QUANT_TRANSPOSE_H_
#define QUANT_TRANSPOSE_H_

#include <immintrin.h>
#include <stdint.h>

namespace quant {
namespace {

// row[j][i] = from[i][j]: pairs of rows change quarters, eighths, ... of their numbers.
inline void transpose(const float* from, int64_t stride, __m512 (&row)[16]) {
  __m512 other[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(from + i * stride);
#pragma GCC unroll 4
  for (int step = 1; step < 16; step *= 2) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i bit = _mm512_set1_epi32(step);
    const __mmask16 upper = _mm512_test_epi32_mask(lane, bit);
    const __m512i swapped = _mm512_xor_si512(lane, bit), sixteen = _mm512_set1_epi32(16);
    const __m512i first = _mm512_mask_add_epi32(lane, upper, swapped, sixteen);
    const __m512i second = _mm512_mask_add_epi32(swapped, upper, lane, sixteen);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      other[i] = (i & step) == 0 ? _mm512_permutex2var_ps(row[i], first, row[i + step])
                                 : _mm512_permutex2var_ps(row[i - step], second, row[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = other[i];
  }
}

}  // namespace
}  // namespace quant

#endif  // QUANT_TRANSPOSE_H_
