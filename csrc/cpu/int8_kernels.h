// The INT8 kernel of a block with dot products of four bytes (vpdpbusd); sums begin as in
// int8_sums.h. The products b t fit eight bits, so that one INT32 sum runs over all of K:
//
//   sum_k x q t = sum_k x (b t) - 8 sum_G t[n, G] X[m, G]
//
// Two bytes of b times t are one 16-bit product, since neither exceeds 240.
//
// For few tokens, codes become operands in registers (`stream`); for more, in scratch memory, some
// columns at a time (`tile`).
//
// Tried for many tokens on a Xeon, and no faster with a thread on every core: the next columns'
// operands made between the products; tokens laid out as tiles want them; tiles of 12 tokens x 32
// outputs over 512 columns. A step's operands cost 8 clocks (16 tokens) to 17 (64), where their ten
// instructions on two ports would take 5.
//
// An instruction set gives, beside what int8_sums.h wants: kManyColumns, and_bytes, shift_nibble,
// multiply16, dot8.
#include "int8_sums.h"

namespace quant {
namespace {

// Columns that are unpacked together: for the L1 cache, since writing operands elsewhere costs more
// than it saves; for many tokens all that the L2 cache takes, so that sums stay in registers
// longer.
constexpr int kColumns = 256;
constexpr int kManyTokens = 96;
constexpr int kStreamVectors = kBytes == 64 ? 2 : 1;  // of codes, at once
constexpr int kStreams = kBytes == 64 ? 2 : 1;        // with scales of their own in registers

int64_t int8_scratch_bytes(const Gemm&) { return kBlock * kManyColumns; }

// codes [steps, 128] -> operands b t [steps, 64, 4]; Scaled: times t of the steps' group.
template <bool Scaled>
void unpack_group(const uint8_t* codes, int64_t steps, const uint8_t* t, int64_t group,
                  uint8_t* operands) {
  const V mask = splat(0x0F0F0F0F);
  V scale[kVectors];
  for (int v = 0; v < kVectors && Scaled; ++v) scale[v] = scale_of(t, group, v);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors / 2; ++i) {
      const int low = i / kHalf * 2 * kHalf + i % kHalf;
      __builtin_prefetch(codes + step * 2 * kBlock + i * kBytes + kAhead);
      const V bytes = load(codes + step * 2 * kBlock + i * kBytes);
      V first = and_bytes(bytes, mask);
      V second = and_bytes(shift_nibble(bytes), mask);
      if (Scaled) {
        first = multiply16(first, scale[low]);
        second = multiply16(second, scale[low + kHalf]);
      }
      uint8_t* to = operands + step * 4 * kBlock + low * kBytes;
      store(to, first);
      store(to + kHalf * kBytes, second);
    }
  }
}

void unpack(const Gemm& g, const uint8_t* codes, const uint8_t* t, int64_t first, int64_t columns,
            uint8_t* operands) {
  if (g.per_channel) return unpack_group<false>(codes, columns / 4, t, 0, operands);
  for (int64_t k = 0; k < columns; k += g.group_size) {
    unpack_group<true>(codes + k / 4 * 2 * kBlock, g.group_size / 4, t, (first + k) / g.group_size,
                       operands + k * kBlock);
  }
}

// sums += x operands^T for `Tokens` tokens, the loop that everything else is there for.
template <int Tokens>
__attribute__((noinline)) void tile(const uint8_t* operands, int64_t steps, const int8_t* x,
                                    int64_t x_stride, int32_t* sums, Ahead ahead) {
  for (int first = 0; first < kVectors; first += kTileVectors) {
    V sum[Tokens][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        sum[m][v] = load(sums + m * kBlock + (first + v) * (kBytes / 4));
      }
    }
    const uint8_t* w = operands + first * kBytes;
    for (int64_t step = 0; step < steps; ++step) {
      if (step < ahead.lines) __builtin_prefetch(ahead.at + step * 64, 0, 2);
      V weight[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) weight[v] = load(w + step * 4 * kBlock + v * kBytes);
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) {
        const V token = splat(word_at(x + m * x_stride + 4 * step));
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) dot8(sum[m][v], weight[v], token);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
        store(sums + m * kBlock + (first + v) * (kBytes / 4), sum[m][v]);
      }
    }
  }
}

// As many tokens as a tile takes, at most Tokens; returns their number.
template <int Tokens>
int tiles(int left, const uint8_t* operands, int64_t steps, const int8_t* x, int64_t x_stride,
          int32_t* sums, Ahead ahead) {
  if constexpr (Tokens > 1) {
    if (left < Tokens) {
      return tiles<Tokens - 1>(left, operands, steps, x, x_stride, sums, ahead);
    }
  }
  tile<Tokens>(operands, steps, x, x_stride, sums, ahead);
  return Tokens;
}

// The scales of four columns' operands, of one group.
struct Scales {
  V of[2 * kStreamVectors];

  void load_group(const uint8_t* t, int64_t group, int low) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kStreamVectors; ++v) {
      of[v] = scale_of(t, group, low + kHalf * v);
    }
  }
};

