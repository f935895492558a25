// FP8 with AVX2 and FMA, in FP32.
#include <immintrin.h>

#include <cstdint>

#include "gemm.h"

namespace quant {
namespace {

using Operand = float;
using Level = uint8_t;  // a table has the upper bytes of 16 BF16 numbers, then the lower ones
using Sum = __m256;
// Both halves of a register the same, and what levels are multiplied by.
struct Table {
  __m256i high, low;
  float scale;
};
constexpr int kColumnsAtOnce = 8;
constexpr int kTileTokens = 3;
constexpr int kTileRows = 4;
constexpr int kStreamSums = 8;

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
Table table_at(const Level* levels, float scale) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(levels);
  return {_mm256_broadcastsi128_si256(_mm_loadu_si128(bytes)),
          _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes + 1)), scale};
}
// 32 bytes of codes are 16 words. Four vectors hold their lower nibbles, which are 0 and 2 of a
// word in its two bytes, or their upper ones, 1 and 3: of words 0 .. 3 and 8 .. 11 in the first two
// vectors, of 4 .. 7 and 12 .. 15 in the others.
constexpr int column_of(int vector, int lane) {
  const int nibble = vector / 4 % 2 + 2 * (vector % 2),
            word = lane / 4 * 8 + vector / 2 % 2 * 4 + lane % 4;
  return 32 * nibble + vector / 8 * 16 + word;
}
// Bytes of levels, 32 with an instruction, become pairs of BF16 numbers, and those FP32. (Eight
// levels at a time with vpermps, which begins once a clock, twice for 16 levels: three times as
// long for one token.)
template <class Tables>
__attribute__((always_inline)) inline void look_up(const uint8_t* words, int four,
                                                   const Tables& table, Kind kind,
                                                   Sum (&found)[4]) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words) + four / 2);
  const __m256i shifted = four % 2 == 0 ? bytes : _mm256_srli_epi16(bytes, 4);
  const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
  const Table even = table(four % 2), odd = kind.apart ? table(four % 2 + 2) : even;
  __m256i high, low;
  if (kind.apart) {
    // An index with its upper bit set finds 0.
    const __m256i evens = _mm256_or_si256(codes, _mm256_set1_epi16(-32768));
    const __m256i odds = _mm256_or_si256(codes, _mm256_set1_epi16(128));
    high =
        _mm256_or_si256(_mm256_shuffle_epi8(even.high, evens), _mm256_shuffle_epi8(odd.high, odds));
    low = _mm256_or_si256(_mm256_shuffle_epi8(even.low, evens), _mm256_shuffle_epi8(odd.low, odds));
  } else {
    high = _mm256_shuffle_epi8(even.high, codes);
    low = _mm256_shuffle_epi8(even.low, codes);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i pairs =
        i == 0 ? _mm256_unpacklo_epi8(low, high) : _mm256_unpackhi_epi8(low, high);
    found[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    found[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)));
  }
  if (kind.scaled) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) found[i] *= i % 2 == 0 ? even.scale : odd.scale;
  }
}

}  // namespace
}  // namespace quant

#include "fp8_kernels.h"

namespace quant {
namespace {

// Four vectors of some rows at a time: a row's products wait for one another, other rows' do not.
template <int Tokens, bool Apart, bool Scaled>
__attribute__((noinline)) void stream(const Unpacking& unpacking, int64_t eight, int64_t spans,
                                      const Operand* x, float* sums) {
  constexpr int kTogether = kStreamSums / Tokens;
  const int64_t columns = spans * kSpan;
  for (int first = 0; first < kRows; first += kTogether) {
    Sum sum[kTogether][Tokens];
#pragma GCC unroll 8
    for (int r = 0; r < kTogether; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < Tokens; ++m) sum[r][m] = zero();
    }
    for (int64_t span = 0; span < spans; ++span) {
      const uint8_t* words = unpacking.codes(eight, span) + first * kRowBytes;
      const Operand* token = x + span * kSpan;
      const uint8_t* const only = Apart || Scaled ? nullptr : unpacking.only_scales(eight, span);
      Levels levels[kTogether];
      for (int r = 0; r < kTogether; ++r) {
        __builtin_prefetch(words + r * kRowBytes + kAhead);
        if (Apart || Scaled) {
          unpacking.levels(eight, span, first + r, levels[r]);
        } else {
          levels[r].of[0] = levels_of(only[first + r], Level());
        }
      }
#pragma GCC unroll 2
      for (int four = 0; four < kFours; ++four) {
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) {
          const auto table = [&](int j) __attribute__((always_inline)) {
            const int of = Apart ? j : 0;
            return table_at(levels[r].of[of], Scaled ? levels[r].scale[of] : 1.0f);
          };
          Sum weights[4];
          look_up(words + r * kRowBytes, four, table, {Apart, Scaled}, weights);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (int m = 0; m < Tokens; ++m) {
              dot(sum[r][m], weights[i],
                  operand(token + m * columns + (4 * four + i) * kColumnsAtOnce));
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTogether; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < Tokens; ++m) sums[m * kBlock + first + r] = total(sum[r][m]);
    }
  }
}

template <int Tokens>
void fp8_stream(const Unpacking& unpacking, int64_t eight, int64_t spans, const Operand* x,
                float* sums) {
  const Kind kind = unpacking.kind();
  if (kind.apart) {
    const auto run = kind.scaled ? stream<Tokens, true, true> : stream<Tokens, true, false>;
    return run(unpacking, eight, spans, x, sums);
  }
  const auto run = kind.scaled ? stream<Tokens, false, true> : stream<Tokens, false, false>;
  run(unpacking, eight, spans, x, sums);
}

}  // namespace

const Kernels kFp32Avx2 = fp8_kernels();
}  // namespace quant
