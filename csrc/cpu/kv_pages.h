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

#if defined(__AVX512F__)
typedef __m512i Bytes;
inline Bytes low_words(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
inline Bytes high_words(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
inline Bytes low_pairs(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
inline Bytes high_pairs(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }
inline Bytes low_bytes(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high_bytes(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes low_halves(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes high_halves(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes shifted(Bytes x) { return _mm512_srli_epi16(x, 4); }
inline Bytes every(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
inline Bytes four_rows(const uint8_t* p, int64_t step) {
  Bytes x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + step)), 1);
  x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 2 * step)), 2);
  return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)(p + 3 * step)), 3);
}
#else
typedef __m256i Bytes;
inline Bytes low_words(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
inline Bytes high_words(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
inline Bytes low_pairs(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
inline Bytes high_pairs(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }
inline Bytes low_bytes(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high_bytes(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes low_halves(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes high_halves(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes shifted(Bytes x) { return _mm256_srli_epi16(x, 4); }
inline Bytes every(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
inline Bytes four_rows(const uint8_t* p, int64_t step) {
  const __m128i low = _mm_loadu_si128((const __m128i*)p);
  return _mm256_set_m128i(_mm_loadu_si128((const __m128i*)(p + step)), low);
}
#endif

constexpr int QUADS = sizeof(Bytes) / 16;

// Nibbles of rows as codes + 8, still two a byte.
inline Bytes biased(Bytes x) { return x ^ every(0x88); }
inline Bytes low_codes(Bytes x) { return x & every(15); }
inline Bytes high_codes(Bytes x) { return shifted(x) & every(15); }

// QUADS times four rows, 16 bytes of each: row t + i + 4 q is part q of vector i. A transposition
// of 32-bit words makes part q of vector j word j of rows t + 4 q .. t + 4 q + 3.
inline void unpack_keys(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t byte = 0; byte < half; byte += 16) {
    uint8_t* low = codes + byte * PAGE;
    uint8_t* high = low + half * PAGE;
    for (int64_t t = 0; t < PAGE; t += 4 * QUADS) {
      Bytes x[4];
      for (int i = 0; i < 4; ++i) x[i] = biased(four_rows(rows + (t + i) * half + byte, 4 * half));
      const Bytes a = low_words(x[0], x[1]), b = high_words(x[0], x[1]);
      const Bytes c = low_words(x[2], x[3]), d = high_words(x[2], x[3]);
      const Bytes words[4] = {low_pairs(a, c), high_pairs(a, c), low_pairs(b, d), high_pairs(b, d)};
      for (int j = 0; j < 4; ++j) {
        const int64_t place = (j * PAGE + t) * 4;
        const Bytes even = low_codes(words[j]), odd = high_codes(words[j]);
        memcpy(low + place, &even, sizeof(even));
        memcpy(high + place, &odd, sizeof(odd));
      }
    }
  }
}

// The bytes of four rows interleaved: 16 of each become four vectors of four columns, `parts` of 16
// side by side. Columns are stored as they come: column 4 (parts j + q) + i of a group is channel
// 16 q + 4 j + i of it, which order_channels puts right.
struct Group {
  int64_t byte, parts;
  Group(int64_t half, int64_t byte) : byte(byte) {
    const int64_t left = (half - byte) / 16;
    parts = left < QUADS ? left : QUADS;
  }
};

#if defined(__AVX512F__)
inline Bytes load_parts(const uint8_t* p, int64_t parts) {
  return _mm512_maskz_loadu_epi32((1 << 4 * parts) - 1, p);
}
inline void store_parts(uint8_t* p, Bytes x, int64_t parts) {
  _mm512_mask_storeu_epi32(p, (1 << 4 * parts) - 1, x);
}
#else
inline Bytes load_parts(const uint8_t* p, int64_t parts) {
  if (parts == 2) return _mm256_loadu_si256((const __m256i*)p);
  return _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
inline void store_parts(uint8_t* p, Bytes x, int64_t parts) {
  if (parts == 2) return _mm256_storeu_si256((__m256i*)p, x);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(x));
}
#endif

inline void unpack_values(const uint8_t* rows, int64_t dim, uint8_t* codes) {
  const int64_t half = dim / 2;
  for (int64_t byte = 0; byte < half; byte += 16 * QUADS) {
    const Group group(half, byte);
    for (int64_t t = 0; t < PAGE; t += 4) {
      Bytes x[4];
      for (int i = 0; i < 4; ++i) {
        x[i] = biased(load_parts(rows + (t + i) * half + byte, group.parts));
      }
      const Bytes a = low_bytes(x[0], x[1]), b = high_bytes(x[0], x[1]);
      const Bytes c = low_bytes(x[2], x[3]), d = high_bytes(x[2], x[3]);
      const Bytes words[4] = {low_halves(a, c), high_halves(a, c), low_halves(b, d),
                              high_halves(b, d)};
      uint8_t* place = codes + (t / 4 * dim + byte) * 4;
      for (int j = 0; j < 4; ++j) {
        store_parts(place + 16 * group.parts * j, low_codes(words[j]), group.parts);
        store_parts(place + 16 * group.parts * j + half * 4, high_codes(words[j]), group.parts);
      }
    }
  }
}

// Sums [dim] in the order of columns -> of channels.
inline void order_channels(const float* sums, int64_t dim, float* ordered) {
  const int64_t half = dim / 2;
  for (int64_t byte = 0; byte < half; byte += 16 * QUADS) {
    const Group group(half, byte);
    for (int64_t i = 0; i < 4 * group.parts; ++i) {
      const int64_t from = byte + 4 * i, to = byte + i % group.parts * 16 + i / group.parts * 4;
      memcpy(ordered + to, sums + from, 16);
      memcpy(ordered + half + to, sums + half + from, 16);
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

inline void order_channels(const float* sums, int64_t dim, float* ordered) {
  memcpy(ordered, sums, sizeof(float) * dim);
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