// sums += x W^T for few tokens: codes become operands in registers, once for all tokens. K is read
// in kStreams parts side by side, of which memory gives a sixth more a second than of one.
template <int Tokens, bool Scaled>
__attribute__((noinline)) void stream(const Gemm& g, const uint8_t* codes, const uint8_t* t,
                                      Columns x, int32_t* sums) {
  constexpr int kWide = 2 * kStreamVectors;
  constexpr int ahead = Tokens == 1 ? kAhead : kFurtherAhead;
  const V mask = splat(0x0F0F0F0F);
  // One scale an output: any part of K is a group.
  const int64_t steps = Scaled ? g.group_size / 4 : 1, groups = g.k / 4 / steps;
  const int64_t part = (groups + kStreams - 1) / kStreams;
  for (int i = 0; i < kVectors / 2; i += kStreamVectors) {
    const int low = i / kHalf * 2 * kHalf + i % kHalf;
    V sum[Tokens][kWide];
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) {
        sum[m][v] = load(sums + m * kBlock + (low + kHalf * v) * (kBytes / 4));
      }
    }
    const auto add_step = [&](int64_t step, const Scales& scales) __attribute__((always_inline)) {
      const uint8_t* bytes = codes + step * 2 * kBlock + i * kBytes;
      V weight[kWide];
#pragma GCC unroll 8
      for (int v = 0; v < kStreamVectors; ++v) {
        __builtin_prefetch(bytes + v * kBytes + ahead);
        const V both = load(bytes + v * kBytes);
        weight[2 * v] = and_bytes(both, mask);
        weight[2 * v + 1] = and_bytes(shift_nibble(both), mask);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kWide && Scaled; ++v) weight[v] = multiply16(weight[v], scales.of[v]);
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) {
        const V some = splat(word_at(x.at + m * x.token + step * x.step));
#pragma GCC unroll 8
        for (int v = 0; v < kWide; ++v) dot8(sum[m][v], weight[v], some);
      }
    };
    for (int64_t group = 0; group < part; ++group) {
      Scales scales[kStreams] = {};
      int streams = 0;
      for (int64_t s = 0; s < kStreams && group + s * part < groups; ++s, ++streams) {
        if (Scaled) scales[s].load_group(t, group + s * part, low);
      }
      const int64_t first = group * steps;
      if (streams == kStreams) {
        for (int64_t step = first; step < first + steps; ++step) {
#pragma GCC unroll 2
          for (int s = 0; s < kStreams; ++s) add_step(step + s * part * steps, scales[s]);
        }
      } else {
        for (int64_t step = first; step < first + steps; ++step) add_step(step, scales[0]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < kWide; ++v) {
        store(sums + m * kBlock + (low + kHalf * v) * (kBytes / 4), sum[m][v]);
      }
    }
  }
}

template <int Tokens>
void streams(int tokens, const Gemm& g, const uint8_t* codes, const uint8_t* t, Columns x,
             int32_t* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return streams<Tokens - 1>(tokens, g, codes, t, x, sums);
  }
  if (g.per_channel) return stream<Tokens, false>(g, codes, t, x, sums);
  stream<Tokens, true>(g, codes, t, x, sums);
}

// Where the next block's scales and later parts of K begin, nothing comes before that would have
// fetched them.
void fetch_beginnings(const Gemm& g, int64_t next) {
  const uint8_t* t = static_cast<const uint8_t*>(g.t) + next * g.pairs() * 2 * kBlock;
  for (int64_t i = 0; i < g.pairs() * 2 * kBlock && !g.per_channel; i += 64) {
    __builtin_prefetch(t + i);
  }
  const uint8_t* codes = g.codes + next * (g.k / 4) * 2 * kBlock;
  for (int s = 1; s < kStreams; ++s) {
    const uint8_t* part = codes + g.k / 4 * s / kStreams * 2 * kBlock;
    for (int64_t i = 0; i < kAhead; i += 64) __builtin_prefetch(part + i);
  }
}

void int8_block(const Gemm& g, int64_t block, int64_t next, int64_t first, int tokens,
                const uint8_t* prepared, uint8_t* operands, int32_t* sums) {
  const int8_t* x = reinterpret_cast<const int8_t*>(g.x) + first * g.x_stride;
  const uint8_t* codes = g.codes + block * (g.k / 4) * 2 * kBlock;
  const uint8_t* t = static_cast<const uint8_t*>(g.t) + block * g.pairs() * 2 * kBlock;
  if (next >= 0) fetch_beginnings(g, next);
  int8_begin(g, t, first, tokens, prepared, sums);
  if (tokens <= kStreamTokens) {  // of few, or the last ones of many
    return streams<kStreamTokens>(tokens, g, codes, t, int8_columns(g, first, prepared), sums);
  }
  const int64_t most = tokens < kManyTokens ? kColumns : kManyColumns;
  for (int64_t k = 0; k < g.k; k += most) {
    const int64_t columns = g.k - k < most ? g.k - k : most;
    unpack(g, codes + k / 4 * 2 * kBlock, t, k, columns, operands);
    // What comes next is fetched while the tokens are multiplied, an even part in every tile.
    const int64_t left = g.k - k - columns;
    Ahead ahead = {codes + (k + columns) / 4 * 2 * kBlock, (left < most ? left : most) / 2};
    if (left == 0 && next >= 0) {
      ahead = {g.codes + next * (g.k / 4) * 2 * kBlock, (g.k < most ? g.k : most) / 2};
    }
    const int64_t calls = (tokens + kTileTokens - 1) / kTileTokens;
    const int64_t part = (ahead.lines + calls - 1) / calls;
    for (int m = 0; m < tokens;) {
      m += tiles<kTileTokens>(tokens - m, operands, columns / 4, x + m * g.x_stride + k, g.x_stride,
                              sums + m * kBlock, ahead.next(part));
    }
  }
}

void int8_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                   const uint8_t* prepared, uint8_t* operands, uint8_t* sums, int64_t apart) {
  for (int i = 0; i < blocks.count; ++i) {
    const int64_t next = i + 1 < blocks.count ? blocks.at[i + 1] : blocks.next;
    int8_block(g, blocks.at[i], next, first, tokens, prepared, operands,
               reinterpret_cast<int32_t*>(sums + i * apart));
  }
}

}  // namespace
}  // namespace quant
