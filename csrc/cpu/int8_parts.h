// The INT8 kernel of a block without dot products of four bytes: vpmaddubsw adds pairs of products
// in INT16. Products of b = 0 .. 15 fit there for eight steps of four k, which never reach beyond a
// group. Such a part is widened and multiplied by t in one instruction and joins its sum in the L1
// cache, so that codes can be read in the order in which they lie:
//
//   sum_k x q t = sum_parts t sum_k x b - 8 sum_G t[n, G] X[m, G]      (int8_sums.h)
//
// Two instructions a vector and token, of which a Zen 3 begins 1.6 pairs a clock. Codes become
// operands anew for every six tokens, three instructions beside 24: making them once, in scratch
// memory, gained nothing for 64 tokens and lost a fifth for 8. One vector of codes after the other
// over all of K, with sums in registers, took 1.1 (four tokens) to 1.7 times as long (one).
//
// An instruction set gives, beside what int8_sums.h wants: and_bytes, shift_nibble, add_pairs.
#include "int8_sums.h"

namespace quant {
namespace {

constexpr int kPartSteps = 8;
constexpr int kColumns = 512;  // whose codes stay in the L1 cache for all tokens
constexpr int32_t kOnes = 0x00010001;

// Steps [first, end) of `Tokens` tokens.
template <int Tokens, bool Scaled>
__attribute__((noinline)) void add_parts(const Gemm& g, const uint8_t* codes, const uint8_t* t,
                                         int64_t first, int64_t end, Columns x, int32_t* sums) {
  constexpr int kTogether = Tokens == 1 ? 4 : Tokens == 2 ? 2 : 1;  // vectors of codes
  constexpr int ahead = Tokens == 1 ? kAhead : kFurtherAhead;
  const V mask = splat(0x0F0F0F0F);
  const int64_t group_steps = g.group_size / 4;
  V scales[kVectors];
  for (V& scale : scales) scale = splat(kOnes);
  const auto add_part = [&](int i, int64_t step, int64_t count) __attribute__((always_inline)) {
    V part[Tokens][kTogether][2];
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTogether; ++v) part[m][v][0] = part[m][v][1] = splat(0);
    }
    const uint8_t* bytes = codes + step * 2 * kBlock + i * kBytes;
    const uint8_t* tokens = x.at + step * x.step;
#pragma GCC unroll 1
    for (int64_t j = 0; j < count; ++j, bytes += 2 * kBlock, tokens += x.step) {
#pragma GCC unroll 8
      for (int v = 0; v < kTogether; ++v) {
        if (v % 2 == 0) __builtin_prefetch(bytes + v * kBytes + ahead);
        const V both = load(bytes + v * kBytes);
        const V low = and_bytes(both, mask), high = and_bytes(shift_nibble(both), mask);
#pragma GCC unroll 8
        for (int m = 0; m < Tokens; ++m) {
          const V token = splat(word_at(tokens + m * x.token));
          add_pairs(part[m][v][0], low, token);
          add_pairs(part[m][v][1], high, token);
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * kTogether; ++v) {
        const int codes_of = i + v / 2;
        const int at = codes_of / kHalf * 2 * kHalf + codes_of % kHalf + v % 2 * kHalf;
        int32_t* const to = sums + m * kBlock + at * (kBytes / 4);
        V sum = load(to);
        dot16(sum, part[m][v / 2][v % 2], scales[at]);
        store(to, sum);
      }
    }
  };
  for (int64_t step = first; step < end; step += kPartSteps) {
    if (Scaled && (step & (group_steps - 1)) == 0) {
      for (int v = 0; v < kVectors; ++v) scales[v] = scale_of(t, step / group_steps, v);
    }
    const int64_t count = end - step < kPartSteps ? end - step : kPartSteps;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors / 2; i += kTogether) add_part(i, step, count);
  }
}

// As many tokens as fit the registers, at most Tokens; returns their number.
template <int Tokens>
int parts(int left, const Gemm& g, const uint8_t* codes, const uint8_t* t, int64_t first,
          int64_t end, Columns x, int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (left < Tokens) return parts<Tokens - 1>(left, g, codes, t, first, end, x, sums);
  }
  if (g.per_channel) {
    add_parts<Tokens, false>(g, codes, t, first, end, x, sums);
  } else {
    add_parts<Tokens, true>(g, codes, t, first, end, x, sums);
  }
  return Tokens;
}

void int8_block(const Gemm& g, int64_t block, int64_t first, int tokens, const uint8_t* prepared,
                int32_t* sums) {
  const uint8_t* codes = g.codes + block * (g.k / 4) * 2 * kBlock;
  const uint8_t* t = static_cast<const uint8_t*>(g.t) + block * g.pairs() * 2 * kBlock;
  int8_begin(g, t, first, tokens, prepared, sums);
  const Columns x = int8_columns(g, first, prepared);
  const int64_t steps = g.k / 4, most = tokens > kTileTokens ? kColumns / 4 : steps;
  for (int64_t step = 0; step < steps; step += most) {
    const int64_t end = steps - step < most ? steps : step + most;
    for (int m = 0; m < tokens;) {
      const Columns columns = {x.at + m * x.token, x.token, x.step};
      m += parts<kTileTokens>(tokens - m, g, codes, t, step, end, columns, sums + m * kBlock);
    }
  }
}

void int8_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                   const uint8_t* prepared, uint8_t*, uint8_t* sums, int64_t apart) {
  for (int i = 0; i < blocks.count; ++i) {
    int8_block(g, blocks.at[i], first, tokens, prepared,
               reinterpret_cast<int32_t*>(sums + i * apart));
  }
}

int64_t int8_scratch_bytes(const Gemm&) { return 0; }

}  // namespace
}  // namespace quant
