// FP8 with AVX2 and FMA, in FP32.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using Operand = float;
using Sum = __m256;
constexpr int kColumnsAtOnce = 8;
constexpr int kTileTokens = 2;
constexpr int kTileRows = 4;

Sum zero() { return _mm256_setzero_ps(); }
Sum operand(const Operand* from) { return _mm256_loadu_ps(from); }
void dot(Sum& sum, Sum a, Sum b) { sum = _mm256_fmadd_ps(a, b, sum); }
float total(Sum sum) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// A permutation reads the lower three bits of an index; the fourth chooses between two of them.
void look_up(const uint8_t* words, int j, const Operand* levels, Operand* to) {
  const __m256 negative = _mm256_loadu_ps(levels), positive = _mm256_loadu_ps(levels + 8);
  for (int part = 0; part < 4; ++part) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words) + part);
    const __m256i nibbles = _mm256_srli_epi32(_mm256_cvtepu16_epi32(some), 4 * j);
    const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28));
    _mm256_storeu_ps(to + 8 * part,
                     _mm256_blendv_ps(_mm256_permutevar8x32_ps(negative, nibbles),
                                      _mm256_permutevar8x32_ps(positive, nibbles), fourth));
  }
}

}  // namespace
}  // namespace quant

#include "fp8_kernels.h"

namespace quant {
const Kernels kFp32Avx2 = fp8_kernels();
}  // namespace quant
