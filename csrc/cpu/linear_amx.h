// BF16 with AMX: tiles of 16 rows x 32 columns, as they lie, times 32 columns x 16 tokens.
//
// Tokens are laid out in pairs of columns, [k / 32, 16 pairs, 16 tokens, 2], zeros behind the last
// of either. An item's 64 rows are four tiles of sums, so that a single token, too, has four sums
// under way. Every sum takes its pairs of columns in order. AMX takes subnormal numbers for zeros.
#ifndef QUANT_LINEAR_AMX_H_
#define QUANT_LINEAR_AMX_H_

#include "kernels.h"
#include "simd.h"
#include "tiles.h"
#include "transpose.h"

namespace quant {
namespace QUANT_ISA {
namespace {

constexpr int64_t TILE = 16 * 32;  // numbers
constexpr int64_t LINES = 4;       // of 32 columns, of a row, that are fetched at once
static_assert(LINEAR_ROWS == 64 && LINEAR_TOKENS == 16, "four tiles and one");

inline void prepare_tiles(const QuantCpuLinear& call, int64_t first, Bf16* to) {
  const Bf16* x = static_cast<const Bf16*>(call.x) + first * call.x_row;
  memset(to, 0, sizeof(Bf16) * linear_columns(call.k) * LINEAR_TOKENS);
  for (int64_t t = 0; t < LINEAR_TOKENS && first + t < call.m; ++t, x += call.x_row) {
    for (int64_t k = 0; k < call.k; ++k) to[k / 2 * 32 + 2 * t + k % 2] = x[k];
  }
}

// Tiles of rows are `apart` numbers apart, a tile's rows row_bytes.
struct TileRows {
  const Bf16* at;
  int64_t row_bytes, apart;
};

// Fewer rows, or columns that are no whole tiles, are copied; zeros stand for what there is not.
inline TileRows rows_of(const QuantCpuLinear& call, int64_t row, int64_t count, Bf16* scratch) {
  const Bf16* w = static_cast<const Bf16*>(call.weight) + row * call.weight_row;
  const int64_t columns = linear_columns(call.k);
  if (count == LINEAR_ROWS && columns == call.k) {
    return {w, 2 * call.weight_row, 16 * call.weight_row};
  }
  memset(scratch, 0, sizeof(Bf16) * columns * LINEAR_ROWS);
  for (int64_t r = 0; r < count; ++r, w += call.weight_row) {
    memcpy(scratch + r * columns, w, sizeof(Bf16) * call.k);
  }
  written(scratch);
  return {scratch, 2 * columns, 16 * columns};
}

// At column k of 64 rows: LINES lines each of the next rows in turn, so that memory is read in
// runs. A line of every row at a time, where rows are 8 KiB apart, comes at 0.6 of the speed
// (measured on a Xeon with AMX). Behind the last columns are those of the next item, or nothing
// that is read.
inline void fetch_ahead(const TileRows& w, int64_t k, int64_t columns) {
  constexpr int64_t ROWS_AT_ONCE = LINEAR_ROWS / LINES;
  const int64_t step = k / 32, column = (step / LINES + 1) * LINES * 32;
  const char* line = reinterpret_cast<const char*>(w.at);
  line += column < columns ? 2 * column : LINEAR_ROWS * w.row_bytes;
  line += step % LINES * ROWS_AT_ONCE * w.row_bytes;
  for (int64_t r = 0; r < ROWS_AT_ONCE; ++r, line += w.row_bytes) {
    for (int64_t i = 0; i < LINES; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
  }
}

// Sums of 64 rows and 16 tokens -> sums [4, 16 rows, 16 tokens]. first: nobody has read the rows.
inline void multiply_tiles(const TileRows& w, const Bf16* x, int64_t columns, bool first,
                           float* sums) {
  zero_tiles();
  for (int64_t k = 0; k < columns; k += 32, x += TILE) {
    if (first) fetch_ahead(w, k, columns);
    _tile_loadd(6, x, 64);
    _tile_loadd(4, w.at + k, w.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w.at + k + w.apart, w.row_bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, w.at + k + 2 * w.apart, w.row_bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, w.at + k + 3 * w.apart, w.row_bytes);
    _tile_dpbf16ps(3, 5, 6);
  }
  store_tiles(sums, 256, 64);
}

inline void multiply_with_amx(const QuantCpuLinear& call, const LinearPart& part, const Bf16* x,
                              Bf16* scratch) {
  configure_tiles();
  const int64_t count = call.n - part.row < LINEAR_ROWS ? call.n - part.row : LINEAR_ROWS;
  const TileRows w = rows_of(call, part.row, count, scratch);
  Bf16* out = static_cast<Bf16*>(call.out) + part.token * call.out_row + part.row;
  for (int64_t t = 0; t < part.tokens; t += LINEAR_TOKENS) {
    alignas(64) float sums[4 * 256];
    multiply_tiles(w, x, linear_columns(call.k), t == 0, sums);
    x += linear_bytes(call.k) / 2;
    for (int64_t r = 0; r < count; r += 16) {
      __m512 turned[16];
      transpose(sums + 16 * r, 16, turned);
      for (int64_t i = 0; i < 16 && t + i < part.tokens; ++i) {
        store(out + (t + i) * call.out_row + r, (F32)turned[i], count - r);
      }
    }
  }
  _tile_release();
}

}  // namespace
}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_LINEAR_AMX_H_
