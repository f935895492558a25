// FP8 with AVX-512: BF16 dot products (QUANT_BF16 is defined), or FP32.
#include <immintrin.h>

#include <cstdint>

#include "gemm.h"

namespace quant {
namespace {

using Sum = __m512;
using Words = __m512i;
constexpr int kTileTokens = 3;
constexpr int kTileRows = 8;
constexpr int kStreamSums = 16;

Sum zero() { return _mm512_setzero_ps(); }
float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

#ifdef QUANT_BF16
using Operand = uint16_t;
using Level = Operand;
using Table = __m512i;
constexpr int kColumnsAtOnce = 32;
void dot(Sum& sum, Sum a, Sum b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
Words words_at(const uint8_t* words, int) { return _mm512_loadu_si512(words); }
// The table has every level twice: the fifth bit of an index, another nibble's, does not matter.
Table table_at(const Level* levels, float) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
}
Sum look_up(Words words, int j, Table table) {
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table));
}
#else
using Operand = float;
using Level = Operand;
using Table = __m512;
constexpr int kColumnsAtOnce = 16;
// As an instruction: GCC 12 reads a weight from memory for every token, not once for all.
void dot(Sum& sum, Sum a, Sum b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
Words words_at(const uint8_t* words, int part) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words) + part));
}
Table table_at(const Level* levels, float) { return _mm512_loadu_ps(levels); }
// Of an index the lower four bits count.
Sum look_up(Words words, int j, Table table) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
}
#endif
Sum operand(const Operand* from) { return _mm512_loadu_ps(from); }
void store(Operand* to, Sum operands) { _mm512_storeu_ps(to, operands); }

}  // namespace
}  // namespace quant

#include "fp8_words.h"

#ifndef QUANT_AMX
namespace quant {
#ifdef QUANT_BF16
const Kernels kBf16Avx512 = fp8_kernels();
#else
const Kernels kFp32Avx512 = fp8_kernels();
#endif
}  // namespace quant
#endif
