// What a warpgroup of a prefill block makes of its rows' pages.
#pragma once

#include "cuda/prefill_rows.cuh"

namespace quant {

template <class C>
struct PrefillConsumer : PrefillRows<C> {
  using Rows = PrefillRows<C>;
  using Range = typename Rows::Range;
  using Rows::params, Rows::p, Rows::shared, Rows::group, Rows::thread, Rows::q;
  using Rows::row, Rows::live, Rows::top, Rows::total, Rows::offsets, Rows::sum;
  using Rows::slot, Rows::before;
  static constexpr int kScores = kPage / 2, kPart = C::kPiece / 2;
  using Score = float[kScores];
  using Part = float[kPart];
  using Operand = uint32_t[2][4];  // P of 32 slots each
  // Of M by a page: what sums before it become; any: of some row of the warp.
  struct Rise {
    float fade[2];
    bool any;
  };
  Descriptor keys, values;  // of stage 0
  float q_sum[2], row_unit[2];
  uint32_t queries[C::kQueriesInRegisters ? C::kDim / 32 : 1][4];

  QUANT_DEVICE PrefillConsumer(const PrefillParams& params, const PrefillShared<C>& shared,
                               int group, int thread)
      : Rows(params, shared, group, thread),
        keys(keep(describe<C::kKeyRow>(shared.keys))),
        values(keep(describe<C::kValueRow>(shared.values))) {}

  // --- stages; n counts the tile's pages ---
  QUANT_DEVICE void wait_keys(int n) const {
    barrier_wait(shared.key_full + C::stage_of(n), C::parity_of(n));
  }
  QUANT_DEVICE void wait_values(int n) const {
    if constexpr (C::kUnpacks) barrier_wait(shared.value_full + C::stage_of(n), C::parity_of(n));
  }
  QUANT_DEVICE void give_back(Barrier* empty, int n) const {
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(empty + C::stage_of(n));
  }
  QUANT_DEVICE void give_back_keys(int n) const {
    if constexpr (C::kUnpacks) give_back(shared.key_empty, n);
  }
  QUANT_DEVICE void give_back_values(int n) const { give_back(shared.value_empty, n); }

