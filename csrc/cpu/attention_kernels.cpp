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
// The functions at the end run a tile over a cache of either kind (`dense_attention.h`).
#include "dense_attention.h"
#include "int8_products.h"
#include "kv_pages.h"

namespace quant {
namespace QUANT_ISA {
namespace {

constexpr int Q_LIMBS = 3, P_LIMBS = 2;
constexpr int BLOCK_ROWS = 30;  // rows whose scores and sums stay in the L1 cache

struct Queries {
  // Rows behind the last are read by tiles, whatever is there.
  alignas(64) int8_t digits[TILE_ROWS + 6][Q_LIMBS][MAX_HEAD_DIM];
  int32_t start[TILE_ROWS];  // -8 sum(Q), since codes are stored plus 8
  float sum[TILE_ROWS];      // of Q, times 2^9
  float unit[TILE_ROWS];     // times 2^-9
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

// The queries of a tile, ready to be multiplied.
struct Int4Tile {
  const QuantCpuAttention& call;
  Rows of;
  Queries q;
  Products products;

  Int4Tile(const QuantCpuAttention& call, const Tile& tile) : call(call), of(call, tile) {
    read_queries();
  }
  const Rows& rows() const { return of; }
  void attend(int64_t span, State& state);

  void read_queries() {
    for (int64_t r = 0; r < of.tile.count; ++r) {
      const int64_t at = of.token(r), head = of.head(r);
      const uint8_t* codes =
          static_cast<const uint8_t*>(call.q) + at * call.q_token + head * call.q_head;
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
      const float a = call.q_scale[at * call.q_scale_token + head];
      q.unit[r] = a * static_cast<float>(call.scale) * 0x1p-9f;
      if (sum(nan) != 0) q.unit[r] = __builtin_nanf("");
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

// The page after this one, fetched in parts between the steps of this one: pages lie anywhere, so
// no hardware foresees them, and what is fetched at once beyond a core's fill buffers holds it up.
struct NextPage {
  const char* codes[2] = {};  // of keys and values; null where there is no next page
  int64_t bytes, done = 0;

  NextPage(const Int4Tile& t, int64_t index, bool exists) : bytes(PAGE * t.call.head_dim / 2) {
    if (!exists) return;
    const PageRows rows(t.of, index);
    const int64_t first[2] = {rows.keys, rows.values};
    for (int i = 0; i < 2; ++i) {
      codes[i] = static_cast<const char*>(t.call.kv) + first[i] * (bytes / PAGE);
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
void attend_block(Int4Tile& t, const PageOperands& page, int64_t first_key, int64_t begin,
                  int64_t end, State& state, BlockMemory& block, NextPage& next) {
  const int64_t rows = end - begin, dim = state.dim;
  const Digits q = {t.q.digits[begin][0], MAX_HEAD_DIM};
  next.fetch_quarter();
  t.products.run<Q_LIMBS>(q, rows, dim, page.keys, PAGE, t.q.start + begin,
                          [&](int64_t r, int64_t n, I32 sum) {
                            memcpy(block.sums + r * PAGE + n, &sum, sizeof(sum));
                            if (n + LANES < PAGE) return;
                            const int64_t lo = t.of.first_key(begin + r) - first_key;
                            const int64_t hi = t.of.end_key(begin + r) - first_key;
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

void read_page(const Int4Tile& t, int64_t index, PageOperands& page, NextPage& next) {
  const QuantCpuAttention& call = t.call;
  const PageRows rows(t.of, index);
  const int64_t half = call.head_dim / 2, stored = t.of.kv_len - index * PAGE;
  const uint8_t* const codes = static_cast<const uint8_t*>(call.kv);
  unpack_keys(codes + rows.keys * half, call.head_dim, page.keys);
  next.fetch_quarter();
  unpack_values(codes + rows.values * half, call.head_dim, page.values);
  unpack_scales(call.kv_scales + rows.keys * 2, stored, page.k_scale, page.k_offset);
  unpack_scales(call.kv_scales + rows.values * 2, stored, page.v_scale, page.v_offset);
  next.fetch_quarter();
}

// All pages of one span that rows of the tile see.
void Int4Tile::attend(int64_t span, State& state) {
  PageOperands page;
  BlockMemory block;
  state.clear();
  const int64_t last_key = of.end_key(of.tile.count - 1);
  for_pages(of, span, [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t first_key = index * PAGE;
    NextPage next(*this, index + 1, first_key + PAGE < last_key);
    read_page(*this, index, page, next);
    for (int64_t r = begin; r < end; r += BLOCK_ROWS) {
      const int64_t stop = r + BLOCK_ROWS < end ? r + BLOCK_ROWS : end;
      attend_block(*this, page, first_key, r, stop, state, block, next);
    }
  });
}

template <class T>
void finish_as(const Rows& rows, const State& state) {
  const QuantCpuAttention& call = rows.call;
  for (int64_t r = 0; r < state.rows; ++r) {
    T* out =
        static_cast<T*>(call.out) + rows.token(r) * call.out_token + rows.head(r) * call.out_head;
    const float total = sum(load(state.total + r * SUM_LANES));
    const float offset = sum(load(state.offsets + r * SUM_LANES));
    const float* channels = state.out + r * state.dim;
    alignas(64) float ordered[MAX_HEAD_DIM];
    if (call.kv_type == QUANT_CPU_INT4) {
      order_channels(channels, state.dim, ordered);
      channels = ordered;
    }
    for (int64_t d = 0; d < state.dim; d += LANES) {
      store(out + d, (load(channels + d) + offset) / (total == 0.0f ? 1.0f : total));
    }
  }
}

void finish(const Rows& rows, const State& state) {
  switch (rows.call.out_type) {
    case QUANT_CPU_BF16:
      return finish_as<Bf16>(rows, state);
    case QUANT_CPU_FP16:
      return finish_as<Fp16>(rows, state);
    default:
      return finish_as<float>(rows, state);
  }
}

// run(tile), of the cache's kind.
template <class Run>
void with_tile(const QuantCpuAttention& call, const Tile& tile, const Run& run) {
  const DefaultRounding guard;
  const auto as = [&](auto&& it) { run(it); };
  switch (call.kv_type) {
    case QUANT_CPU_FP32:
      return as(DenseTile<float>(call, tile));
    case QUANT_CPU_BF16:
      return as(DenseTile<Bf16>(call, tile));
    case QUANT_CPU_FP16:
      return as(DenseTile<Fp16>(call, tile));
    default:
      return as(Int4Tile(call, tile));
  }
}

}  // namespace

int64_t state_floats(int64_t rows, int64_t head_dim) { return State::floats(rows, head_dim); }

void attend_span(const QuantCpuAttention& call, const Tile& tile, int64_t span, float* memory) {
  State state(memory, tile.count, call.head_dim);
  with_tile(call, tile, [&](auto& it) { it.attend(span, state); });
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
  finish(Rows(call, tile), total);
}

void attend(const QuantCpuAttention& call, const Tile& tile, int64_t first_span, int64_t spans) {
  alignas(64) float memory[2][State::floats(TILE_ROWS, MAX_HEAD_DIM)];
  State total(memory[0], tile.count, call.head_dim), part(memory[1], tile.count, call.head_dim);
  total.clear();
  with_tile(call, tile, [&](auto& it) {
    for (int64_t i = 0; i < spans; ++i) {
      it.attend(first_span + i, part);
      merge(total, part);
    }
    finish(it.rows(), total);
  });
}

}  // namespace QUANT_ISA
}  // namespace quant
