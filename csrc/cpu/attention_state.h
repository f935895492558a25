// What attention over the INT4 cache and over a dense one have in common: the rows of a tile, the
// keys that each of them sees, and sums of exponentials, which join as
//
//   M = ceil(max S_t),   p_t = 2^(S_t - M),   O = (sum p_t v_t) / sum p_t
//
// M is an integer, so earlier sums are rescaled by powers of two. The FP32 sums have one order:
// pages ascending within a span of SPAN_PAGES pages, then spans ascending. Which rows share a tile,
// which thread takes which span, and whether it is prefill or decode therefore changes no bit.
#ifndef QUANT_ATTENTION_STATE_H_
#define QUANT_ATTENTION_STATE_H_

#include "kernels.h"
#include "simd.h"

namespace quant {
namespace QUANT_ISA {

constexpr int SUM_LANES = 16;  // that l and sum p o of a row are kept in, at most
// Below every score, but finite: the difference of two of them is 0.
constexpr float LOWEST = -1e30f;
static_assert(LANES <= SUM_LANES && PAGE % LANES == 0, "whole vectors");

// Sums of some rows over some pages; top is LOWEST where a row has seen no key.
struct State {
  float *out, *total, *offsets, *top;  // [rows, dim], 2 [rows, SUM_LANES], [rows]
  int64_t rows, dim;

  State(float* memory, int64_t rows, int64_t dim) : rows(rows), dim(dim) {
    out = memory;
    total = out + rows * dim;
    offsets = total + rows * SUM_LANES;
    top = offsets + rows * SUM_LANES;
  }
  static constexpr int64_t floats(int64_t rows, int64_t dim) {
    return rows * (dim + 2 * SUM_LANES + 1);
  }
  void clear() {
    memset(out, 0, sizeof(float) * rows * (dim + 2 * SUM_LANES));
    for (int64_t r = 0; r < rows; ++r) top[r] = LOWEST;
  }
};

// total += part, row by row.
inline void merge(State& total, const State& part) {
  for (int64_t r = 0; r < total.rows; ++r) {
    const float before = total.top[r], other = part.top[r];
    if (other == LOWEST) continue;
    const float now = before > other ? before : other;
    const float fade = power_of_two(before - now), share = power_of_two(other - now);
    const auto add = [&](float* x, const float* y, int64_t n) {
      for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i) * fade + load(y + i) * share);
    };
    add(total.out + r * total.dim, part.out + r * total.dim, total.dim);
    add(total.total + r * SUM_LANES, part.total + r * SUM_LANES, LANES);
    add(total.offsets + r * SUM_LANES, part.offsets + r * SUM_LANES, LANES);
    total.top[r] = now;
  }
}

// The rows of a tile, and the sequence they belong to.
struct Rows {
  const QuantCpuAttention& call;
  const Tile& tile;
  int64_t ratio, first_token, length, kv_len;

  Rows(const QuantCpuAttention& call, const Tile& tile) : call(call), tile(tile) {
    const int32_t* bounds = call.cu_seqlens;
    ratio = call.heads / call.kv_heads;
    first_token = bounds == nullptr ? tile.sequence : bounds[tile.sequence];
    length = bounds == nullptr ? 1 : bounds[tile.sequence + 1] - first_token;
    kv_len = call.kv_lens[tile.sequence];
  }

  int64_t token(int64_t r) const { return first_token + (tile.first + r) / ratio; }
  int64_t head(int64_t r) const { return tile.kv_head * ratio + (tile.first + r) % ratio; }
  // The keys that a row sees: [first_key, end_key), both ascending with r.
  int64_t end_key(int64_t r) const { return kv_len - length + (tile.first + r) / ratio + 1; }
  int64_t first_key(int64_t r) const {
    const int64_t end = end_key(r);
    return call.window > 0 && end > call.window ? end - call.window : 0;
  }
};

// Where a page's rows of keys are in the cache, and its values'.
struct PageRows {
  int64_t keys, values;

  PageRows(const Rows& rows, int64_t index) {
    const QuantCpuAttention& call = rows.call;
    const int64_t number = call.block_table[rows.tile.sequence * call.table_row + index];
    keys = (number * call.kv_heads + rows.tile.kv_head) * PAGE;
    values = keys + call.pages * call.kv_heads * PAGE;
  }
};

// step(index, begin, end) for every page of the span that rows of the tile see, those being [begin,
// end).
template <class Step>
void for_pages(const Rows& rows, int64_t span, const Step& step) {
  const int64_t count = rows.tile.count, last_key = rows.end_key(count - 1);
  for (int64_t i = span * SPAN_PAGES; i < (span + 1) * SPAN_PAGES && i * PAGE < last_key; ++i) {
    int64_t begin = 0, end = count;
    while (begin < end && rows.end_key(begin) <= i * PAGE) ++begin;
    while (end > begin && rows.first_key(end - 1) >= (i + 1) * PAGE) --end;
    if (begin < end) step(i, begin, end);
  }
}

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_ATTENTION_STATE_H_
