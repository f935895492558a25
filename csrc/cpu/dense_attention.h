// Causal attention over a cache of plain numbers, [2, pages, kv_heads, PAGE, D] of type T, in FP32:
//
//   S_t = q . k_t sm_scale log2(e),   O = sum p_t v_t / sum p_t
//
// Up to ROWS rows of a token, which see the same keys, share what is widened to FP32:
//
//   scores   FOUR keys at a time: LANES sums over channels each, folded into four numbers
//   outputs  WIDE vectors of channels at a time stay in registers for all keys of a page
//
// Keys that a row does not see are not multiplied: what memory holds there may be anything.
#ifndef QUANT_DENSE_ATTENTION_H_
#define QUANT_DENSE_ATTENTION_H_

#include "attention_state.h"

namespace quant {
namespace QUANT_ISA {

constexpr int FOUR = 4, WIDE = 4;
constexpr int ROWS = LANES == 16 ? 5 : 2;  // that registers hold sums of

// The sums of four vectors, each in the same order.
inline void store_four_sums(float* p, const F32* x) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
  const __m512 b = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512 four =
      _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) + _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  const __m256 half = _mm512_castps512_ps256(four) + _mm512_extractf32x8_ps(four, 1);
  _mm_storeu_ps(p, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  for (int j = 0; j < FOUR; ++j) p[j] = sum(x[j]);
#endif
}

template <class T>
class DenseTile {
 public:
  DenseTile(const QuantCpuAttention& call, const Tile& tile)
      : rows_(call, tile), dim_(call.head_dim), unit_(static_cast<float>(call.scale)) {
    for (int64_t r = 0; r < tile.count; ++r) {
      const T* q = static_cast<const T*>(call.q) + rows_.token(r) * call.q_token +
                   rows_.head(r) * call.q_head;
      for (int64_t i = 0; i < dim_; i += LANES) store(q_[r] + i, load(q + i));
    }
  }

  const Rows& rows() const { return rows_; }

  // The sums over one span.
  void attend(int64_t span, State& state) {
    state.clear();
    for_pages(rows_, span, [&](int64_t index, int64_t begin, int64_t end) {
      const PageRows at(rows_, index);
      const T* const cache = static_cast<const T*>(rows_.call.kv);
      const T *const keys = cache + at.keys * dim_, *const values = cache + at.values * dim_;
      for (int64_t r = begin, next; r < end; r = next) {
        next = r + 1;
        while (next < end && next < r + ROWS && rows_.token(next) == rows_.token(r)) ++next;
        const int64_t low = rows_.first_key(r) - index * PAGE;
        const int64_t high = rows_.end_key(r) - index * PAGE;
        low_ = low > 0 ? low : 0;
        high_ = high < PAGE ? high : PAGE;
        some_rows<ROWS>(next - r, keys, values, r, state);
      }
    });
  }

 private:
  template <int R>
  void some_rows(int64_t count, const T* keys, const T* values, int64_t r, State& state) {
    if constexpr (R > 1) {
      if (count < R) return some_rows<R - 1>(count, keys, values, r, state);
    }
    score<R>(keys, r);
    for (int i = 0; i < R; ++i) exponentiate(i, r + i, state);
    add<R>(values, state.out + r * dim_);
  }

  // p_[i][t] = q_[r + i] . k_t. The last keys are read again where no multiple of four are seen.
  template <int R>
  void score(const T* keys, int64_t r) {
    for (int64_t first = low_ / FOUR * FOUR; first < high_; first += FOUR) {
      const T* key[FOUR];
      for (int j = 0; j < FOUR; ++j) {
        int64_t t = first + j < high_ ? first + j : high_ - 1;
        if (t < low_) t = low_;
        key[j] = keys + t * dim_;
        for (int64_t i = 0; i < dim_; i += 64 / sizeof(T)) {
          __builtin_prefetch(key[j] + 2 * FOUR * dim_ + i);
        }
      }
      F32 sums[R][FOUR] = {};
      for (int64_t i = 0; i < dim_; i += LANES) {
        F32 k[FOUR];
#pragma GCC unroll 4
        for (int j = 0; j < FOUR; ++j) k[j] = load(key[j] + i);
#pragma GCC unroll 5
        for (int n = 0; n < R; ++n) {
          const F32 q = load(q_[r + n] + i);
#pragma GCC unroll 4
          for (int j = 0; j < FOUR; ++j) sums[n][j] = fma(q, k[j], sums[n][j]);
        }
      }
#pragma GCC unroll 5
      for (int n = 0; n < R; ++n) store_four_sums(p_[n] + first, sums[n]);
    }
  }

  // Scores become p, 0 for keys that are not seen.
  void exponentiate(int n, int64_t r, State& state) {
    constexpr int N = PAGE / LANES;
    const F32 nothing = splat(-__builtin_inff());
    F32 x[N], highest = nothing;
    I32 seen[N];
    for (int j = 0; j < N; ++j) {
      const I32 key = iota() + j * LANES;
      seen[j] = (key >= static_cast<int32_t>(low_)) & (key < static_cast<int32_t>(high_));
      x[j] = select(seen[j], load(p_[n] + j * LANES) * unit_, nothing);
      highest = max(highest, x[j]);
    }
    const float top = __builtin_ceilf(largest(highest)), before = state.top[r];
    const float now = top <= before ? before : top;
    fade_[n] = power_of_two(before - now);
    state.top[r] = now;
    F32 total = {};
    for (int j = 0; j < N; ++j) {
      const F32 p = select(seen[j], exp2_nonpositive(x[j] - now), F32{});
      store(p_[n] + j * LANES, p);
      total += p;
    }
    float* const to = state.total + r * SUM_LANES;
    store(to, fma(load(to), splat(fade_[n]), total));
  }

  // out[n, :] = out[n, :] fade + sum_t p_[n][t] v_t
  template <int R>
  void add(const T* values, float* out) {
    int64_t i = 0;
    for (; i + WIDE * LANES <= dim_; i += WIDE * LANES) add<R, WIDE>(values + i, out + i);
    for (; i < dim_; i += LANES) add<R, 1>(values + i, out + i);
  }
  template <int R, int W>
  void add(const T* values, float* out) {
    F32 sums[R][W];
#pragma GCC unroll 5
    for (int n = 0; n < R; ++n) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sums[n][w] = load(out + n * dim_ + w * LANES) * fade_[n];
    }
    for (int64_t t = low_; t < high_; ++t) {
      __builtin_prefetch(values + (t + 8) * dim_);
      F32 v[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) v[w] = load(values + t * dim_ + w * LANES);
#pragma GCC unroll 5
      for (int n = 0; n < R; ++n) {
        const F32 p = splat(p_[n][t]);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[n][w] = fma(p, v[w], sums[n][w]);
      }
    }
#pragma GCC unroll 5
    for (int n = 0; n < R; ++n) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store(out + n * dim_ + w * LANES, sums[n][w]);
    }
  }

  Rows rows_;
  int64_t dim_;
  float unit_;
  int64_t low_ = 0, high_ = 0;  // of the page, the keys that the rows at hand see
  alignas(64) float q_[TILE_ROWS][MAX_HEAD_DIM];
  alignas(64) float p_[ROWS][PAGE];
  float fade_[ROWS];
};

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_DENSE_ATTENTION_H_
