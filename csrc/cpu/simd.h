// Vectors of LANES 32-bit lanes, and the numbers of this project in them.
//
// Included by the sources that are compiled once per instruction set (QUANT_ISA names it). GCC's
// and Clang's vector extensions give operators on F32 and I32 everywhere; what they have no
// operator for stands here. There is no std:: in it: an inline function of the standard library
// that one of these sources emitted with its own instructions could be the copy that the linker
// keeps for all.
//
// Loops run over LANES numbers at a time, so sums have an order of their own in every instruction
// set, and one order in each.
#ifndef QUANT_SIMD_H_
#define QUANT_SIMD_H_

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace quant {
namespace QUANT_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));
typedef int8_t I8 __attribute__((vector_size(LANES)));
typedef uint8_t U8 __attribute__((vector_size(LANES)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

template <class Vector>
inline Vector read(const void* p) {
  Vector x;
  memcpy(&x, p, sizeof(x));
  return x;
}

inline F32 splat(float x) { return x - F32{}; }
inline I32 splat(int32_t x) { return x - I32{}; }
inline I32 iota() {
  I32 x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
inline I32 to_int(F32 x) { return __builtin_convertvector(x, I32); }  // x is an integer
inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline I32 select(I32 mask, I32 yes, I32 no) { return mask ? yes : no; }
inline F32 abs(F32 x) { return bits_as<F32>(bits_as<I32>(x) & 0x7FFFFFFF); }

#if defined(__AVX512F__)
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand where one of them is NaN.
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline I32 max(I32 a, I32 b) { return (I32)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline void store_low_bytes(void* p, I32 x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
}
#elif defined(__AVX2__)
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline I32 max(I32 a, I32 b) { return (I32)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline void store_low_bytes(void* p, I32 x) {
  const __m256i picked = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0C080400));
  const int32_t words[2] = {_mm256_extract_epi32(picked, 0), _mm256_extract_epi32(picked, 4)};
  memcpy(p, words, 8);
}
#else
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 max(F32 a, F32 b) { return select(a > b, a, b); }
inline F32 min(F32 a, F32 b) { return select(a < b, a, b); }
inline I32 max(I32 a, I32 b) { return select(a > b, a, b); }
inline void store_low_bytes(void* p, I32 x) {
  const I8 bytes = __builtin_convertvector(x, I8);
  memcpy(p, &bytes, LANES);
}
#endif

// Halves are folded onto each other: log2(LANES) steps, always in this order.
template <class Scalar, class Vector, class Fold>
inline Scalar reduce(Vector x, const Fold& fold) {
  Scalar part[LANES];
  memcpy(part, &x, sizeof(part));
  for (int n = LANES / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) part[i] = fold(part[i], part[i + n]);
  }
  return part[0];
}
#if defined(__AVX512F__)
inline float sum(F32 x) { return _mm512_reduce_add_ps(x); }
inline int32_t sum(I32 x) { return _mm512_reduce_add_epi32((__m512i)x); }
inline int32_t largest(I32 x) { return _mm512_reduce_max_epi32((__m512i)x); }
inline float largest(F32 x) { return _mm512_reduce_max_ps(x); }
#else
inline float sum(F32 x) {
  return reduce<float>(x, [](float a, float b) { return a + b; });
}
inline int32_t sum(I32 x) {
  return reduce<int32_t>(x, [](int32_t a, int32_t b) { return a + b; });
}
inline int32_t largest(I32 x) {
  return reduce<int32_t>(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
}
inline float largest(F32 x) {
  return reduce<float>(x, [](float a, float b) { return a > b ? a : b; });
}
#endif

// --- FP16 and BF16, rounded to nearest even -----------------------------------------------------

inline I32 widen(U16 x) { return bits_as<I32>(__builtin_convertvector(x, U32)); }
#if defined(__AVX512F__)  // GCC 12 takes lanes out one by one for the conversions below
inline I32 widen(U8 x) { return (I32)_mm512_cvtepu8_epi32((__m128i)x); }
inline U16 narrow(I32 x) { return (U16)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__AVX2__)
inline I32 widen(U8 x) { return (I32)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(x))); }
inline U16 narrow(I32 x) {
  const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 8);
  return (U16)_mm256_castsi256_si128(packed);
}
#else
inline I32 widen(U8 x) { return bits_as<I32>(__builtin_convertvector(x, U32)); }
inline U16 narrow(I32 x) { return __builtin_convertvector(bits_as<U32>(x), U16); }
#endif

