// FP8 with AMX: tiles of 16 outputs x 32 columns times 32 columns x 16 tokens, BF16, sums in FP32.
//
// Tokens are laid out in pairs of columns, [tokens / 16, K / 2, 16, 2], or as many as there are.
// Every sum takes its pairs of columns in order, however many tokens there are: products of one
// tile of sums follow each other every 16 clocks, as those of four do.
//
//   up to 16 tokens  32 rows at a time: their sums stay in two tiles over all of K
//   more             two spans of 64 rows become operands, 32 KiB of the L1 cache, and all tokens
//                    pass
//
// On a Xeon at 3.8 GHz a row's 64 bytes of codes take 7 clocks (four lookups on two ports each,
// three shifts on one of them), their products 4, and 3 more go to loading tiles. One after the
// other that is 14; with the products between the rows it is 10.5, and from memory 64 bytes take 9
// to 10 where both cores read.
#define QUANT_BF16
#define QUANT_AMX
#include "fp8_avx512.cpp"
#include "tiles.h"
#include "transpose.h"

namespace quant {
namespace {

constexpr int kTogether = 16;  // tokens
constexpr int kSpansTogether = 2;
constexpr int kStep = 32;   // columns of a tile
constexpr int kEights = 4;  // of half a block
constexpr int64_t kTileSums = kBlock * kTogether;
// Operands of a span, [64 rows, 128], and of parts of it.
constexpr int64_t kSpanOperands = kBlock * kSpan;
constexpr int64_t kHalfOperands = kSpanOperands / 2;
constexpr int64_t kTileOperands = kSpanOperands / 4;
constexpr int64_t kRowOfOperands = sizeof(Operand) * kSpan;  // bytes

int tokens_together(const Gemm& g) { return g.m < kTogether ? static_cast<int>(g.m) : kTogether; }

// 1.1 MiB of BF16 tokens where K is 4096, of an L2 cache of two.
int64_t amx_most_tokens(const Gemm&) { return 144; }
int64_t amx_scratch_bytes(const Gemm&) { return sizeof(Operand) * kSpanOperands * kSpansTogether; }

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

// 32 rows and up to 16 tokens. Operands are made a span ahead of their use, and a step's products
// come between the rows that are unpacked: a core then does both at once, where one after the other
// fills its window of instructions.
void multiply_few(const Unpacking& unpacking, int64_t first, int64_t spans, const Operand* x,
                  int together, Operand* operands, float* sums) {
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
  _tile_zero(0);
  _tile_zero(1);
  for (int i = 0; i < kEights; ++i) unpack(0, i, [](int) {});
  for (int64_t span = 0; span < spans; ++span) {
    const Operand* from = operands_of(span);
    for (int i = 0; i < kEights; ++i, x += kStep * together, from += kStep) {
      written(operands);
      const auto multiply = [&](int r) __attribute__((always_inline)) {
        if (r == 0) _tile_loadd(4, x, 4 * together);
        if (r == 2) _tile_loadd(5, from, kRowOfOperands);
        if (r == 4) _tile_loadd(6, from + kTileOperands, kRowOfOperands);
        if (r == 5) _tile_dpbf16ps(0, 5, 4);
        if (r == 7) _tile_dpbf16ps(1, 6, 4);
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
}

inline void multiply_step(const Operand* operands, const Operand* x, int together) {
  _tile_loadd(4, x, 4 * together);
  _tile_loadd(5, operands, kRowOfOperands);
  _tile_dpbf16ps(0, 5, 4);
  _tile_loadd(6, operands + kTileOperands, kRowOfOperands);
  _tile_dpbf16ps(1, 6, 4);
  _tile_loadd(7, operands + 2 * kTileOperands, kRowOfOperands);
  _tile_dpbf16ps(2, 7, 4);
  _tile_loadd(5, operands + 3 * kTileOperands, kRowOfOperands);
  _tile_dpbf16ps(3, 5, 4);
}

// sums [64, 16 tokens] += operands x for all tokens, from nothing where `begin`.
void multiply_spans(int tokens, int together, const Operand* operands, int64_t spans,
                    const Operand* x, int64_t x_apart, bool begin, float* sums) {
  for (int m = 0; m < tokens; m += kTogether, x += x_apart, sums += kTileSums) {
    if (begin) zero_tiles();
    if (!begin) load_tiles(sums, 256, 64);
    for (int64_t step = 0; step < 4 * spans; ++step) {
      multiply_step(operands + step / 4 * kSpanOperands + step % 4 * kStep,
                    x + step * kStep * together, together);
    }
    store_tiles(sums, 256, 64);
  }
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
  // Sums, tokens and operands.
  const auto bytes = static_cast<uint16_t>(4 * together);
  configure_tiles({bytes, bytes, bytes, bytes, bytes, 64, 64, 64});
  for (int i = 0; i < blocks.count && tokens <= kTogether; ++i) {
    for (int half = 0; half < 2; ++half) {
      multiply_few(unpacking, (2 * blocks.at[i] + half) * kEights, g.spans(), x, together, operands,
                   sums_of(i) + half * kTileSums / 2);
    }
  }
  for (int64_t span = 0; span < g.spans() && tokens > kTogether; span += kSpansTogether) {
    const int64_t spans = g.spans() - span < kSpansTogether ? g.spans() - span : kSpansTogether;
    for (int i = 0; i < blocks.count; ++i) {
      written(operands);
      for (int64_t j = 0; j < spans; ++j) {
        for (int eight = 0; eight < 2 * kEights; ++eight) {
          const int64_t at = 2 * blocks.at[i] * kEights + eight;
          unpacking.eight(at, span + j, operands + j * kSpanOperands + eight * kRows * kSpan, kSpan,
                          kStep, unpacking.codes(at, span + j) + kAhead, [](int) {});
        }
      }
      written(operands);
      multiply_spans(tokens, together, operands, spans, x + span * kSpan * together,
                     kTogether * columns, span == 0, sums_of(i));
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
  kernels.most_tokens = amx_most_tokens;
  kernels.scratch_bytes = amx_scratch_bytes;
  kernels.prepare = amx_prepare;
  kernels.multiply = amx_multiply;
  return kernels;
}

}  // namespace

const Kernels kBf16Amx = amx_kernels();

}  // namespace quant
