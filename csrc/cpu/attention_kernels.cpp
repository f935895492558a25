// Causal attention over the INT4 cache (reference_attention.py), page by page. For a row, that is a
// query token and head, over the keys t that it sees:
//
//   S_t = (s_t (Q . q_t) + o_t sum(Q)) unit,   unit = a sm_scale log2(e)
//   M   = ceil(max S_t),   p_t = 2^(S_t - M),   l = sum p_t
//   P_t = E4M3(2^k p_t v_t),   O = (sum over pages of 2^-k sum_t P_t q_t  +  sum_t p_t o_t) / l
//
// Both products are exact: Q and P are E4M3 numbers, so integers times 2^-9, of at most 18 and, as
// k is chosen for every row and page so that the largest |P| is in [31, 62), 16 bits: three and two
// digits in base 256 (`int8_products.h`). P is never near 448, and is subnormal below 2^-11 of the
// page's largest. What the row does not see takes no part in k, nor in anything else.
//
// The FP32 sums have one order: pages ascending within a span of SPAN_PAGES pages, then spans
// ascending. M is an integer, so earlier sums are rescaled by powers of two. Which rows share a
// tile, which thread takes which span, and whether it is prefill or decode therefore changes no
// bit.
#include "int8_products.h"
#include "kv_pages.h"

namespace quant {
namespace QUANT_ISA {
namespace {

constexpr int Q_LIMBS = 3, P_LIMBS = 2;
constexpr int BLOCK_ROWS = 30;  // rows whose scores and sums stay in the L1 cache
constexpr int SUM_LANES = 16;   // that l and sum p o of a row are kept in, at most
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

struct Queries {
  // Rows behind the last are read by tiles, whatever is there.
  alignas(64) int8_t digits[TILE_ROWS + 6][Q_LIMBS][MAX_HEAD_DIM];
  int32_t start[TILE_ROWS];                          // -8 sum(Q), since codes are stored plus 8
  float sum[TILE_ROWS];                              // of Q, times 2^9
  float unit[TILE_ROWS];                             // times 2^-9
  int64_t first_key[TILE_ROWS], end_key[TILE_ROWS];  // the keys that a row sees
};

struct PageOperands {
  alignas(64) uint8_t keys[MAX_HEAD_DIM * PAGE];  // 64 rows of channels, whatever D is
  alignas(64) uint8_t values[MAX_HEAD_DIM * PAGE];
  alignas(64) float k_scale[PAGE], k_offset[PAGE], v_scale[PAGE], v_offset[PAGE];
};

struct BlockMemory {
  alignas(64) int32_t sums[BLOCK_ROWS * PAGE];  // scores before their scales
  alignas(64) int8_t digits[BLOCK_ROWS + 8][P_LIMBS][PAGE];
  int32_t start[BLOCK_ROWS];
  float fade[BLOCK_ROWS], back[BLOCK_ROWS];
};

// The queries of a tile and the sequence they belong to.
struct TileCall {
  const QuantCpuAttention& call;
  const Tile& tile;
  int64_t ratio, first_token, length, kv_len;
  Queries q;
  Products products;

  TileCall(const QuantCpuAttention& call, const Tile& tile) : call(call), tile(tile) {
    const int32_t* bounds = call.cu_seqlens;
    ratio = call.heads / call.kv_heads;
    first_token = bounds == nullptr ? tile.sequence : bounds[tile.sequence];
    length = bounds == nullptr ? 1 : bounds[tile.sequence + 1] - first_token;
    kv_len = call.kv_lens[tile.sequence];
  }

  int64_t token(int64_t r) const { return (tile.first + r) / ratio; }
  int64_t head(int64_t r) const { return tile.kv_head * ratio + (tile.first + r) % ratio; }

