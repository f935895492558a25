// INT8 with AVX-512 VNNI: 6 tokens x 64 outputs in 24 registers of 16 lanes. With QUANT_AMX, 16
// tokens at a time are multiplied by AMX, and what is left of them as before.
#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

using V = __m512i;
constexpr int kBytes = 64;
constexpr int kTileTokens = 6;
constexpr int kTileVectors = 4;
#ifdef QUANT_AMX
constexpr int kManyColumns = 512;
#else
constexpr int kManyColumns = 4096;
#endif

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

#ifdef QUANT_AMX
// Sums [16 tokens, 64] are four tiles; 64 columns of x are one, and of the operands four: a row of
// theirs is four columns of 16 outputs, as they lie in memory anyway.
int matrix_tiles(int tokens, const uint8_t* operands, int64_t columns, const int8_t* x,
                 int64_t x_stride, int32_t* sums) {
  if (tokens < 16 || columns % 64 != 0) return 0;
  const struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  int m = 0;
  for (; m + 16 <= tokens; m += 16) {
    int32_t* to = sums + m * 64;
    _tile_loadd(0, to, 256);
    _tile_loadd(1, to + 16, 256);
    _tile_loadd(2, to + 32, 256);
    _tile_loadd(3, to + 48, 256);
    for (int64_t k = 0; k < columns; k += 64) {
      const uint8_t* w = operands + k * 64;
      _tile_loadd(4, x + m * x_stride + k, x_stride);
      _tile_loadd(5, w, 256);
      _tile_dpbsud(0, 4, 5);
      _tile_loadd(6, w + 64, 256);
      _tile_dpbsud(1, 4, 6);
      _tile_loadd(7, w + 128, 256);
      _tile_dpbsud(2, 4, 7);
      _tile_loadd(5, w + 192, 256);
      _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, to, 256);
    _tile_stored(1, to + 16, 256);
    _tile_stored(2, to + 32, 256);
    _tile_stored(3, to + 48, 256);
  }
  _tile_release();
  return m;
}
#else
int matrix_tiles(int, const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*) { return 0; }
#endif

}  // namespace
}  // namespace quant

#include "int8_kernels.h"

namespace quant {
#ifdef QUANT_AMX
const Kernels kInt8Amx = int8_kernels();
#else
const Kernels kInt8Avx512 = int8_kernels();
#endif
}  // namespace quant