#if defined(__AVX512F__)
inline F32 from_half(U16 x) { return _mm512_cvtph_ps((__m256i)x); }
inline U16 to_half(F32 x) { return (U16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline F32 from_half(U16 x) { return _mm256_cvtph_ps((__m128i)x); }
inline U16 to_half(F32 x) { return (U16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline F32 from_half(U16 x) {
  const I32 bits = widen(x), magnitude = bits & 0x7FFF, sign = (bits & 0x8000) << 16;
  const I32 normal = (magnitude << 13) + (112 << 23);
  const I32 special = (magnitude << 13) | 0x7F800000;  // Inf and NaN
  const I32 subnormal = bits_as<I32>(to_float(magnitude) * 0x1p-24f);
  const I32 is_special = magnitude >= 0x7C00, is_small = magnitude < 0x400;
  const I32 value = select(is_special, special, select(is_small, subnormal, normal));
  return bits_as<F32>(value | sign);
}
inline U16 to_half(F32 x) {
  const I32 bits = bits_as<I32>(x), magnitude = bits & 0x7FFFFFFF;
  const I32 odd = (magnitude >> 13) & 1;
  const I32 normal = ((magnitude + 0xFFF + odd) >> 13) - (112 << 10);
  // In [1/2, 1) a unit in the last place is 2^-24, FP16's smallest number.
  const I32 subnormal = bits_as<I32>(abs(x) + 0.5f) - bits_as<int32_t>(0.5f);
  const I32 is_nan = magnitude > 0x7F800000, is_large = magnitude >= 0x477FF000;
  const I32 is_small = magnitude < (113 << 23);
  I32 value = select(is_small, subnormal, normal);
  value = select(is_large, splat(0x7C00), value);
  value = select(is_nan, splat(0x7E00), value);
  return narrow(value | ((bits >> 16) & 0x8000));
}
#endif

inline F32 from_bf16(U16 x) { return bits_as<F32>(widen(x) << 16); }
inline U16 to_bf16(F32 x) {
  const I32 bits = bits_as<I32>(x), is_nan = x != x;
  const I32 rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return narrow(select(is_nan, splat(0x7FC00000), rounded) >> 16);
}

inline F32 load(const float* p) { return read<F32>(p); }
inline F32 load(const Bf16* p) { return from_bf16(read<U16>(p)); }
inline F32 load(const Fp16* p) { return from_half(read<U16>(p)); }
inline void store(float* p, F32 x) { memcpy(p, &x, sizeof(x)); }
inline void store(Bf16* p, F32 x) {
  const U16 bits = to_bf16(x);
  memcpy(p, &bits, sizeof(bits));
}
inline void store(Fp16* p, F32 x) {
  const U16 bits = to_half(x);
  memcpy(p, &bits, sizeof(bits));
}

// n <= LANES numbers; the lanes behind them are zeros.
template <class T>
inline F32 load(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
inline void store(T* p, F32 x, int64_t n) {
  if (n >= LANES) return store(p, x);
  T part[LANES];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

template <class T>
inline F32 round_to(F32 x);
template <>
inline F32 round_to<float>(F32 x) {
  return x;
}
template <>
inline F32 round_to<Bf16>(F32 x) {
  return from_bf16(to_bf16(x));
}
template <>
inline F32 round_to<Fp16>(F32 x) {
  return from_half(to_half(x));
}

// --- E4M3 and integers --------------------------------------------------------------------------

// E4M3 codes of |x| <= 448 in the low byte of every lane, to nearest even; NaN becomes 0x7F.
inline I32 e4m3_codes(F32 x) {
  const I32 bits = bits_as<I32>(x), magnitude = bits & 0x7FFFFFFF;
  const I32 normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // In [2^14, 2^15) a unit in the last place is 2^-9, E4M3's smallest number.
  const I32 subnormal = bits_as<I32>(abs(x) + 0x1p14f) - bits_as<int32_t>(0x1p14f);
  const I32 is_small = magnitude < (121 << 23), is_nan = magnitude > 0x7F800000;
  const I32 code = select(is_small, subnormal, normal) | ((bits >> 24) & 0x80);
  return select(is_nan, splat(0x7F), code);
}

// 2^9 times the values of E4M3 codes 0 .. 255, which are integers below 2^18; 0 for NaN.
inline I32 e4m3_integers(I32 code) {
  const I32 exponent = (code >> 3) & 15, mantissa = code & 7, magnitude = code & 127;
  const I32 is_normal = exponent != 0, is_nan = magnitude == 127;
  const I32 value = (mantissa + (is_normal & 8)) << (exponent + is_normal);
  const I32 sign = -((code >> 7) & 1);  // 0 or -1
  return select(is_nan, I32{}, (value ^ sign) - sign);
}

// x rounded to four significant bits and to integers: E4M3's numbers times 2^9, as floats. Half a
// unit in the last place of 1.5 * 2^20 * 2^e is 2^(e - 4).
inline F32 round_e4m3_integers(F32 x) {
  const F32 binade = bits_as<F32>(bits_as<I32>(x) & 0x7F800000);
  const F32 shifter = max(binade, splat(8.0f)) * 0x1.8p20f;
  return (x + shifter) - shifter;
}

// Integers |x| < 2^22, rounded to nearest even, in the low bits of every lane.
inline I32 nearest_integers(F32 x) { return bits_as<I32>(x + 0x1.8p23f); }

// 2^n for integers -126 <= n <= 127, and 0 below and for NaN; scalar.
inline float power_of_two(float n) {
  if (!(n >= -126.0f)) return 0.0f;
  return bits_as<float>(((int32_t)n + 127) << 23);
}

// 2^f for |f| <= 1/2, to 2^-25 of itself: the least largest relative error of six coefficients
// behind 1, found by iteratively reweighted least squares.
inline F32 exp2_fraction(F32 f) {
  F32 y = splat(1.5345811e-4f);
  y = fma(y, f, splat(1.3399931e-3f));
  y = fma(y, f, splat(9.6184891e-3f));
  y = fma(y, f, splat(5.5503286e-2f));
  y = fma(y, f, splat(2.4022646e-1f));
  y = fma(y, f, splat(6.9314718e-1f));
  return fma(y, f, splat(1.0f));
}

// 2^x for x <= 0; 2^-125 below that, NaN for NaN.
inline F32 exp2_nonpositive(F32 x) {
  x = max(splat(-125.0f), x);
  const F32 shifted = x + (0x1.8p23f + 127.0f);  // 127 + round(x) in the low bits
  const F32 n = shifted - (0x1.8p23f + 127.0f);
  return exp2_fraction(x - n) * bits_as<F32>(bits_as<I32>(shifted) << 23);
}

// e^x; Inf above 88.7, 2^-126 below -87.
inline F32 exp(F32 x) {
  x = min(splat(89.0f), max(splat(-87.0f), x));
  const F32 shifted = x * 1.44269504f + (0x1.8p23f + 127.0f);
  const F32 n = shifted - (0x1.8p23f + 127.0f);
  // ln 2 in two parts; n times the first is exact.
  const F32 r = (x - n * 0x1.62ep-1f) - n * 3.1946185e-5f;
  return exp2_fraction(r * 1.44269504f) * bits_as<F32>(bits_as<I32>(shifted) << 23);
}

// The numbers that a kernel was tuned for and tested with: no flushing of subnormals, which a
// thread may have asked for and the pool's threads have not, and rounding to nearest.
struct DefaultRounding {
#if defined(__x86_64__)
  uint32_t before = _mm_getcsr();
  DefaultRounding() { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(before); }
#else
  DefaultRounding() {}
#endif
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;
};

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_SIMD_H_
