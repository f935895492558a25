// A page of the INT4 cache as the products want it: codes + 8, one a byte, four k side by side.
//
//   keys    codes[d / 4, token, d % 4]      k runs over channels, columns are tokens
//   values  codes[token / 4, d, token % 4]  k runs over tokens, columns are channels
//
// A cached row has D / 2 bytes: channel j in the low nibble of byte j, j + D / 2 in the high one.
#ifndef QUANT_KV_PAGES_H_
#define QUANT_KV_PAGES_H_

#include "kernels.h"
#include "simd.h"

namespace quant {
namespace QUANT_ISA {

#if defined(__AVX2__)

// The same 16 bytes of rows first .. first + 7: row first + i in the low half of vector i, row
// first + 4 + i in the high half. Nibbles become codes + 8.
struct EightRows {
  __m256i of[4];
  EightRows(const uint8_t* rows, int64_t half, int64_t first, int64_t byte) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* p = rows + (first + i) * half + byte;
      const __m128i low = _mm_loadu_si128((const __m128i*)p);
      const __m128i high = _mm_loadu_si128((const __m128i*)(p + 4 * half));
      of[i] = _mm256_xor_si256(_mm256_set_m128i(high, low), _mm256_set1_epi8((char)0x88));
    }
  }
};

inline __m256i low_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }

inline void unpack_keys(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t byte = 0; byte < half; byte += 16) {
    uint8_t* low = codes + byte * PAGE;
    uint8_t* high = low + half * PAGE;
    for (int64_t t = 0; t < PAGE; t += 8) {
      const EightRows x(rows, half, t, byte);
      const __m256i a = _mm256_unpacklo_epi32(x.of[0], x.of[1]);
      const __m256i b = _mm256_unpackhi_epi32(x.of[0], x.of[1]);
      const __m256i c = _mm256_unpacklo_epi32(x.of[2], x.of[3]);
      const __m256i d = _mm256_unpackhi_epi32(x.of[2], x.of[3]);
      const __m256i words[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),
                                _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
      for (int j = 0; j < 4; ++j) {
        const int64_t place = (j * PAGE + t) * 4;
        _mm256_storeu_si256((__m256i*)(low + place), low_nibbles(words[j]));
        _mm256_storeu_si256((__m256i*)(high + place), high_nibbles(words[j]));
      }
    }
  }
}

inline void unpack_values(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < PAGE; t += 8) {
    uint8_t* first = codes + t * dim;  // of tokens t .. t + 3; the next four are 4 dim further
    for (int64_t byte = 0; byte < half; byte += 16) {
      const EightRows x(rows, half, t, byte);
      const __m256i a = _mm256_unpacklo_epi8(x.of[0], x.of[1]);
      const __m256i b = _mm256_unpackhi_epi8(x.of[0], x.of[1]);
      const __m256i c = _mm256_unpacklo_epi8(x.of[2], x.of[3]);
      const __m256i d = _mm256_unpackhi_epi8(x.of[2], x.of[3]);
      const __m256i words[4] = {_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c),
                                _mm256_unpacklo_epi16(b, d), _mm256_unpackhi_epi16(b, d)};
      const auto store_both = [&](uint8_t* p, __m256i x) {
        _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(x));
        _mm_storeu_si128((__m128i*)(p + 4 * dim), _mm256_extracti128_si256(x, 1));
      };
      for (int j = 0; j < 4; ++j) {
        uint8_t* place = first + (byte + 4 * j) * 4;
        store_both(place, low_nibbles(words[j]));
        store_both(place + half * 4, high_nibbles(words[j]));
      }
    }
  }
}

#else

inline void unpack_keys(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < PAGE; ++t) {
    for (int64_t j = 0; j < half; ++j) {
      const int both = rows[t * half + j] ^ 0x88;
      uint8_t* low = codes + (j / 4 * PAGE + t) * 4 + j % 4;
      low[0] = both & 15;
      low[half * PAGE] = both >> 4;
    }
  }
}

inline void unpack_values(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < PAGE; ++t) {
    for (int64_t j = 0; j < half; ++j) {
      const int both = rows[t * half + j] ^ 0x88;
      uint8_t* low = codes + (t / 4 * dim + j) * 4 + t % 4;
      low[0] = both & 15;
      low[half * 4] = both >> 4;
    }
  }
}

#endif

// Scales and offsets of a page, [PAGE] pairs of FP16; zeros from the `stored`-th on, where there
// may be anything.
inline void unpack_scales(const uint16_t* pairs, int64_t stored, float* scale, float* offset) {
  for (int i = 0; i < PAGE; i += LANES) {
    const I32 there = (iota() + i) < (int32_t)stored;
    const I32 pair = read<I32>(pairs + 2 * i) & there;
    store(scale + i, from_half(narrow(pair & 0xFFFF)));
    store(offset + i, from_half(narrow((pair >> 16) & 0xFFFF)));
  }
}

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_KV_PAGES_H_
