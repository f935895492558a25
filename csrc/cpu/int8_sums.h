// What INT8 kernels of a block share, for any vector: y[m, n] = sum_k x[m, k] q[n, k] t[n, k / g].
//
// Dot products of bytes want one factor unsigned. With b = q + 8 in 0..15 and t in 1..16
//
//   sum_k x q t = sum_k x b t - 8 sum_G t[n, G] X[m, G],     X[m, G] = sum of x over group G
//
// The second term is what the sums begin with. |X| <= 128 * 128 fits 16 bits: two groups are one
// step of a 16-bit dot product. INT32 wraps, so only the result has to fit.
//
// A lane is an output, its four bytes are four consecutive k. A step of four k has its 128 bytes of
// codes in the order
//   byte 64 h + 4 o + i:  low nibble b[32 h + o, k + i], high nibble b[32 h + 16 + o, k + i]
// and t comes in pairs of groups: t [pairs, 64, 2] uint8.
//
// An instruction set gives, before it includes this file and in a namespace without a name: V,
// kBytes, kTileTokens, kTileVectors, load, store, splat, dot16, widen, first_of_pair,
// second_of_pair, times8. Nothing here may call a function template of the standard library: the
// linker would share it with code for older machines.
#include <cstring>

#include "gemm.h"

namespace quant {
namespace {

constexpr int kVectors = 4 * kBlock / kBytes;  // of a block
constexpr int kHalf = 64 / kBytes;             // of 16 outputs

// Bytes of codes that are fetched before their turn. From 4096 on, which is another page, it costs
// a fifth of the bandwidth (measured on a Xeon: 18 GB/s a core up to 3072, 15 beyond). Two to four
// tokens gain up to 8% from more than one token wants, and 13% with AVX-VNNI.
constexpr int kAhead = 1024;
constexpr int kFurtherAhead = 3072;
constexpr int kStreamTokens = 4;  // few, whose codes become operands in registers

int32_t word_at(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// Prepared tokens: -X[m, G] in pairs of int16, or one int32 -8 X[m] with one scale an output. Where
// there are few, these lie behind their x as [K / 4, tokens, 4]: one stream to fetch from the L2
// cache, not one a token.
bool are_few(const Gemm& g) { return g.m <= kStreamTokens; }
int64_t int8_sum_bytes(const Gemm& g) { return g.per_channel ? 4 : 4 * g.pairs(); }
int64_t int8_token_bytes(const Gemm& g) { return int8_sum_bytes(g) + (are_few(g) ? g.k : 0); }
int64_t int8_x_bytes(const Gemm& g) { return are_few(g) ? g.m * g.k : 0; }
int64_t int8_most_tokens(const Gemm& g) { return (1 << 20) / (g.k + 4 * kBlock); }

void int8_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  const int8_t* x = reinterpret_cast<const int8_t*>(g.x) + token * g.x_stride;
  for (int64_t step = 0; step < g.k / 4 && are_few(g); ++step) {
    std::memcpy(prepared + 4 * (step * g.m + token), x + 4 * step, 4);
  }
  uint8_t* to = prepared + int8_x_bytes(g) + token * int8_sum_bytes(g);
  if (g.per_channel) {
    int32_t sum = 0;
    for (int64_t k = 0; k < g.k; ++k) sum += x[k];
    sum *= -8;
    std::memcpy(to, &sum, 4);
    return;
  }
  for (int64_t group = 0; group < 2 * g.pairs(); ++group) {
    int32_t sum = 0;
    if (group < g.groups()) {
      for (int64_t k = 0; k < g.group_size; ++k) sum += x[group * g.group_size + k];
    }
    const int16_t negative = static_cast<int16_t>(-sum);
    std::memcpy(to + 2 * group, &negative, 2);
  }
}

// sums[m, :] = -8 sum_G t X for as many tokens as a tile takes; returns their number.
template <int Tokens>
int begin_sums(int left, const Gemm& g, const uint8_t* t, const uint8_t* prepared, int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (left < Tokens) return begin_sums<Tokens - 1>(left, g, t, prepared, sums);
  }
  const int64_t stride = int8_sum_bytes(g);
  for (int first = 0; first < kVectors; first += kTileVectors) {
    V sum[Tokens][kTileVectors];
    for (int m = 0; m < Tokens; ++m) {
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = splat(0);
    }
    for (int64_t pair = 0; pair < g.pairs(); ++pair) {
      for (int v = 0; v < kTileVectors; ++v) {
        const V scale = widen(t + pair * 2 * kBlock + (first + v) * (kBytes / 2));
        for (int m = 0; m < Tokens; ++m) {
          dot16(sum[m][v], scale, splat(word_at(prepared + m * stride + 4 * pair)));
        }
      }
    }
    for (int m = 0; m < Tokens; ++m) {
      for (int v = 0; v < kTileVectors; ++v) {
        store(sums + m * kBlock + (first + v) * (kBytes / 4), times8(sum[m][v]));
      }
    }
  }
  return Tokens;
}

// t of a group, twice in the 32 bits of every lane of vector v.
V scale_of(const uint8_t* t, int64_t group, int v) {
  const V pair = widen(t + group / 2 * 2 * kBlock + v * (kBytes / 2));
  return group % 2 == 0 ? first_of_pair(pair) : second_of_pair(pair);
}

// Four columns of a token: `token` bytes to the next one's, `step` to its next four.
struct Columns {
  const uint8_t* at;
  int64_t token, step;
};

Columns int8_columns(const Gemm& g, int64_t first, const uint8_t* prepared) {
  if (are_few(g)) return {prepared, 4, 4 * g.m};
  return {g.x + first * g.x_stride, g.x_stride, 4};
}

void int8_begin(const Gemm& g, const uint8_t* t, int64_t first, int tokens, const uint8_t* prepared,
                int32_t* sums) {
  const int64_t bytes = int8_sum_bytes(g);
  for (int m = 0; m < tokens;) {
    const uint8_t* token = prepared + int8_x_bytes(g) + (first + m) * bytes;
    if (g.per_channel) {
      const V sum = splat(word_at(token));
      for (int v = 0; v < kVectors; ++v) store(sums + m * kBlock + v * (kBytes / 4), sum);
      ++m;
    } else {
      m += begin_sums<kTileTokens>(tokens - m, g, t, token, sums + m * kBlock);
    }
  }
}

// What int8_kernels.h and int8_parts.h do each in its way.
int64_t int8_scratch_bytes(const Gemm& g);
void int8_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                   const uint8_t* prepared, uint8_t* operands, uint8_t* sums, int64_t apart);

// Evaluated by the compiler: nothing of this file may run where the machine lacks its instructions.
constexpr Kernels int8_kernels() noexcept {
  return {1,
          1,
          kRange,
          int8_most_tokens,
          int8_token_bytes,
          int8_scratch_bytes,
          int8_prepare,
          int8_multiply};
}

}  // namespace
}  // namespace quant