  void read_queries() {
    for (int64_t r = 0; r < tile.count; ++r) {
      const int64_t at = first_token + token(r);
      const uint8_t* codes = call.q_codes + at * call.q_token + head(r) * call.q_head;
      I32 sums = {}, nan = {};
      for (int64_t i = 0; i < call.head_dim; i += LANES) {
        const I32 code = widen(read<U8>(codes + i));
        I32 x = e4m3_integers(code);
        sums += x;
        nan |= (code & 127) == 127;
        for (int l = 0; l < Q_LIMBS; ++l) {
          store_low_bytes(q.digits[r][l] + i, x);
          x = (x + 128) >> 8;
        }
      }
      for (auto& limb : q.digits[r]) {
        memset(limb + call.head_dim, 0, (call.head_dim + 63) / 64 * 64 - call.head_dim);
      }
      const int32_t total = sum(sums);
      q.start[r] = -8 * total;
      q.sum[r] = static_cast<float>(total);
      const float a = call.q_scale[at * call.q_scale_token + head(r)];
      q.unit[r] = a * static_cast<float>(call.scale) * 0x1p-9f;
      if (sum(nan) != 0) q.unit[r] = __builtin_nanf("");
      const int64_t end = kv_len - length + token(r) + 1;
      const bool windowed = call.window > 0 && end > call.window;
      q.end_key[r] = end;
      q.first_key[r] = windowed ? end - call.window : 0;
    }
  }
};

// PAGE integers of 16 bits -> p: their digits in base 256, the low ones first.
#if defined(__AVX512BW__)
void store_two_digits(const I32* x, int8_t* p) {
  const __m512i a = _mm512_packs_epi32((__m512i)x[0], (__m512i)x[1]);
  const __m512i b = _mm512_packs_epi32((__m512i)x[2], (__m512i)x[3]);
  const __m512i byte = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  const __m512i low = _mm512_packus_epi16(a & byte, b & byte);
  const __m512i high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(a, half), 8),
                                          _mm512_srai_epi16(_mm512_add_epi16(b, half), 8));
  // Packing works in quarters of a register: four lanes of x[0], of x[1], ...
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, low));
  _mm512_storeu_si512(p + PAGE, _mm512_permutexvar_epi32(order, high));
}
#else
void store_two_digits(const I32* x, int8_t* p) {
  for (int j = 0; j < PAGE; j += LANES) {
    store_low_bytes(p + j, x[j / LANES]);
    store_low_bytes(p + PAGE + j, (x[j / LANES] + 128) >> 8);
  }
}
#endif

// Scores of one row and page -> its p, and the digits of P. seen: keys [lo, hi) of the page.
void softmax_row(const PageOperands& page, const Queries& q, int64_t r, int lo, int hi,
                 State& state, BlockMemory& block, int64_t in_block) {
  constexpr int N = PAGE / LANES;
  const int32_t* sums = block.sums + in_block * PAGE;
  const bool whole = lo == 0 && hi == PAGE;
  const F32 nothing = splat(-__builtin_inff());
  F32 x[N], highest = nothing;
  I32 seen[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    const F32 offset = q.sum[r] * load(page.k_offset + j * LANES);
    x[j] = fma(to_float(read<I32>(sums + j * LANES)), load(page.k_scale + j * LANES), offset);
    if (!whole) {
      const I32 key = iota() + j * LANES;
      seen[j] = (key >= lo) & (key < hi);
      x[j] = select(seen[j], x[j], nothing);
    }
    highest = max(highest, x[j]);
  }
  const float top = __builtin_ceilf(largest(highest) * q.unit[r]);
  const float before = state.top[r], now = top <= before ? before : top;
  const float fade = power_of_two(before - now);
  state.top[r] = now;

  F32 total = {}, offsets = {};
  I32 magnitudes = {};
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    F32 p = exp2_nonpositive(fma(x[j], splat(q.unit[r]), splat(-now)));
    F32 scale = load(page.v_scale + j * LANES), offset = load(page.v_offset + j * LANES);
    if (!whole) {
      p = select(seen[j], p, F32{});
      scale = select(seen[j], scale, F32{});
      offset = select(seen[j], offset, F32{});
    }
    total += p;
    offsets = fma(p, offset, offsets);
    x[j] = p * scale;
    magnitudes = max(magnitudes, bits_as<I32>(abs(x[j])));
  }
  float* row_total = state.total + r * SUM_LANES;
  float* row_offsets = state.offsets + r * SUM_LANES;
  store(row_total, fma(load(row_total), splat(fade), total));
  store(row_offsets, fma(load(row_offsets), splat(fade), offsets));

  // 2^e with largest in [31, 62) 2^(e - 141), that is P times 2^9 in [31, 62) 2^9.
  const int32_t largest_bits = largest(magnitudes);
  const bool finite = largest_bits < 0x7F800000;
  int32_t e = finite ? (largest_bits + 0x80000) >> 23 : 16;
  if (e < 16) e = 16;
  const float up = bits_as<float>((268 - e) << 23);
  I32 row_sum = {}, integers[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    integers[j] = to_int(round_e4m3_integers(finite ? x[j] * up : F32{}));
    row_sum += integers[j];
  }
  store_two_digits(integers, block.digits[in_block][0]);
  block.start[in_block] = -8 * sum(row_sum);
  block.fade[in_block] = fade;
  block.back[in_block] = finite ? bits_as<float>((e - 14) << 23) : __builtin_nanf("");
}

