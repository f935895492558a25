// FP8 with AVX2 and FMA, in FP32.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using Operand = float;
using Sum = __m256;
using Words = __m256i;
struct Table {
  __m256 negative, positive;
};
constexpr int kColumnsAtOnce = 8;
constexpr int kTileTokens = 3;
constexpr int kTileRows = 4;
constexpr int kStreamSums = 4;

Sum zero() { return _mm256_setzero_ps(); }
Sum operand(const Operand* from) { return _mm256_loadu_ps(from); }
void store(Operand* to, Sum operands) { _mm256_storeu_ps(to, operands); }
// As an instruction: GCC 12 reads a weight from memory for every token, not once for all.
void dot(Sum& sum, Sum a, Sum b) { asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b)); }
float total(Sum sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
Words words_at(const uint8_t* words, int part) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words) + part));
}
Table table_at(const Operand* levels) {
  return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)};
}
// A permutation reads the lower three bits of an index; the fourth chooses between two of them.
Sum look_up(Words words, int j, const Table& table) {
  const __m256i nibbles = _mm256_srli_epi32(words, 4 * j);
  const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * j));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.negative, nibbles),
                          _mm256_permutevar8x32_ps(table.positive, nibbles), fourth);
}

}  // namespace
}  // namespace quant

#include "fp8_kernels.h"

namespace quant {
const Kernels kFp32Avx2 = fp8_kernels();
}  // namespace quant
