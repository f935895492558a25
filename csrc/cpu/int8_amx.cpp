// INT8 with AMX: tiles of 16 tokens x 64 columns times 64 columns x 16 outputs, summed in INT32.
//
// Tiles multiply signed bytes, and q t is one (-128 .. 112), so that sums need no correction. A
// block's 64 outputs are four tiles of sums. Tokens are laid out as tiles, [tokens / 16, K / 64,
// 16, 64]: rows that are 4096 bytes apart would fall into one set of the L1 cache. A tile of
// operands is 16 steps of four columns as they lie, [steps, 64 outputs, 4].
//
//   up to 4 tokens   int8_kernels.h: memory is the limit, and registers need no detour
//   up to 48 tokens  for every 16, sums stay in tiles over all of K; operands are made a step ahead
//   more             kColumnsTogether columns become operands in the L1 cache, then all tokens
//                    pass; blocks share the tokens' columns, which stay in the L2 cache meanwhile
//
// On a Xeon at 3 GHz four products take 21 ns, with their five tiles from the L1 cache 25, with
// that of the tokens from the L2 cache 27, with all from there 32. A pass over 384 columns spends
// 160 ns on products and 115 on the sums, which it takes from the L2 cache and leaves there: their
// stores do not overlap. Operands for all of K, in the L2 cache, spare that and come out the same.
#define QUANT_AMX
#include "int8_avx512.cpp"
#include "tiles.h"

namespace quant {
namespace {

constexpr int kTile = 16;  // tokens
constexpr int kFew = 48;
constexpr int kStep = 64;  // columns
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepBytes = kStep * kBlock;  // of operands
// Columns whose operands are made together: 24 KiB, half of the L1 cache.
constexpr int64_t kColumnsTogether = 384;

int64_t padded(const Gemm& g) { return (g.k + kStep - 1) / kStep * kStep; }
int64_t tokens_bytes(const Gemm& g) { return (g.m + kTile - 1) / kTile * kTile * padded(g); }

// Tokens as tiles, and behind them what int8_kernels.h prepares for few tokens.
int64_t amx_token_bytes(const Gemm& g) { return padded(g) + int8_token_bytes(g); }
// 1.1 MiB of tokens where K is 4096, of an L2 cache of two.
int64_t amx_most_tokens(const Gemm&) { return 288; }
int64_t amx_scratch_bytes(const Gemm&) { return kColumnsTogether * kBlock; }

void amx_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  if (g.m <= kStreamTokens) return int8_prepare(g, token, prepared + tokens_bytes(g));
  const uint8_t* x = g.x + token * g.x_stride;
  uint8_t* to = prepared + token / kTile * kTile * padded(g) + token % kTile * kStep;
  for (int64_t k = 0; k < g.k; k += kStep, to += kTileBytes) {
    const __mmask64 some = g.k - k < kStep ? (1ull << (g.k - k)) - 1 : ~0ull;
    store(to, _mm512_maskz_loadu_epi8(some, x + k));
  }
}

// The scales of a group of a block's outputs, and 8 t: what the code 0 stands for.
template <bool Scaled>
struct GroupScales {
  V scale[4], zero[4];

