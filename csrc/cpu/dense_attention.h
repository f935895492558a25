// Causal attention over a cache of plain numbers, [2, pages, kv_heads, PAGE, D] of type T, in FP32:
//
//   S_t = q . k_t sm_scale log2(e),   O = sum p_t v_t / sum p_t
//
// A page's rows are widened four at a time, for all rows of the tile that see them. Sums over
// channels are LANES sums, folded at the end; those over keys ascend. Keys that a row does not see
// are not multiplied: what memory holds there may be anything.
#ifndef QUANT_DENSE_ATTENTION_H_
#define QUANT_DENSE_ATTENTION_H_

#include "attention_state.h"

namespace quant {
namespace QUANT_ISA {

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
      const int64_t stored = rows_.kv_len - index * PAGE;
      const int64_t keys = stored < PAGE ? stored : PAGE;
      score(cache + at.keys * dim_, keys, begin, end);
      for (int64_t r = begin; r < end; ++r) exponentiate(r, index * PAGE, state);
      add(cache + at.values * dim_, keys, begin, end, state);
    });
  }

 private:
  static constexpr int FOUR = 4;  // keys that are widened together

  // Rows [first, first + FOUR) of a page as FP32, those behind `count` zeros.
  void widen(const T* rows, int64_t first, int64_t count) {
    for (int64_t j = 0; j < FOUR; ++j) {
      const T* row = rows + (first + j) * dim_;
      __builtin_prefetch(row + FOUR * dim_);
      for (int64_t i = 0; i < dim_; i += LANES) {
        store(wide_[j] + i, first + j < count ? load(row + i) : F32{});
      }
    }
  }

  void score(const T* keys, int64_t count, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < count; first += FOUR) {
      widen(keys, first, count);
      for (int64_t r = begin; r < end; ++r) {
        F32 sums[FOUR] = {};
        for (int64_t i = 0; i < dim_; i += LANES) {
          const F32 q = load(q_[r] + i);
#pragma GCC unroll 4
          for (int j = 0; j < FOUR; ++j) sums[j] = fma(q, load(wide_[j] + i), sums[j]);
        }
#pragma GCC unroll 4
        for (int j = 0; j < FOUR; ++j) p_[r][first + j] = sum(sums[j]);
      }
    }
  }

  // A row's scores of a page become its p; 0 where it does not see the key.
  void exponentiate(int64_t r, int64_t first_key, State& state) {
    const int64_t low = rows_.first_key(r) - first_key, high = rows_.end_key(r) - first_key;
    low_[r] = low > 0 ? low : 0;
    high_[r] = high < PAGE ? high : PAGE;
    F32 x[PAGE / LANES], highest = splat(-__builtin_inff());
    for (int j = 0; j < PAGE / LANES; ++j) {
      const I32 key = iota() + j * LANES;
      const I32 seen =
          (key >= static_cast<int32_t>(low_[r])) & (key < static_cast<int32_t>(high_[r]));
      x[j] = select(seen, load(p_[r] + j * LANES) * unit_, splat(-__builtin_inff()));
      highest = max(highest, x[j]);
    }
    const float top = __builtin_ceilf(largest(highest)), before = state.top[r];
    const float now = top <= before ? before : top;
    fade_[r] = power_of_two(before - now);
    state.top[r] = now;
    F32 total = {};
    for (int j = 0; j < PAGE / LANES; ++j) {
      const F32 p = select(x[j] == -__builtin_inff(), F32{}, exp2_nonpositive(x[j] - now));
      store(p_[r] + j * LANES, p);
      total += p;
    }
    float* const to = state.total + r * SUM_LANES;
    store(to, fma(load(to), splat(fade_[r]), total));
  }

  void add(const T* values, int64_t count, int64_t begin, int64_t end, State& state) {
    for (int64_t r = begin; r < end; ++r) {
      float* const out = state.out + r * dim_;
      for (int64_t i = 0; i < dim_ && fade_[r] != 1.0f; i += LANES) {
        store(out + i, load(out + i) * fade_[r]);
      }
    }
    for (int64_t first = 0; first < count; first += FOUR) {
      widen(values, first, count);
      for (int64_t r = begin; r < end; ++r) {
        float* const out = state.out + r * dim_;
        const float* const p = p_[r] + first;
        if (low_[r] <= first && first + FOUR <= high_[r]) {
          for (int64_t i = 0; i < dim_; i += LANES) {
            F32 sums = load(out + i);
#pragma GCC unroll 4
            for (int j = 0; j < FOUR; ++j) sums = fma(splat(p[j]), load(wide_[j] + i), sums);
            store(out + i, sums);
          }
          continue;
        }
        for (int64_t j = 0; j < FOUR; ++j) {
          if (first + j < low_[r] || first + j >= high_[r]) continue;
          for (int64_t i = 0; i < dim_; i += LANES) {
            store(out + i, fma(splat(p[j]), load(wide_[j] + i), load(out + i)));
          }
        }
      }
    }
  }

  Rows rows_;
  int64_t dim_;
  float unit_;
  alignas(64) float q_[TILE_ROWS][MAX_HEAD_DIM];
  alignas(64) float wide_[FOUR][MAX_HEAD_DIM];
  alignas(64) float p_[TILE_ROWS][PAGE];
  float fade_[TILE_ROWS];
  int64_t low_[TILE_ROWS], high_[TILE_ROWS];  // of the page, the keys that a row sees
};

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_DENSE_ATTENTION_H_
