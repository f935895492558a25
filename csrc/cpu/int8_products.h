// Exact products of integers written in base 256 with 4-bit codes:
//
//   sums[r, n] = start[r] + sum_l 256^l sum_k digits[r, l, k] codes[k / 4, n, k % 4]
//
// digits are int8 in [-128, 127], codes 0 .. 15. All sums are INT32 that nothing overflows, so they
// are the same in any order, on any instruction set, for any number of rows. Codes lie as the byte
// products of AVX-512 VNNI and AMX want them: four k of a column side by side.
//
// Sums are handed on as they are done: emit(r, n, I32), LANES columns from n on.
#ifndef QUANT_INT8_PRODUCTS_H_
#define QUANT_INT8_PRODUCTS_H_

#include "simd.h"
#if defined(__AMX_INT8__)
#include "tiles.h"
#endif

namespace quant {
namespace QUANT_ISA {

// digits[r, l, k] is at (r LIMBS + l) stride + k.
struct Digits {
  const int8_t* at;
  int64_t stride;
};

inline int32_t four_digits(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return word;
}

#if defined(__AVX512VNNI__)

// acc += codes . digits, four bytes a lane. GCC 12 spills accumulators of the intrinsic.
inline void dot(__m512i& acc, __m512i codes, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(digits));
}

// ROWS rows by 16 VECTORS columns; at most 24 accumulators of the 32 registers.
template <int LIMBS, int ROWS, int VECTORS, class Emit>
inline void block(Digits d, int64_t k_words, const uint8_t* codes, int64_t columns, int64_t n,
                  const int32_t* start, int64_t first, const Emit& emit) {
  __m512i acc[ROWS][LIMBS][VECTORS];
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < LIMBS * VECTORS; ++i) {
      acc[r][i / VECTORS][i % VECTORS] =
          i < VECTORS ? _mm512_set1_epi32(start[first + r]) : _mm512_setzero_si512();
    }
  }
  for (int64_t g = 0; g < k_words; ++g) {
    __m512i code[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      code[v] = _mm512_loadu_si512(codes + (g * columns + n + 16 * v) * 4);
    }
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
      for (int l = 0; l < LIMBS; ++l) {
        const __m512i digit =
            _mm512_set1_epi32(four_digits(d.at + (r * LIMBS + l) * d.stride + 4 * g));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) dot(acc[r][l][v], code[v], digit);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      __m512i sum = acc[r][0][v];
#pragma GCC unroll 2
      for (int l = 1; l < LIMBS; ++l) {
        sum = _mm512_add_epi32(sum, _mm512_slli_epi32(acc[r][l][v], 8 * l));
      }
      emit(first + r, n + 16 * v, (I32)sum);
    }
  }
}

template <int LIMBS, int ROWS, class Emit>
inline void row_block(Digits d, int64_t k_words, const uint8_t* codes, int64_t columns,
                      const int32_t* start, int64_t first, const Emit& emit) {
  int64_t n = 0;
  for (; n + 64 <= columns; n += 64) {
    block<LIMBS, ROWS, 4>(d, k_words, codes, columns, n, start, first, emit);
  }
  if (n < columns) block<LIMBS, ROWS, 2>(d, k_words, codes, columns, n, start, first, emit);
}

#elif defined(__AVX2__)

// 16 columns of a row. Pairs of products are added in INT16: 8 times 2 * 15 * 128 still fit.
template <int LIMBS, int ROWS, class Emit>
inline void row_block(Digits d, int64_t k_words, const uint8_t* codes, int64_t columns,
                      const int32_t* start, int64_t first, const Emit& emit) {
  static_assert(ROWS == 1, "more do not fit 16 registers");
  for (int64_t n = 0; n < columns; n += 16) {
    __m256i acc[LIMBS][2] = {};
    for (int64_t begin = 0; begin < k_words; begin += 8) {
      __m256i part[LIMBS][2] = {};
      for (int64_t g = begin; g < k_words && g < begin + 8; ++g) {
        const uint8_t* p = codes + (g * columns + n) * 4;
        const __m256i code[2] = {_mm256_loadu_si256((const __m256i*)p),
                                 _mm256_loadu_si256((const __m256i*)(p + 32))};
#pragma GCC unroll 3
        for (int l = 0; l < LIMBS; ++l) {
          const __m256i digit = _mm256_set1_epi32(four_digits(d.at + l * d.stride + 4 * g));
          for (int v = 0; v < 2; ++v) {
            part[l][v] = _mm256_add_epi16(part[l][v], _mm256_maddubs_epi16(code[v], digit));
          }
        }
      }
      const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
      for (int i = 0; i < 2 * LIMBS; ++i) {
        const __m256i wide = _mm256_madd_epi16(part[i / 2][i % 2], ones);
        acc[i / 2][i % 2] = _mm256_add_epi32(acc[i / 2][i % 2], wide);
      }
    }
    for (int v = 0; v < 2; ++v) {
      __m256i sum = _mm256_add_epi32(acc[0][v], _mm256_set1_epi32(start[first]));
      for (int l = 1; l < LIMBS; ++l) {
        sum = _mm256_add_epi32(sum, _mm256_slli_epi32(acc[l][v], 8 * l));
      }
      emit(first, n + 8 * v, (I32)sum);
    }
  }
}

