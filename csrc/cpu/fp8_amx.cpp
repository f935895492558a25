// FP8 with AMX: tiles of 16 outputs x 32 columns times 32 columns x 16 tokens, BF16, sums in FP32.
//
// Tokens are laid out in pairs of columns, [tokens / 16, K / 2, 16, 2], or as many as there are. 32
// outputs and up to 32 tokens are four tiles of sums, which stay in registers over all of K; every
// sum takes its pairs of columns in order, however many tokens there are.
//
// Operands are made anew for every 32 tokens, between the products: a core does both at once. On a
// Xeon at 3.8 GHz a row's 64 bytes of codes take 7 clocks (four lookups of two instructions, three
// shifts), their products with 16 tokens 4 to 5, and loading tiles 3. One after the other that is
// 14, mixed 10.5; with 32 tokens 18, as tokens come from the L2 cache at two clocks a line.
// Operands of many columns, made once for all tokens, left sums to load and store: half as fast for
// 32 tokens, four fifths for 512.
#define QUANT_BF16
#define QUANT_AMX
#include "fp8_avx512.cpp"
#include "tiles.h"
#include "transpose.h"

namespace quant {
namespace {

constexpr int kTogether = 16;  // tokens
constexpr int kStep = 32;      // columns of a tile
constexpr int kEights = 4;     // of half a block
constexpr int64_t kTileSums = kBlock * kTogether;
// Operands of half a block and a span, [32 rows, 128].
constexpr int64_t kRowOfOperands = sizeof(Operand) * kSpan;  // bytes
constexpr int64_t kTileOperands = 16 * kSpan;
constexpr int64_t kHalfOperands = 2 * kTileOperands;

int tokens_together(const Gemm& g) { return g.m < kTogether ? static_cast<int>(g.m) : kTogether; }

int64_t amx_most_tokens(const Gemm& g) { return tokens_in_cache(fp8_token_bytes(g)); }
int64_t amx_scratch_bytes(const Gemm&) { return sizeof(Operand) * 2 * kHalfOperands; }

// 32 E4M3 codes -> BF16: the 128 positive values lie in four registers.
inline __m512i look_up_values(const __m512i (&table)[4], const uint8_t* x, __mmask32 some) {
  const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(some, x));
  const __m512i low = _mm512_permutex2var_epi16(table[0], code, table[1]);
  const __m512i high = _mm512_permutex2var_epi16(table[2], code, table[3]);
  const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
  const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(code, 7), 15);
  return _mm512_or_si512(sign, _mm512_mask_mov_epi16(low, upper, high));
}

// Up to 16 tokens, turned: pairs of columns by tokens.
void amx_prepare(const Gemm& g, int64_t first, uint8_t* prepared) {
  const int64_t columns = g.spans() * kSpan, together = tokens_together(g);
  const uint8_t* x = g.x + first * g.x_stride;
  const int tokens = static_cast<int>(g.m - first < kTogether ? g.m - first : kTogether);
  Operand* to = reinterpret_cast<Operand*>(prepared) + first * columns;
  __m512i table[4];
  for (int i = 0; i < 4; ++i) table[i] = _mm512_loadu_si512(kFp8Tables.value_bf16 + 32 * i);
  const auto all = static_cast<__mmask16>((1u << together) - 1);
  alignas(64) float pairs[kTogether * 16] = {};
  for (int64_t k = 0; k < columns; k += 32) {
    const int64_t left = g.k - k;
    const __mmask32 some = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
    for (int m = 0; m < tokens; ++m) {
      _mm512_store_si512(pairs + 16 * m, look_up_values(table, x + m * g.x_stride + k, some));
    }
    __m512 turned[16];
    transpose(pairs, 16, turned);
    for (int i = 0; i < 16; ++i) {
      _mm512_mask_storeu_ps(to + (k + 2 * i) * together, all, turned[i]);
    }
  }
}

