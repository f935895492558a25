// FP8 with AVX-512: BF16 dot products (QUANT_BF16 is defined), or FP32.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using Sum = __m512;
constexpr int kTileTokens = 3;
constexpr int kTileRows = 8;

Sum zero() { return _mm512_setzero_ps(); }
float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

#ifdef QUANT_BF16
using Operand = uint16_t;
constexpr int kColumnsAtOnce = 32;
Sum operand(const Operand* from) { return _mm512_loadu_ps(from); }
void dot(Sum& sum, Sum a, Sum b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
// The table has every level twice: the fifth bit of an index, another nibble's, does not matter.
void look_up(const uint8_t* words, int j, const Operand* levels, Operand* to) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
  const __m512i nibbles = _mm512_srli_epi16(_mm512_loadu_si512(words), 4 * j);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(nibbles, _mm512_broadcast_i64x4(half)));
}
#else
using Operand = float;
constexpr int kColumnsAtOnce = 16;
Sum operand(const Operand* from) { return _mm512_loadu_ps(from); }
void dot(Sum& sum, Sum a, Sum b) { sum = _mm512_fmadd_ps(a, b, sum); }
void look_up(const uint8_t* words, int j, const Operand* levels, Operand* to) {
  const __m512 table = _mm512_loadu_ps(levels);
  for (int half = 0; half < 2; ++half) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words) + half);
    const __m512i nibbles = _mm512_srli_epi32(_mm512_cvtepu16_epi32(some), 4 * j);
    _mm512_storeu_ps(to + 16 * half, _mm512_permutexvar_ps(nibbles, table));
  }
}
#endif

}  // namespace
}  // namespace quant

#include "fp8_kernels.h"

#ifndef QUANT_AMX
namespace quant {
#ifdef QUANT_BF16
const Kernels kBf16Avx512 = fp8_kernels();
#else
const Kernels kFp32Avx512 = fp8_kernels();
#endif
}  // namespace quant
#endif
