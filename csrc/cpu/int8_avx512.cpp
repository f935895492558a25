// INT8 with AVX-512 VNNI: 6 tokens x 64 outputs in 24 registers of 16 lanes.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using V = __m512i;
constexpr int kBytes = 64;
constexpr int kTileTokens = 6;
constexpr int kTileVectors = 4;
constexpr int kManyColumns = 4096;

V load(const void* from) { return _mm512_loadu_si512(from); }
void store(void* to, V v) { _mm512_storeu_si512(to, v); }
V splat(int32_t word) { return _mm512_set1_epi32(word); }
V and_bytes(V a, V b) { return _mm512_and_si512(a, b); }
V shift_nibble(V a) { return _mm512_srli_epi16(a, 4); }
V multiply16(V a, V b) { return _mm512_mullo_epi16(a, b); }
V times8(V a) { return _mm512_slli_epi32(a, 3); }
V widen(const void* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
V first_of_pair(V a) {
  return _mm512_or_si512(_mm512_and_si512(a, splat(0xFFFF)), _mm512_slli_epi32(a, 16));
}
V second_of_pair(V a) {
  const V second = _mm512_srli_epi32(a, 16);
  return _mm512_or_si512(second, _mm512_slli_epi32(second, 16));
}
// As instructions: GCC 12 moves the sums of the intrinsics to the stack and back in every step.
void dot8(V& sum, V bytes, V x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(x)); }
void dot16(V& sum, V a, V b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

}  // namespace
}  // namespace quant

#include "int8_kernels.h"

#ifndef QUANT_AMX
namespace quant {
const Kernels kInt8Avx512 = int8_kernels();
}  // namespace quant
#endif
