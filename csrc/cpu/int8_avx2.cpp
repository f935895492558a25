// INT8 with registers of eight lanes: AVX-VNNI (QUANT_VNNI is defined), or AVX2.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using V = __m256i;
constexpr int kBytes = 32;
constexpr int kTileTokens = 6;
constexpr int kTileVectors = 2;

V load(const void* from) { return _mm256_loadu_si256(static_cast<const V*>(from)); }
void store(void* to, V v) { _mm256_storeu_si256(static_cast<V*>(to), v); }
V splat(int32_t word) { return _mm256_set1_epi32(word); }
V and_bytes(V a, V b) { return _mm256_and_si256(a, b); }
V shift_nibble(V a) { return _mm256_srli_epi16(a, 4); }
V times8(V a) { return _mm256_slli_epi32(a, 3); }
V widen(const void* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}
V first_of_pair(V a) {
  return _mm256_or_si256(_mm256_and_si256(a, splat(0xFFFF)), _mm256_slli_epi32(a, 16));
}
V second_of_pair(V a) {
  const V second = _mm256_srli_epi32(a, 16);
  return _mm256_or_si256(second, _mm256_slli_epi32(second, 16));
}
void dot16(V& sum, V a, V b) { sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
#ifdef QUANT_VNNI
constexpr int kManyColumns = 256;
V multiply16(V a, V b) { return _mm256_mullo_epi16(a, b); }
void dot8(V& sum, V bytes, V x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(bytes), "x"(x));
}
#else
// As an instruction: GCC 12 moves the sums of the intrinsic to the stack and back.
void add_pairs(V& part, V bytes, V x) {
  asm("vpaddw %1, %0, %0" : "+x"(part) : "x"(_mm256_maddubs_epi16(bytes, x)));
}
#endif

}  // namespace
}  // namespace quant

#ifdef QUANT_VNNI
#include "int8_kernels.h"
#else
#include "int8_parts.h"
#endif

namespace quant {
#ifdef QUANT_VNNI
const Kernels kInt8AvxVnni = int8_kernels();
#else
const Kernels kInt8Avx2 = int8_kernels();
#endif
}  // namespace quant
