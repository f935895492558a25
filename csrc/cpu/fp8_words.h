// FP8 kernels (fp8_kernels.h) where a vector of words has its nibbles looked up one after the
// other. An instruction set also gives, before it includes this file: Words, words_at, and the
// look_up of one nibble.
#include "gemm.h"

namespace quant {
namespace {

// Four vectors hold nibbles 0 .. 3 of some words.
constexpr int column_of(int vector, int lane) {
  return 32 * (vector % 4) + vector / 4 * kColumnsAtOnce + lane;
}
template <class Tables>
inline void look_up(const uint8_t* words, int four, const Tables& table, Kind, Sum (&found)[4]) {
  const Words some = words_at(words, four);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) found[j] = look_up(some, j, table(j));
}

}  // namespace
}  // namespace quant

#include "fp8_kernels.h"

namespace quant {
namespace {

// Few tokens: each vector of them is loaded once for some rows.
template <int Tokens>
__attribute__((noinline)) void fp8_stream(const Unpacking& unpacking, int64_t eight, int64_t spans,
                                          const Operand* x, float* sums) {
  constexpr int kTogether = Tokens * kRows <= kStreamSums       ? kRows
                            : Tokens * kRows / 2 <= kStreamSums ? kRows / 2
                                                                : kRows / 4;
  const int64_t columns = spans * kSpan;
  for (int first = 0; first < kRows; first += kTogether) {
    Sum sum[kTogether][Tokens];
#pragma GCC unroll 8
    for (int r = 0; r < kTogether; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < Tokens; ++m) sum[r][m] = zero();
    }
    for (int64_t span = 0; span < spans; ++span) {
      Levels found[kTogether];
      for (int r = 0; r < kTogether; ++r) unpacking.levels(eight, span, first + r, found[r]);
      const uint8_t* words = unpacking.codes(eight, span) + first * kRowBytes;
      const Operand* token = x + span * kSpan;
      for (int r = 0; r < kTogether; ++r) __builtin_prefetch(words + r * kRowBytes + kAhead);
      for (int part = 0; part < kFours; ++part) {
        Words some[kTogether];
#pragma GCC unroll 8
        for (int r = 0; r < kTogether; ++r) some[r] = words_at(words + r * kRowBytes, part);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, token += kColumnsAtOnce) {
          Sum tokens[Tokens];
#pragma GCC unroll 4
          for (int m = 0; m < Tokens; ++m) tokens[m] = operand(token + m * columns);
#pragma GCC unroll 8
          for (int r = 0; r < kTogether; ++r) {
            const Sum weight = look_up(some[r], j, found[r].table(j));
#pragma GCC unroll 4
            for (int m = 0; m < Tokens; ++m) dot(sum[r][m], weight, tokens[m]);
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

}  // namespace
}  // namespace quant