// Where a page's rows of keys are in the cache, and its values'.
struct PageRows {
  int64_t keys, values;

  PageRows(const TileCall& t, int64_t index) {
    const QuantCpuAttention& call = t.call;
    const int64_t number = call.block_table[t.tile.sequence * call.table_row + index];
    keys = (number * call.kv_heads + t.tile.kv_head) * PAGE;
    values = keys + call.pages * call.kv_heads * PAGE;
  }
};

// The page after this one, fetched in parts between the steps of this one: pages lie anywhere, so
// no hardware foresees them, and what is fetched at once beyond a core's fill buffers holds it up.
struct NextPage {
  const char* codes[2] = {};  // of keys and values; null where there is no next page
  int64_t bytes, done = 0;

  NextPage(const TileCall& t, int64_t index, bool exists) : bytes(PAGE * t.call.head_dim / 2) {
    if (!exists) return;
    const PageRows rows(t, index);
    const int64_t first[2] = {rows.keys, rows.values};
    for (int i = 0; i < 2; ++i) {
      codes[i] = reinterpret_cast<const char*>(t.call.kv_codes) + first[i] * (bytes / PAGE);
      const char* scales = reinterpret_cast<const char*>(t.call.kv_scales + first[i] * 2);
      for (int64_t at = 0; at < 4 * PAGE; at += 64) __builtin_prefetch(scales + at);
    }
  }

  // A quarter of it. Inlined: GCC takes a function that only fetches for one without effect.
  __attribute__((always_inline)) inline void fetch_quarter() {
    if (codes[0] == nullptr || done == bytes) return;
    for (int64_t end = done + bytes / 4; done < end; done += 64) {
      __builtin_prefetch(codes[0] + done);
      __builtin_prefetch(codes[1] + done);
    }
  }
};

// Rows [begin, end) of the tile, some of which see keys of the page that starts at first_key.
void attend_block(TileCall& t, const PageOperands& page, int64_t first_key, int64_t begin,
                  int64_t end, State& state, BlockMemory& block, NextPage& next) {
  const int64_t rows = end - begin, dim = state.dim;
  const Digits q = {t.q.digits[begin][0], MAX_HEAD_DIM};
  next.fetch_quarter();
  t.products.run<Q_LIMBS>(q, rows, dim, page.keys, PAGE, t.q.start + begin,
                          [&](int64_t r, int64_t n, I32 sum) {
                            memcpy(block.sums + r * PAGE + n, &sum, sizeof(sum));
                            if (n + LANES < PAGE) return;
                            const int64_t lo = t.q.first_key[begin + r] - first_key;
                            const int64_t hi = t.q.end_key[begin + r] - first_key;
                            softmax_row(page, t.q, begin + r, lo > 0 ? (int)lo : 0,
                                        hi < PAGE ? (int)hi : PAGE, state, block, r);
                          });
  next.fetch_quarter();
  const Digits p = {block.digits[0][0], PAGE};
  t.products.run<P_LIMBS>(
      p, rows, PAGE, page.values, dim, block.start, [&](int64_t r, int64_t n, I32 sum) {
        float* out = state.out + (begin + r) * dim + n;
        store(out, fma(to_float(sum), splat(block.back[r]), load(out) * block.fade[r]));
      });
}

