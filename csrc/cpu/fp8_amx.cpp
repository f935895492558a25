// FP8 with AMX: tiles of 16 outputs x 32 columns times 32 columns x 16 tokens, BF16, sums in FP32.
//
// The unpacked rows of the weight are tiles as they lie; tokens are laid out in pairs of columns,
// [tokens / 16, K / 2, tokens of the 16, 2]. A block's 64 outputs are four tiles of sums, so that a
// single token, too, has four sums under way. Every sum takes its pairs of columns in order.
#define QUANT_BF16
#include "fp8_avx512.cpp"
#include "transpose.h"

namespace quant {
namespace {

constexpr int kTogether = 16;  // tokens
constexpr int kChunk = 2;      // spans that are unpacked together: 32 KiB of operands
constexpr int64_t kTileSums = kBlock * kTogether;

int64_t amx_scratch_bytes(const Gemm& g) {
  const int64_t tokens = (g.m + kTogether - 1) / kTogether;
  return sizeof(Operand) * kBlock * kChunk * kSpan + sizeof(float) * kTileSums * tokens;
}

void amx_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  const int64_t columns = g.spans() * kSpan, first = token / kTogether * kTogether;
  const int64_t together = g.m - first < kTogether ? g.m - first : kTogether;
  const uint8_t* x = g.x + token * g.x_stride;
  Operand* to = reinterpret_cast<Operand*>(prepared) + first * columns + (token - first) * 2;
  for (int64_t k = 0; k < columns; k += 2) {
    to[k * together] = k < g.k ? kFp8Tables.value_bf16[x[k]] : Operand();
    to[k * together + 1] = k < g.k ? kFp8Tables.value_bf16[x[k + 1]] : Operand();
  }
}

// sums [64, tokens of the 16] += operands [64, columns] x, where `begin` from nothing.
void amx_tile(const Operand* operands, int64_t columns, const Operand* x, int together, bool begin,
              float* sums) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
  } config;
  for (int tile = 0; tile < 5; ++tile) config.bytes[tile] = static_cast<uint16_t>(4 * together);
  config.bytes[5] = config.bytes[6] = 64;
  _tile_loadconfig(&config);
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 16 * kTogether, 64);
    _tile_loadd(2, sums + 32 * kTogether, 64);
    _tile_loadd(3, sums + 48 * kTogether, 64);
  }
  const int64_t stride = columns * static_cast<int64_t>(sizeof(Operand));
  for (int64_t k = 0; k < columns; k += 32) {
    const Operand* w = operands + k;
    _tile_loadd(4, x + k * together, 4 * together);
    _tile_loadd(5, w, stride);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, w + 16 * columns, stride);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(5, w + 32 * columns, stride);
    _tile_dpbf16ps(2, 5, 4);
    _tile_loadd(6, w + 48 * columns, stride);
    _tile_dpbf16ps(3, 6, 4);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 16 * kTogether, 64);
  _tile_stored(2, sums + 32 * kTogether, 64);
  _tile_stored(3, sums + 48 * kTogether, 64);
}

// [16, 16] of a [64, 16] -> [16, 64]'s rows, as many as there are.
void turn(const float* from, int rows, float* to) {
  __m512 row[16];
  transpose(from, kTogether, row);
  for (int i = 0; i < rows; ++i) _mm512_storeu_ps(to + i * kBlock, row[i]);
}

void amx_multiply(const Gemm& g, int64_t block, int64_t first, int tokens, const uint8_t* prepared,
                  uint8_t* scratch, void* to, int64_t) {
  constexpr int kParts = kBlock / kRows;
  Operand* operands = reinterpret_cast<Operand*>(scratch);
  float* tiles = reinterpret_cast<float*>(operands + kBlock * kChunk * kSpan);
  const int64_t padded = g.spans() * kSpan;
  const Operand* x = reinterpret_cast<const Operand*>(prepared) + first * padded;
  for (int64_t span = 0; span < g.spans(); span += kChunk) {
    const int64_t spans = g.spans() - span < kChunk ? g.spans() - span : kChunk;
    for (int part = 0; part < kParts; ++part) {
      unpack_rows(g, block * kParts + part, span, spans, operands + part * kRows * spans * kSpan);
    }
    for (int m = 0; m < tokens; m += kTogether) {
      const int together = tokens - m < kTogether ? tokens - m : kTogether;
      amx_tile(operands, spans * kSpan, x + m * padded + span * kSpan * together, together,
               span == 0, tiles + m / kTogether * kTileSums);
    }
  }
  _tile_release();
  for (int m = 0; m < tokens; m += kTogether) {
    const int together = tokens - m < kTogether ? tokens - m : kTogether;
    for (int row = 0; row < kBlock; row += 16) {
      turn(tiles + m / kTogether * kTileSums + row * kTogether, together,
           static_cast<float*>(to) + m * kBlock + row);
    }
  }
}

constexpr Kernels amx_kernels() {
  Kernels kernels = fp8_kernels();
  kernels.scratch_bytes = amx_scratch_bytes;
  kernels.prepare = amx_prepare;
  kernels.multiply = amx_multiply;
  return kernels;
}

}  // namespace

const Kernels kBf16Amx = amx_kernels();

}  // namespace quant
