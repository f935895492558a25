// INT8 with AMX: tiles of 16 tokens x 64 columns times 64 columns x 16 outputs, summed in INT32.
//
// Tiles multiply signed bytes, and q t is one (-128 .. 112), so that sums need no correction. They
// are four tiles, which stay in registers over all of K: a block's 64 outputs for 16 tokens, or 32
// of them for 32 tokens. Tokens are laid out as tiles, [tokens / 16, K / 64, 16, 64]: rows that are
// 4096 bytes apart would fall into one set of the L1 cache. A tile of operands is 16 steps of four
// columns as they lie, [steps, outputs, 4]. Up to 4 tokens go the way of int8_kernels.h: memory is
// the limit, and registers need no detour.
//
// Operands are made anew for every 32 tokens, between the products: a core does both at once. On a
// Xeon at 3.8 GHz, four products of 32 x 32 sums and 64 columns take 33 ns with tokens from the L2
// cache (12 of them wait for it), unpacking 24, both together 49. Operands of 384 columns made once
// for all tokens left sums to load and store, 115 ns after 160 of products: a tenth slower.
#define QUANT_AMX
#include "int8_avx512.cpp"
#include "tiles.h"

namespace quant {
namespace {

constexpr int kTile = 16;  // tokens
constexpr int kStep = 64;  // columns
constexpr int64_t kTileBytes = 1024;

int64_t padded(const Gemm& g) { return (g.k + kStep - 1) / kStep * kStep; }
int64_t tokens_bytes(const Gemm& g) { return (g.m + kTile - 1) / kTile * kTile * padded(g); }

// Tokens as tiles, and behind them what int8_kernels.h prepares for few tokens.
int64_t amx_token_bytes(const Gemm& g) { return padded(g) + int8_token_bytes(g); }
int64_t amx_scratch_bytes(const Gemm&) { return 2 * kStep * kBlock; }
int64_t amx_most_tokens(const Gemm& g) { return tokens_in_cache(padded(g)); }

void amx_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  if (g.m <= kStreamTokens) return int8_prepare(g, token, prepared + tokens_bytes(g));
  const uint8_t* x = g.x + token * g.x_stride;
  uint8_t* to = prepared + token / kTile * kTile * padded(g) + token % kTile * kStep;
  for (int64_t k = 0; k < g.k; k += kStep, to += kTileBytes) {
    const __mmask64 some = g.k - k < kStep ? (1ull << (g.k - k)) - 1 : ~0ull;
    store(to, _mm512_maskz_loadu_epi8(some, x + k));
  }
}

// The scales of a group of 32 Lines outputs, and 8 t: what the code 0 stands for.
template <bool Scaled, int Lines>
struct GroupScales {
  V scale[2 * Lines], zero[2 * Lines];

  GroupScales(const uint8_t* t, int64_t group, int line) {
#pragma GCC unroll 4
    for (int v = 0; v < 2 * Lines; ++v) {
      zero[v] = splat(0x08080808);
      if (!Scaled) continue;
      const V pair = widen(t + group / 2 * 2 * kBlock + (2 * line + v) * (kBytes / 2));
      scale[v] = group % 2 == 0 ? first_of_pair(pair) : second_of_pair(pair);
      zero[v] = multiply16(zero[v], scale[v]);
    }
  }