  // --- MMAs ---
  QUANT_DEVICE void multiply_keys(int n, Score& score) const {
    const int stage = C::stage_of(n);
    wait_keys(n);
    const Descriptor query = describe(shared.queries + group * C::kSlabs * C::kSlabBytes);
    const Descriptor key = advance(keys, shared.key_tile(stage) + shared.key_byte(stage));
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) mma_operand(score[i]);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < C::kDim / 32; ++step) {
      const int at = step / 4 * C::kSlabBytes + step % 4 * 32;
      if constexpr (C::kQueriesInRegisters) {
        mma<E4M3, kPage>(score, queries[step], advance(key, at), step > 0);
      } else {
        mma<E4M3, kPage>(score, advance(query, at), advance(key, at), step > 0);
      }
    }
    mma_commit();
  }
  QUANT_DEVICE void multiply_values(int n, int piece, const Operand& operand, Part& part) const {
    const int stage = C::stage_of(n);
    if (piece == 0) wait_values(n);
    const Descriptor value = advance(values, shared.value_tile(stage) + shared.value_byte(stage) +
                                                 piece * C::kPiece * C::kValueRow);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < 2; ++step) {
      mma<E4M3, C::kPiece>(part, operand[step], advance(value, 32 * step), step > 0);
    }
    mma_commit();
  }

  // --- softmax of a page: S to P, and M, l and sums of offsets go on ---
  struct alignas(16) Four {
    float x[4];
  };
  QUANT_DEVICE Four plane(int n, int which, int step, int h) const {
    const float* from = shared.plane(C::stage_of(n)) + which * kPage;
    return *reinterpret_cast<const Four*>(from + 32 * step + 16 * h + 4 * q);
  }
  // Where slot 32 step + 16 h + 4 q + b of row i is in a thread's S.
  static QUANT_DEVICE constexpr int index(int step, int h, int b, int i) {
    return 4 * (4 * step + 2 * h + b / 2) + 2 * i + b % 2;
  }
  QUANT_DEVICE void mask(int page, Score& score) const {
    const int first = page * kPage + token_of_slot(4 * q);
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      const int position = shared.row_position[row(i)];
      const int newest = position - first, oldest = oldest_key(position, p.window) - first;
      QUANT_UNROLL for (int at = 0; at < 16; ++at) {
        const int step = at / 8, h = at / 4 % 2, b = at % 4;
        const int key = token_of_slot(32 * step + 16 * h + b);
        float& x = score[index(step, h, b, i)];
        if (key > newest || key < oldest) x = -infinity();
      }
    }
  }
  QUANT_DEVICE void scale(int n, Score& product, Score& score) const {
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) mma_operand(product[i]);
    QUANT_UNROLL for (int at = 0; at < 4; ++at) {
      const Four scale = plane(n, 0, at / 2, at % 2), offset = plane(n, 1, at / 2, at % 2);
      QUANT_UNROLL for (int b = 0; b < 4; ++b) {
        QUANT_UNROLL for (int i = 0; i < 2; ++i) {
          const int j = index(at / 2, at % 2, b, i);
          score[j] = product[j] * scale.x[b] + q_sum[i] * offset.x[b];
          if constexpr (C::kCaps) score[j] = capped(score[j] * row_unit[i], p.cap);
        }
      }
    }
  }
  // What is left of a row's unit once scores are scaled.
  QUANT_DEVICE float unit(int i) const { return C::kCaps ? 1 : row_unit[i]; }
  // Whether the page goes on to P: not where kSkipping, and all rows of the warpgroup find it
  // negligible. Their M stays then.
  QUANT_DEVICE bool raise_top(Score& score, Rise& rise) {
    bool negligible = true, rises = false;
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      float largest = score[2 * i];
      QUANT_UNROLL for (int at = 1; at < 16; ++at) {
        largest = fmaxf(largest, score[at / 2 * 4 + 2 * i + at % 2]);
      }
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float in_page = largest * unit(i), now = fmaxf(top[i], ceilf(in_page));
      negligible = negligible && in_page < top[i] - params.negligible;
      rises = rises || now != top[i];
      rise.fade[i] = exponential2(top[i] - now);
      top[i] = now;
      total[i] *= rise.fade[i];
      offsets[i] *= rise.fade[i];
    }
    rise.any = any_of_warp(rises);
    if constexpr (C::kSkipping) return !all_of_group(1 + group, 128, negligible);
    return true;
  }
  // Returns what leads from P V to O.
  QUANT_DEVICE float exponentiate(int n, const Score& score, Operand& operand) {
    const float back = shared.plane(C::stage_of(n))[C::Image::kBack];
    QUANT_UNROLL for (int at = 0; at < 4; ++at) {
      const Four weight = plane(n, 2, at / 2, at % 2), offset = plane(n, 3, at / 2, at % 2);
      QUANT_UNROLL for (int i = 0; i < 2; ++i) {
        float y[4];
        QUANT_UNROLL for (int b = 0; b < 4; ++b) {
          const float x = score[index(at / 2, at % 2, b, i)];
          const float one = exponential2(x * unit(i) - top[i]);
          total[i] += one;
          offsets[i] += one * offset.x[b];
          y[b] = one * weight.x[b];
        }
        operand[at / 2][at % 2 * 2 + i] = to_e4m3(y[0], y[1], y[2], y[3]);
      }
    }
    QUANT_UNROLL for (int step = 0; step < 2; ++step) {
      QUANT_UNROLL for (int i = 0; i < 4; ++i) mma_operand(operand[step][i]);
    }
    give_back_keys(n);
    return back;
  }
  // Once all pages before are added.
  QUANT_DEVICE void fade(const Rise& rise) {
    if (!rise.any) return;
    QUANT_UNROLL for (int i = 0; i < C::kDim / 2; ++i) sum[i] *= rise.fade[i / 2 % 2];
  }
  QUANT_DEVICE void add(int piece, float back, Part& part) {
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) mma_operand(part[i]);
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) sum[piece * kPart + i] += part[i] * back;
  }
  // One piece after the other.
  QUANT_DEVICE void add_pieces(int n, const Operand& operand, float back, Part& part) {
    QUANT_UNROLL for (int piece = 0; piece < C::kPieces; ++piece) {
      multiply_values(n, piece, operand, part);
      mma_wait<0>();
      add(piece, back, part);
    }
    give_back_values(n);
  }
  // V of a page that is negligible. Without the wait this warpgroup could be a round of stages
  // ahead of the other one or of the producer, and its arrivals would count for an earlier page.
  QUANT_DEVICE void pass_values(int n) const {
    wait_values(n);
    give_back_values(n);
  }

  // --- pages, three at a time ---
  struct Pipeline {
    Score product, score;  // Q K of a page; what the page before it has become
    Operand operand;
    float back;
    Part part;
  };
  // Page n begins (there is none where kEnds), n - 1 becomes P, and n - 2 is added where kPending:
  // where it has a P. kMasks: n - 1 may need masks. Whether n - 1 has a P.
  template <bool kEnds, bool kMasks, bool kPending>
  QUANT_DEVICE bool advance_pages(int n, const Range& range, Pipeline& r) {
    Rise rise;
    if constexpr (kPending) multiply_values(n - 2, 0, r.operand, r.part);
    scale(n - 1, r.product, r.score);
    if constexpr (kPending && C::kPieces == 2) {
      mma_wait<0>();
      add(0, r.back, r.part);
      multiply_values(n - 2, 1, r.operand, r.part);
    }
    if constexpr (!kEnds) multiply_keys(n, r.product);
    if (kMasks && range.masked(n - 1)) mask(this->page(n - 1), r.score);
    const bool counts = raise_top(r.score, rise);
    if constexpr (kPending) {
      mma_wait<kEnds ? 0 : 1>();
      add(C::kPieces - 1, r.back, r.part);
      give_back_values(n - 2);
    } else {
      pass_values(n - 2);
    }
    fade(rise);
    if (counts) {
      r.back = exponentiate(n - 1, r.score, r.operand);
    } else {
      give_back_keys(n - 1);
    }
    mma_wait<0>();
    return counts;
  }
  template <bool kEnds, bool kMasks = true>
  QUANT_DEVICE bool advance_pages(int n, const Range& range, Pipeline& r, bool pending) {
    if (!C::kSkipping || pending) return advance_pages<kEnds, kMasks, true>(n, range, r);
    return advance_pages<kEnds, kMasks, false>(n, range, r);
  }
  QUANT_DEVICE void three_stages(const Range& range) {
    Pipeline r;
    Rise rise;
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) r.product[i] = 0;
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) r.part[i] = 0;
    multiply_keys(range.begin, r.product);
    mma_wait<0>();
    scale(range.begin, r.product, r.score);
    if (range.masked(range.begin)) mask(this->page(range.begin), r.score);
    raise_top(r.score, rise);
    r.back = exponentiate(range.begin, r.score, r.operand);
    int n = range.begin + 1;
    bool pending = true;
    if (n < range.end) {
      multiply_keys(n++, r.product);
      mma_wait<0>();
      while (n < range.end) {
        if constexpr (!C::kSkipping) {  // a loop of its own for most pages
          if (n > range.whole) {
            for (; n < range.until; ++n) advance_pages<false, false>(n, range, r, true);
          }
          if (n == range.end) break;
        }
        pending = advance_pages<false>(n++, range, r, pending);
      }
      pending = advance_pages<true>(range.end, range, r, pending);
    }
    if (pending) {
      add_pieces(range.end - 1, r.operand, r.back, r.part);
    } else {
      pass_values(range.end - 1);
    }
  }
  // The same with one S: P V of a page beside Q K of the next.
  QUANT_DEVICE void two_stages(const Range& range) {
    Score score;
    Operand operand;
    Rise rise;
    Part part;
    float back = 0;
    multiply_keys(range.begin, score);
    mma_wait<0>();
    for (int n = range.begin; n < range.end; ++n) {
      scale(n, score, score);
      if (range.masked(n)) mask(this->page(n), score);
      const bool counts = raise_top(score, rise);
      fade(rise);
      if (counts) {
        back = exponentiate(n, score, operand);
      } else {
        give_back_keys(n);
      }
      if (n + 1 < range.end) multiply_keys(n + 1, score);
      if (counts) {
        add_pieces(n, operand, back, part);
      } else {
        pass_values(n);
        mma_wait<0>();
      }
    }
  }

  // Pages of the tile that no row of this warpgroup sees.
  QUANT_DEVICE void skip(int begin, int end) const {
    for (int n = begin; n < end; ++n) {
      wait_keys(n);
      wait_values(n);
      give_back_keys(n);
      give_back_values(n);
    }
  }

  QUANT_DEVICE void run_tile() {
    this->find_row();
    this->load_queries();
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      q_sum[i] = shared.row_sum[row(i)];
      row_unit[i] = shared.row_unit[row(i)];
    }
    if constexpr (C::kQueriesInRegisters) {
      QUANT_UNROLL for (int step = 0; step < C::kDim / 32; ++step) {
        QUANT_UNROLL for (int r = 0; r < 4; ++r) {
          queries[step][r] = this->query_codes(r % 2, 32 * step + 16 * (r / 2) + 4 * q);
        }
      }
    }
    const Range pages = this->range();
    const int all = before + uniform(this->tile().end - this->tile().begin);
    skip(before, pages.begin);
    if (pages.begin < pages.end) {
      if constexpr (C::kThreeStages) {
        three_stages(pages);
      } else {
        two_stages(pages);
      }
    }
    skip(pages.end, all);
    this->store();
    before = all;
  }
  QUANT_DEVICE void run() {
    if constexpr (C::kUnpacks) {
      run_tile();
    } else {
      for (int round = 0;; ++round) {
        slot = round % kTileStages;
        barrier_wait(shared.tile_full + slot, round / kTileStages % 2);
        if (uniform(this->tile().tokens) == 0) break;
        run_tile();
        warp_sync();
        if (thread % 32 == 0) barrier_arrive(shared.tile_empty + slot);
      }
    }
  }
};

}  // namespace quant