// 32 rows and 16 tokens, or twice as many. Operands are made a span ahead of their use: a tile is
// loaded from the cache, not from stores under way. Products that follow each other would fill the
// core's window of instructions, so they are spread over the rows that are unpacked.
template <bool Twice>
void multiply_rows(const Unpacking& unpacking, int64_t first, int64_t spans, const Operand* x,
                   int64_t x_apart, int together, Operand* operands, float* sums) {
  const auto operands_of = [&](int64_t span) { return operands + span % 2 * kHalfOperands; };
  const auto unpack = [&](int64_t span, int i, const auto& after) __attribute__((always_inline)) {
    const int64_t later = span + kAhead / (kRows * kRowBytes);
    // The rows that come next begin where these end.
    const uint8_t* ahead = later < spans ? unpacking.codes(first + i, later)
                                         : unpacking.codes(first + kEights + i, later - spans);
    unpacking.eight(first + i, span, operands_of(span) + i * kRows * kSpan, kSpan, kStep, ahead,
                    after);
  };
  written(operands);  // not before what is there is read
  zero_tiles();
  for (int i = 0; i < kEights; ++i) unpack(0, i, [](int) {});
  for (int64_t span = 0; span < spans; ++span) {
    const Operand* from = operands_of(span);
    for (int i = 0; i < kEights; ++i, x += kStep * together, from += kStep) {
      written(operands);
      const auto multiply = [&](int r) __attribute__((always_inline)) {
        if (r == 0) _tile_loadd(4, x, 4 * together);
        if (r == (Twice ? 1 : 2)) _tile_loadd(5, from, kRowOfOperands);
        if (r == 2 && Twice) _tile_loadd(7, x + x_apart, 4 * together);
        if (r == 4) _tile_loadd(6, from + kTileOperands, kRowOfOperands);
        if (r == (Twice ? 3 : 5)) _tile_dpbf16ps(0, 5, 4);
        if (r == 5 && Twice) _tile_dpbf16ps(2, 5, 7);
        if (r == (Twice ? 6 : 7)) _tile_dpbf16ps(1, 6, 4);
        if (r == 7 && Twice) _tile_dpbf16ps(3, 6, 7);
      };
      if (span + 1 < spans) {
        unpack(span + 1, i, multiply);
      } else {
        for (int r = 0; r < kRows; ++r) multiply(r);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (!Twice) return;
  _tile_stored(2, sums + kTileSums, 64);
  _tile_stored(3, sums + kTileSums + 256, 64);
}

// [64, 16 tokens] -> [tokens, 64], in place.
void turn(float* sums, int tokens) {
  alignas(64) float tiles[kTileSums];
  std::memcpy(tiles, sums, sizeof tiles);
  for (int row = 0; row < kBlock; row += 16) {
    __m512 turned[16];
    transpose(tiles + row * kTogether, kTogether, turned);
    for (int i = 0; i < tokens; ++i) _mm512_storeu_ps(sums + i * kBlock + row, turned[i]);
  }
}

void amx_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                  const uint8_t* prepared, uint8_t* scratch, uint8_t* to, int64_t apart) {
  const Unpacking unpacking(g);
  Operand* const operands = reinterpret_cast<Operand*>(scratch);
  const int together = tokens_together(g);
  const int64_t columns = g.spans() * kSpan;
  const Operand* x = reinterpret_cast<const Operand*>(prepared) + first * columns;
  const auto sums_of = [&](int i) { return reinterpret_cast<float*>(to + i * apart); };
  // Sums and tokens; operands are tiles 5 and 6.
  const auto bytes = static_cast<uint16_t>(4 * together);
  configure_tiles({bytes, bytes, bytes, bytes, bytes, 64, 64, bytes});
  for (int i = 0; i < blocks.count; ++i) {
    for (int m = 0; m < tokens; m += 2 * kTogether) {
      const auto multiply = m + kTogether < tokens ? multiply_rows<true> : multiply_rows<false>;
      for (int half = 0; half < 2; ++half) {
        multiply(unpacking, (2 * blocks.at[i] + half) * kEights, g.spans(), x + m * columns,
                 kTogether * columns, together, operands,
                 sums_of(i) + m * kBlock + half * kTileSums / 2);
      }
    }
  }
  _tile_release();
  written(to);
  for (int i = 0; i < blocks.count; ++i) {
    for (int m = 0; m < tokens; m += kTogether) {
      turn(sums_of(i) + m * kBlock, tokens - m < kTogether ? tokens - m : kTogether);
    }
  }
}

constexpr Kernels amx_kernels() noexcept {
  Kernels kernels = fp8_kernels();
  kernels.blocks = 4;
  kernels.together = kTogether;
  kernels.tile = 2 * kTogether;
  kernels.most_tokens = amx_most_tokens;
  kernels.scratch_bytes = amx_scratch_bytes;
  kernels.prepare = amx_prepare;
  kernels.multiply = amx_multiply;
  return kernels;
}

}  // namespace

const Kernels kBf16Amx = amx_kernels();

}  // namespace quant