  // Four columns -> operands q t.
  void unpack(const uint8_t* codes, uint8_t* operands) const {
    const V mask = splat(0x0F0F0F0F);
#pragma GCC unroll 2
    for (int i = 0; i < Lines; ++i) {
      const V bytes = load(codes + i * kBytes);
      V low = and_bytes(bytes, mask), high = and_bytes(shift_nibble(bytes), mask);
      if (Scaled) {
        low = multiply16(low, scale[2 * i]);
        high = multiply16(high, scale[2 * i + 1]);
      }
      store(operands + 2 * i * kBytes, _mm512_sub_epi8(low, zero[2 * i]));
      store(operands + (2 * i + 1) * kBytes, _mm512_sub_epi8(high, zero[2 * i + 1]));
    }
  }
};

// A block and 16 tokens (two lines of codes every four columns), or half a block and 32 tokens
// (one line of the two). Two halves of K are read side by side: memory gives a sixth more than to
// one stream. Operands are made a step ahead of their use: a tile is loaded from the cache, not
// from stores under way. Products that follow each other would fill the core's window of
// instructions, so they are spread over the columns that are unpacked.
template <bool Scaled, int Lines>
void multiply_rows(const Gemm& g, const uint8_t* codes, const uint8_t* t, int line,
                   const uint8_t* x, uint8_t* operands, int32_t* sums) {
  constexpr int64_t kRow = 2 * Lines * kBytes;  // of operands: four columns
  const auto operands_of = [&](int64_t step) { return operands + step % 2 * (kStep / 4 * kRow); };
  const int64_t steps = padded(g) / kStep, half = (steps + 1) / 2;
  const auto column_of = [&](int64_t step) { return (step / 2 + step % 2 * half) * kStep; };
  const auto scales_of = [&](int64_t column) {
    return GroupScales<Scaled, Lines>(t, column / g.group_size, line);
  };
  const auto codes_of = [&](int64_t column) { return codes + column / 4 * 2 * kBlock; };
  const auto unpack = [&](int64_t first, uint8_t* to) {
    for (int64_t k = first; k < first + kStep && k < g.k; k += 4, to += kRow) {
      scales_of(k).unpack(codes_of(k) + line * kBytes, to);
    }
  };
  written(operands);  // not before what is there is read
  zero_tiles();
  unpack(0, operands);
  written(operands);
  for (int64_t step = 0; step < steps; ++step) {
    const uint8_t* token = x + column_of(step) * kTile;
    const uint8_t* from = operands_of(step);
    uint8_t* to = operands_of(step + 1);
    const auto multiply = [&](int64_t k) __attribute__((always_inline)) {
      if (k == 0) _tile_loadd(4, token, kStep);
      if (Lines == 2) {
        if (k == 4) _tile_loadd(5, from, kRow);
        if (k == 12) _tile_dpbssd(0, 4, 5);
        if (k == 16) _tile_loadd(6, from + 64, kRow);
        if (k == 24) _tile_dpbssd(1, 4, 6);
        if (k == 32) _tile_loadd(7, from + 128, kRow);
        if (k == 40) _tile_dpbssd(2, 4, 7);
        if (k == 48) _tile_loadd(5, from + 192, kRow);
        if (k == 56) _tile_dpbssd(3, 4, 5);
      } else {
        if (k == 4) _tile_loadd(6, from, kRow);
        if (k == 12) _tile_dpbssd(0, 4, 6);
        if (k == 16) _tile_loadd(7, from + 64, kRow);
        if (k == 24) _tile_dpbssd(1, 4, 7);
        if (k == 28) _tile_loadd(5, token + kTile * padded(g), kStep);
        if (k == 40) _tile_dpbssd(2, 5, 6);
        if (k == 56) _tile_dpbssd(3, 5, 7);
      }
    };
    const int64_t next = column_of(step + 1);
    if (step + 1 == steps || next + kStep > g.k) {
      if (step + 1 < steps) unpack(next, to);
      for (int64_t k = 0; k < kStep; k += 4) multiply(k);
    } else {
      GroupScales<Scaled, Lines> scales = scales_of(next);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kStep; k += 4) {
        if (k == kStep / 2 && g.group_size < kStep) scales = scales_of(next + k);
        scales.unpack(codes_of(next + k) + line * kBytes, to + k / 4 * kRow);
        if (line == 0) {  // both lines, of which the other is read soon
          __builtin_prefetch(codes_of(next + k) + kAhead);
          __builtin_prefetch(codes_of(next + k) + kAhead + kBytes);
        }
        multiply(k);
      }
    }
    written(operands);
  }
  if (Lines == 2) return store_tiles(sums, 16, 4 * kBlock);
  sums += line * kBlock / 2;
  _tile_stored(0, sums, 4 * kBlock);
  _tile_stored(1, sums + 16, 4 * kBlock);
  _tile_stored(2, sums + kTile * kBlock, 4 * kBlock);
  _tile_stored(3, sums + kTile * kBlock + 16, 4 * kBlock);
}

template <bool Scaled>
void multiply_block(const Gemm& g, int64_t block, int tokens, const uint8_t* x, uint8_t* operands,
                    int32_t* sums) {
  const uint8_t* codes = g.codes + block * (g.k / 4) * 2 * kBlock;
  const uint8_t* t = static_cast<const uint8_t*>(g.t) + block * g.pairs() * 2 * kBlock;
  for (int m = 0; m < tokens; m += 2 * kTile, x += 2 * kTile * padded(g)) {
    if (m + kTile >= tokens) {
      multiply_rows<Scaled, 2>(g, codes, t, 0, x, operands, sums + m * kBlock);
      continue;
    }
    for (int line = 0; line < 2; ++line) {
      multiply_rows<Scaled, 1>(g, codes, t, line, x, operands, sums + m * kBlock);
    }
  }
}

void amx_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                  const uint8_t* prepared, uint8_t* scratch, uint8_t* sums, int64_t apart) {
  if (g.m <= kStreamTokens) {
    return int8_multiply(g, blocks, first, tokens, prepared + tokens_bytes(g), scratch, sums,
                         apart);
  }
  configure_tiles();
  const auto multiply = g.per_channel ? multiply_block<false> : multiply_block<true>;
  for (int i = 0; i < blocks.count; ++i) {
    multiply(g, blocks.at[i], tokens, prepared + first * padded(g), scratch,
             reinterpret_cast<int32_t*>(sums + i * apart));
  }
  _tile_release();
  written(sums);
}

constexpr Kernels amx_kernels() noexcept {
  Kernels kernels = int8_kernels();
  kernels.blocks = 4;
  kernels.tile = 2 * kTile;
  kernels.most_tokens = amx_most_tokens;
  kernels.token_bytes = amx_token_bytes;
  kernels.scratch_bytes = amx_scratch_bytes;
  kernels.prepare = amx_prepare;
  kernels.multiply = amx_multiply;
  return kernels;
}

}  // namespace

const Kernels kInt8Amx = amx_kernels();

}  // namespace quant