void read_page(const TileCall& t, int64_t index, PageOperands& page, NextPage& next) {
  const QuantCpuAttention& call = t.call;
  const PageRows rows(t, index);
  const int64_t half = call.head_dim / 2, stored = t.kv_len - index * PAGE;
  unpack_keys(call.kv_codes + rows.keys * half, call.head_dim, page.keys);
  next.fetch_quarter();
  unpack_values(call.kv_codes + rows.values * half, call.head_dim, page.values);
  unpack_scales(call.kv_scales + rows.keys * 2, stored, page.k_scale, page.k_offset);
  unpack_scales(call.kv_scales + rows.values * 2, stored, page.v_scale, page.v_offset);
  next.fetch_quarter();
}

// All pages of one span that rows of the tile see.
void attend_pages(TileCall& t, int64_t span, State& state) {
  PageOperands page;
  BlockMemory block;
  state.clear();
  const int64_t rows = t.tile.count, last_key = t.q.end_key[rows - 1];
  for (int64_t i = span * SPAN_PAGES; i < (span + 1) * SPAN_PAGES && i * PAGE < last_key; ++i) {
    const int64_t first_key = i * PAGE;
    // Both ends of what rows see ascend, so those that see something here are neighbours.
    int64_t begin = 0, end = rows;
    while (begin < end && t.q.end_key[begin] <= first_key) ++begin;
    while (end > begin && t.q.first_key[end - 1] >= first_key + PAGE) --end;
    if (begin == end) continue;
    NextPage next(t, i + 1, first_key + PAGE < last_key);
    read_page(t, i, page, next);
    for (int64_t r = begin; r < end; r += BLOCK_ROWS) {
      const int64_t stop = r + BLOCK_ROWS < end ? r + BLOCK_ROWS : end;
      attend_block(t, page, first_key, r, stop, state, block, next);
    }
  }
}

// total += part, row by row.
void merge(State& total, const State& part) {
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

template <class T>
void finish_as(const TileCall& t, const State& state) {
  for (int64_t r = 0; r < state.rows; ++r) {
    T* out = static_cast<T*>(t.call.out) + (t.first_token + t.token(r)) * t.call.out_token +
             t.head(r) * t.call.out_head;
    const float total = sum(load(state.total + r * SUM_LANES));
    const float offset = sum(load(state.offsets + r * SUM_LANES));
    alignas(64) float ordered[MAX_HEAD_DIM];
    order_channels(state.out + r * state.dim, state.dim, ordered);
    for (int64_t d = 0; d < state.dim; d += LANES) {
      store(out + d, (load(ordered + d) + offset) / (total == 0.0f ? 1.0f : total));
    }
  }
}

void finish(const TileCall& t, const State& state) {
  switch (t.call.out_type) {
    case QUANT_CPU_BF16:
      return finish_as<Bf16>(t, state);
    case QUANT_CPU_FP16:
      return finish_as<Fp16>(t, state);
    default:
      return finish_as<float>(t, state);
  }
}

}  // namespace

int64_t state_floats(int64_t rows, int64_t head_dim) { return State::floats(rows, head_dim); }

void attend_span(const QuantCpuAttention& call, const Tile& tile, int64_t span, float* memory) {
  const DefaultRounding guard;
  TileCall t(call, tile);
  t.read_queries();
  State state(memory, tile.count, call.head_dim);
  attend_pages(t, span, state);
}

void combine(const QuantCpuAttention& call, const Tile& tile, float* states, int64_t spans,
             int64_t stride) {
  const DefaultRounding guard;
  alignas(64) float memory[State::floats(TILE_ROWS, MAX_HEAD_DIM)];
  State total(memory, tile.count, call.head_dim);
  total.clear();
  for (int64_t i = 0; i < spans; ++i) {
    merge(total, State(states + i * stride, tile.count, call.head_dim));
  }
  finish(TileCall(call, tile), total);
}

void attend(const QuantCpuAttention& call, const Tile& tile, int64_t first_span, int64_t spans) {
  const DefaultRounding guard;
  alignas(64) float memory[2][State::floats(TILE_ROWS, MAX_HEAD_DIM)];
  TileCall t(call, tile);
  t.read_queries();
  State total(memory[0], tile.count, call.head_dim), part(memory[1], tile.count, call.head_dim);
  total.clear();
  for (int64_t i = 0; i < spans; ++i) {
    attend_pages(t, first_span + i, part);
    merge(total, part);
  }
  finish(t, total);
}

}  // namespace QUANT_ISA
}  // namespace quant