  GroupScales(const uint8_t* t, int64_t group) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      zero[v] = splat(0x08080808);
      if (!Scaled) continue;
      const V pair = widen(t + group / 2 * 2 * kBlock + v * (kBytes / 2));
      scale[v] = group % 2 == 0 ? first_of_pair(pair) : second_of_pair(pair);
      zero[v] = multiply16(zero[v], scale[v]);
    }
  }

  // Four columns of 64 outputs -> operands q t.
  void unpack(const uint8_t* codes, uint8_t* operands) const {
    const V mask = splat(0x0F0F0F0F);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __builtin_prefetch(codes + i * kBytes + kAhead);
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

// Columns [first, first + columns) of a block -> operands q t.
template <bool Scaled>
inline void unpack_signed(const Gemm& g, const uint8_t* codes, const uint8_t* t, int64_t first,
                          int64_t columns, uint8_t* operands) {
  const int64_t end = first + columns < g.k ? first + columns : g.k;
  codes += first / 4 * 2 * kBlock;
  for (int64_t k = first; k < end;) {
    const int64_t group = k / g.group_size;
    const int64_t until = (group + 1) * g.group_size < end ? (group + 1) * g.group_size : end;
    const GroupScales<Scaled> scales(t, group);
    for (; k < until; k += 4, codes += 2 * kBlock, operands += 4 * kBlock) {
      scales.unpack(codes, operands);
    }
  }
  written(operands);
}

void unpack_signed(const Gemm& g, const uint8_t* codes, const uint8_t* t, int64_t first,
                   int64_t columns, uint8_t* operands) {
  if (g.per_channel) return unpack_signed<false>(g, codes, t, first, columns, operands);
  unpack_signed<true>(g, codes, t, first, columns, operands);
}

inline void multiply_step(const uint8_t* x, const uint8_t* operands) {
  _tile_loadd(4, x, kStep);
  _tile_loadd(5, operands, 4 * kBlock);
  _tile_dpbssd(0, 4, 5);
  _tile_loadd(6, operands + 64, 4 * kBlock);
  _tile_dpbssd(1, 4, 6);
  _tile_loadd(7, operands + 128, 4 * kBlock);
  _tile_dpbssd(2, 4, 7);
  _tile_loadd(5, operands + 192, 4 * kBlock);
  _tile_dpbssd(3, 4, 5);
}

// Two halves of K are read side by side: memory gives a sixth more than to one stream. Operands are
// written a step ahead of their use: a tile is loaded from the cache, not from stores under way.
// And the products come between the columns that are unpacked: a core then does both at once, where
// one after the other fills its window of instructions.
template <bool Scaled>
void multiply_few(const Gemm& g, const uint8_t* codes, const uint8_t* t, const uint8_t* x,
                  uint8_t* operands, int32_t* sums) {
  const int64_t steps = padded(g) / kStep, half = (steps + 1) / 2;
  const auto step_of = [&](int64_t i) { return i / 2 + i % 2 * half; };
  zero_tiles();
  unpack_signed<Scaled>(g, codes, t, 0, kStep, operands);
  for (int64_t i = 0; i < steps; ++i) {
    const uint8_t* token = x + step_of(i) * kTileBytes;
    const uint8_t* from = operands + i % 2 * kStepBytes;
    uint8_t* to = operands + (i + 1) % 2 * kStepBytes;
    const int64_t next = step_of(i + 1) * kStep;
    const bool last = i + 1 == steps;
    if (last || next + kStep > g.k || g.group_size < kStep) {
      if (!last) unpack_signed<Scaled>(g, codes, t, next, kStep, to);
      multiply_step(token, from);
      continue;
    }
    const GroupScales<Scaled> scales(t, next / g.group_size);
#pragma GCC unroll 16
    for (int k = 0; k < kStep; k += 4) {
      scales.unpack(codes + (next + k) / 4 * 2 * kBlock, to + k * kBlock);
      if (k == 0) _tile_loadd(4, token, kStep);
      if (k == 4) _tile_loadd(5, from, 4 * kBlock);
      if (k == 12) _tile_dpbssd(0, 4, 5);
      if (k == 16) _tile_loadd(6, from + 64, 4 * kBlock);
      if (k == 24) _tile_dpbssd(1, 4, 6);
      if (k == 32) _tile_loadd(7, from + 128, 4 * kBlock);
      if (k == 40) _tile_dpbssd(2, 4, 7);
      if (k == 48) _tile_loadd(5, from + 192, 4 * kBlock);
      if (k == 56) _tile_dpbssd(3, 4, 5);
    }
    written(operands);
  }
  store_tiles(sums, 16, 4 * kBlock);
}

// A walk over lines of memory that are fetched while something else is done.
struct Fetch {
  const uint8_t* line;
  int64_t left, at_once;

  void some() {
    if (left <= 0) return;
    for (int64_t i = 0; i < at_once; ++i, line += 64) __builtin_prefetch(line, 0, 2);
    left -= at_once;
  }
};

// sums += x operands^T for all tokens, from nothing where `begin`.
void multiply_many(int tokens, const uint8_t* x, int64_t x_apart, const uint8_t* operands,
                   int64_t columns, bool begin, Fetch fetch, int32_t* sums) {
  for (int m = 0; m < tokens; m += kTile, x += x_apart, sums += kTile * kBlock) {
    if (begin) zero_tiles();
    if (!begin) load_tiles(sums, 16, 4 * kBlock);
    for (int64_t i = 0; i < columns / kStep; ++i) {
      fetch.some();
      multiply_step(x + i * kTileBytes, operands + i * kStepBytes);
    }
    store_tiles(sums, 16, 4 * kBlock);
  }
}

void amx_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                  const uint8_t* prepared, uint8_t* operands, uint8_t* sums, int64_t apart) {
  if (g.m <= kStreamTokens) {
    return int8_multiply(g, blocks, first, tokens, prepared + tokens_bytes(g), operands, sums,
                         apart);
  }
  configure_tiles();
  const auto codes_of = [&](int64_t block) { return g.codes + block * (g.k / 4) * 2 * kBlock; };
  const auto t_of = [&](int64_t block) {
    return static_cast<const uint8_t*>(g.t) + block * g.pairs() * 2 * kBlock;
  };
  const auto sums_of = [&](int i) { return reinterpret_cast<int32_t*>(sums + i * apart); };
  const uint8_t* x = prepared + first * padded(g);
  for (int i = 0; i < blocks.count && tokens <= kFew; ++i) {
    for (int m = 0; m < tokens; m += kTile) {
      const auto few = g.per_channel ? multiply_few<false> : multiply_few<true>;
      few(g, codes_of(blocks.at[i]), t_of(blocks.at[i]), x + m * padded(g), operands,
          sums_of(i) + m * kBlock);
    }
  }
  constexpr int64_t most = kColumnsTogether;
  for (int64_t k = 0; k < padded(g) && tokens > kFew; k += most, x += most * kTile) {
    const int64_t columns = padded(g) - k < most ? padded(g) - k : most;
    const bool end = k + columns == padded(g);
    for (int i = 0; i < blocks.count; ++i) {
      unpack_signed(g, codes_of(blocks.at[i]), t_of(blocks.at[i]), k, columns, operands);
      // What comes next is fetched while the tokens are multiplied, some lines a step.
      const bool last = i + 1 == blocks.count;
      const int64_t next = !last ? blocks.at[i + 1] : end ? blocks.next : blocks.at[0];
      Fetch fetch = {};
      if (next >= 0 && tokens < kManyTokens) {
        const int64_t steps = (tokens + kTile - 1) / kTile * (columns / kStep);
        fetch.line = codes_of(next) + (!last ? k : end ? 0 : k + most) / 4 * 2 * kBlock;
        fetch.left = columns / 2;
        fetch.at_once = (fetch.left + steps - 1) / steps;
      }
      multiply_many(tokens, x, kTile * padded(g), operands, columns, k == 0, fetch, sums_of(i));
    }
  }
  _tile_release();
  written(sums);
}

constexpr Kernels amx_kernels() noexcept {
  Kernels kernels = int8_kernels();
  kernels.blocks = 4;
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