#else

template <int LIMBS, int ROWS, class Emit>
inline void row_block(Digits d, int64_t k_words, const uint8_t* codes, int64_t columns,
                      const int32_t* start, int64_t first, const Emit& emit) {
  static_assert(ROWS == 1, "one after the other");
  for (int64_t n = 0; n < columns; n += LANES) {
    I32 sum = splat(start[first]);
    for (int64_t g = 0; g < k_words; ++g) {
      const uint8_t* p = codes + (g * columns + n) * 4;
      for (int j = 0; j < 4; ++j) {
        int32_t digit = 0;
        for (int l = 0; l < LIMBS; ++l) digit += d.at[l * d.stride + 4 * g + j] * (1 << (8 * l));
        for (int i = 0; i < LANES; ++i) sum[i] += digit * p[4 * i + j];
      }
    }
    emit(first, n, sum);
  }
}

#endif

// columns: a multiple of 32. One object for a thread and call.
class Products {
 public:
  Products() = default;
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  template <int LIMBS, class Emit>
  void run(Digits d, int64_t rows, int64_t k, const uint8_t* codes, int64_t columns,
           const int32_t* start, const Emit& emit) {
#if defined(__AMX_INT8__)
    // Tiles take as long for one row as for five.
    if (rows > 2) return by_tiles<LIMBS>(d, rows, k, codes, columns, start, emit);
#endif
    by_vectors<LIMBS>(d, rows, k, codes, columns, start, emit);
  }

#if defined(__AMX_INT8__)
  ~Products() {
    if (configured_) _tile_release();
  }
#endif

 private:
  template <int LIMBS, class Emit>
  void by_vectors(Digits d, int64_t rows, int64_t k, const uint8_t* codes, int64_t columns,
                  const int32_t* start, const Emit& emit) {
#if defined(__AVX512VNNI__)
    constexpr int ROWS = 6 / LIMBS;
#else
    constexpr int ROWS = 1;
#endif
    int64_t r = 0;
    const auto part = [&](int64_t count) {
      const Digits at = {d.at + r * LIMBS * d.stride, d.stride};
      if (count == ROWS) {
        row_block<LIMBS, ROWS>(at, k / 4, codes, columns, start, r, emit);
      } else {
        row_block<LIMBS, 1>(at, k / 4, codes, columns, start, r, emit);
      }
    };
    for (; r + ROWS <= rows; r += ROWS) part(ROWS);
    for (; r < rows; ++r) part(1);
  }

#if defined(__AMX_INT8__)
  // The digits of a number are rows of a tile of 16, and up to 64 columns four tiles of sums.
  // Behind the last row, and behind k up to a multiple of 64, there may be anything, but digits are
  // there to be read, and 0 behind k. Sums are added up while the next tiles are multiplied.
  template <int LIMBS, class Emit>
  void by_tiles(Digits d, int64_t rows, int64_t k, const uint8_t* codes, int64_t columns,
                const int32_t* start, const Emit& emit) {
    constexpr int ROWS = 16 / LIMBS;
    configure();
    alignas(64) int32_t parts[2][4][16][16];
    int turn = 0;
    int64_t done_row = 0, done_n = -1;
    const auto add_up = [&](const int32_t (*part)[16][16]) {
      const int64_t end = done_row + ROWS < rows ? done_row + ROWS : rows;
      const int tiles = columns - done_n < 64 ? 2 : 4;
      for (int64_t r = done_row; r < end; ++r) {
        for (int tile = 0; tile < tiles; ++tile) {
          __m512i sum = _mm512_set1_epi32(start[r]);
          for (int l = 0; l < LIMBS; ++l) {
            const __m512i limb = _mm512_load_si512(part[tile][(r - done_row) * LIMBS + l]);
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(limb, 8 * l));
          }
          emit(r, done_n + 16 * tile, (I32)sum);
        }
      }
    };
    for (int64_t first = 0; first < rows; first += ROWS) {
      for (int64_t n = 0; n < columns; n += 64) {
        const bool wide = n + 64 <= columns;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < k; i += 64) {
          const uint8_t* p = codes + (i / 4 * columns + n) * 4;
          _tile_loadd(4, d.at + first * LIMBS * d.stride + i, d.stride);
          _tile_loadd(5, p, columns * 4);
          _tile_dpbsud(0, 4, 5);
          _tile_loadd(6, p + 64, columns * 4);
          _tile_dpbsud(1, 4, 6);
          if (!wide) continue;
          _tile_loadd(5, p + 128, columns * 4);
          _tile_dpbsud(2, 4, 5);
          _tile_loadd(6, p + 192, columns * 4);
          _tile_dpbsud(3, 4, 6);
        }
        _tile_stored(0, parts[turn][0], 64);
        _tile_stored(1, parts[turn][1], 64);
        _tile_stored(2, parts[turn][2], 64);
        _tile_stored(3, parts[turn][3], 64);
        turn ^= 1;
        if (done_n >= 0) add_up(parts[turn]);
        done_row = first;
        done_n = n;
      }
    }
    if (done_n >= 0) add_up(parts[turn ^ 1]);
  }

  bool configured_ = false;

  void configure() {
    if (!configured_) configure_tiles();
    configured_ = true;
  }
#endif
};

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_INT8_PRODUCTS_H_
