// What a warpgroup of a prefill block makes of its rows' pages.
#pragma once

#include "cuda/prefill_tile.cuh"
#include "cuda/rows.cuh"

namespace quant {

template <class C>
struct PrefillConsumer {
  static constexpr int kScores = kPage / 2, kPart = C::kPiece / 2;
  using Score = float[kScores];
  using Part = float[kPart];
  using Operand = uint32_t[2][4];  // P of 32 slots each
  // Of a page: what becomes of sums before it, and from its P V to O.
  struct Units {
    float fade[2], back;
  };

  const PrefillParams& params;
  const AttentionParams& p;
  const PrefillShared<C>& shared;
  const PrefillTile& tile;
  int group, thread;  // of the block, of the warpgroup
  int g, q;           // lane 4 g + q: rows g and g + 8 of the warp's 16
  float top[2], total[2], offsets[2];
  float sum[C::kDim / 2];

  QUANT_DEVICE PrefillConsumer(const PrefillParams& params, const PrefillShared<C>& shared,
                               const PrefillTile& tile, int group, int thread)
      : params(params),
        p(params.shared),
        shared(shared),
        tile(tile),
        group(group),
        thread(thread % 128),
        g(thread % 32 / 4),
        q(thread % 4) {}

  QUANT_DEVICE int row(int i) const { return group * kGroupRows + thread / 32 * 16 + g + 8 * i; }
  QUANT_DEVICE const uint8_t* query(int row) const {
    const int64_t token = tile.start + row / p.ratio, head = tile.head * p.ratio + row % p.ratio;
    return p.q + token * p.q_token + head * p.q_head;
  }
  QUANT_DEVICE bool live(int row) const { return row / p.ratio < tile.tokens; }

  // Two threads a row.
  QUANT_DEVICE void load_queries() {
    const int of_group = thread / 2, row = group * kGroupRows + of_group;
    constexpr int kChunks = C::kDim / 32;
    const bool there = live(row);
    char* to = shared.queries + group * C::kSlabs * C::kSlabBytes;
    float codes = 0;
    QUANT_UNROLL for (int i = 0; i < kChunks; ++i) {
      const int byte = (thread % 2 * kChunks + i) * 16;
      uint4 x = {0, 0, 0, 0};
      if (there) x = *reinterpret_cast<const uint4*>(query(row) + byte);
      codes += (sum_of_e4m3(x.x) + sum_of_e4m3(x.y)) + (sum_of_e4m3(x.z) + sum_of_e4m3(x.w));
      char* slab = to + byte / 128 * C::kSlabBytes;
      *reinterpret_cast<uint4*>(slab + swizzled_place<128>(of_group, byte % 128)) = x;
    }
    codes += shuffle_xor(codes, 1);
    if (thread % 2 == 0) {
      const int64_t token = tile.start + row / p.ratio, head = tile.head * p.ratio + row % p.ratio;
      shared.row_sum[row] = codes;
      shared.row_position[row] = there ? tile.first_position + row / p.ratio : -1;
      shared.row_unit[row] = there ? p.q_scale[token * p.q_scale_token + head] * p.scale : 1.0f;
    }
    fence_async();
    if (group == 0) {
      group_sync(1, 128);
    } else {
      group_sync(2, 128);
    }
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      top[i] = kLowest;
      if constexpr (C::kSkipping) {
        if (!live(this->row(i))) top[i] = -kLowest;  // finds every page negligible
      }
      total[i] = offsets[i] = 0;
    }
    QUANT_UNROLL for (int i = 0; i < C::kDim / 2; ++i) sum[i] = 0;
  }

  // --- MMAs; n counts the tile's pages ---
  QUANT_DEVICE void multiply_keys(int n, Score& score) const {
    const int stage = C::stage_of(n);
    barrier_wait(shared.key_full + stage, C::parity_of(n));
    const Descriptor query = describe(shared.queries + group * C::kSlabs * C::kSlabBytes);
    const Descriptor key =
        advance(describe<C::kKeyRow>(shared.key_tile(stage)), shared.key_byte(stage));
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) mma_operand(score[i]);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < C::kDim / 32; ++step) {
      const int at = step / 4 * C::kSlabBytes + step % 4 * 32;
      mma<E4M3, kPage>(score, advance(query, at), advance(key, at), step > 0);
    }
    mma_commit();
  }
  QUANT_DEVICE void multiply_values(int n, int piece, const Operand& operand, Part& part) const {
    const int stage = C::stage_of(n);
    if (piece == 0) barrier_wait(shared.value_full + stage, C::parity_of(n));
    const Descriptor value = advance(describe<C::kValueRow>(shared.value_tile(stage)),
                                     shared.value_byte(stage) + piece * C::kPiece * C::kValueRow);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < 2; ++step) {
      mma<E4M3, C::kPiece>(part, operand[step], advance(value, 32 * step), step > 0);
    }
    mma_commit();
  }
  QUANT_DEVICE void give_back(Barrier* empty, int n) const {
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(empty + C::stage_of(n));
  }

  // --- pages [begin, end) of the tile's, those outside [whole, whole_end) masked ---
  struct Range {
    int begin, end, whole, whole_end;
    QUANT_DEVICE bool masked(int n) const { return n < whole || n >= whole_end; }
  };

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
    const float q_sum[2] = {shared.row_sum[row(0)], shared.row_sum[row(1)]};
    QUANT_UNROLL for (int at = 0; at < 4; ++at) {
      const Four scale = plane(n, 0, at / 2, at % 2), offset = plane(n, 1, at / 2, at % 2);
      QUANT_UNROLL for (int b = 0; b < 4; ++b) {
        QUANT_UNROLL for (int i = 0; i < 2; ++i) {
          const int j = index(at / 2, at % 2, b, i);
          score[j] = product[j] * scale.x[b] + q_sum[i] * offset.x[b];
          if constexpr (C::kCaps) score[j] = capped(score[j] * shared.row_unit[row(i)], p.cap);
        }
      }
    }
  }
  // What is left of a row's unit once scores are scaled.
  QUANT_DEVICE float unit(int i) const { return C::kCaps ? 1 : shared.row_unit[row(i)]; }
  // Whether the page goes on to P: not where kSkipping, and all rows of the warpgroup find it
  // negligible. Their M stays then, and fade is 1.
  QUANT_DEVICE bool raise_top(int n, const Range& range, Score& score, Units& units) {
    bool negligible = true;
    if (range.masked(n)) mask(tile.begin + n, score);
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      float largest = score[2 * i];
      QUANT_UNROLL for (int at = 1; at < 16; ++at) {
        largest = fmaxf(largest, score[at / 2 * 4 + 2 * i + at % 2]);
      }
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float in_page = largest * unit(i), now = fmaxf(top[i], ceilf(in_page));
      negligible = negligible && in_page < top[i] - params.negligible;
      units.fade[i] = exponential2(top[i] - now);
      top[i] = now;
      total[i] *= units.fade[i];
      offsets[i] *= units.fade[i];
    }
    if constexpr (C::kSkipping) return !all_of_group(1 + group, 128, negligible);
    return true;
  }
  QUANT_DEVICE void exponentiate(int n, const Score& score, Operand& operand, Units& units) {
    const float scale[2] = {unit(0), unit(1)};
    units.back = shared.plane(C::stage_of(n))[C::Image::kBack];
    QUANT_UNROLL for (int at = 0; at < 4; ++at) {
      const Four weight = plane(n, 2, at / 2, at % 2), offset = plane(n, 3, at / 2, at % 2);
      QUANT_UNROLL for (int i = 0; i < 2; ++i) {
        float y[4];
        QUANT_UNROLL for (int b = 0; b < 4; ++b) {
          const float x = score[index(at / 2, at % 2, b, i)];
          const float one = exponential2(x * scale[i] - top[i]);
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
    give_back(shared.key_empty, n);
  }
  QUANT_DEVICE void add(int piece, const Units& units, Part& part) {
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) mma_operand(part[i]);
    float* to = sum + piece * kPart;
    if (any_of_warp(units.fade[0] != 1 || units.fade[1] != 1)) {
      QUANT_UNROLL for (int i = 0; i < kPart; ++i) to[i] *= units.fade[i / 2 % 2];
    }
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) to[i] += part[i] * units.back;
  }
  // From piece `first` on, one after the other.
  QUANT_DEVICE void add_pieces(int n, int first, const Operand& operand, const Units& units,
                               Part& part) {
    QUANT_UNROLL for (int piece = 0; piece < C::kPieces; ++piece) {
      if (piece < first) continue;
      multiply_values(n, piece, operand, part);
      mma_wait<0>();
      add(piece, units, part);
    }
    give_back(shared.value_empty, n);
  }

  // V of a page that is negligible. Without the wait this warpgroup could be a round of stages
  // ahead of the other one or of the producer, and its arrivals would count for an earlier page.
  QUANT_DEVICE void pass_values(int n) const {
    barrier_wait(shared.value_full + C::stage_of(n), C::parity_of(n));
    give_back(shared.value_empty, n);
  }

  struct Pipeline {
    Score product, score;  // Q K of a page; what the page before it has become
    Operand operand;
    Units units;
    Part part;
  };
  // Page n begins (there is none where kEnds), n - 1 becomes P, and n - 2 is added where kPending:
  // where it has a P. Whether n - 1 has one.
  template <bool kEnds, bool kPending>
  QUANT_DEVICE bool advance_pages(int n, const Range& range, Pipeline& r) {
    Units units;
    if constexpr (kPending) multiply_values(n - 2, 0, r.operand, r.part);
    scale(n - 1, r.product, r.score);
    if constexpr (kPending && C::kPieces == 2) {
      mma_wait<0>();
      add(0, r.units, r.part);
      multiply_values(n - 2, 1, r.operand, r.part);
    }
    if constexpr (!kEnds) multiply_keys(n, r.product);
    const bool counts = raise_top(n - 1, range, r.score, units);
    if constexpr (kPending) {
      mma_wait<kEnds ? 0 : 1>();
      add(C::kPieces - 1, r.units, r.part);
      give_back(shared.value_empty, n - 2);
    } else {
      pass_values(n - 2);
    }
    if (counts) {
      exponentiate(n - 1, r.score, r.operand, units);
    } else {
      give_back(shared.key_empty, n - 1);
    }
    r.units = units;
    mma_wait<0>();
    return counts;
  }
  template <bool kEnds>
  QUANT_DEVICE bool advance_pages(int n, const Range& range, Pipeline& r, bool pending) {
    if (!C::kSkipping || pending) return advance_pages<kEnds, true>(n, range, r);
    return advance_pages<kEnds, false>(n, range, r);
  }
  QUANT_DEVICE void three_stages(const Range& range) {
    Pipeline r;
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) r.product[i] = 0;
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) r.part[i] = 0;
    multiply_keys(range.begin, r.product);
    mma_wait<0>();
    scale(range.begin, r.product, r.score);
    raise_top(range.begin, range, r.score, r.units);
    exponentiate(range.begin, r.score, r.operand, r.units);
    const int second = range.begin + 1;
    bool pending = true;
    if (second < range.end) {
      multiply_keys(second, r.product);
      mma_wait<0>();
      for (int n = second + 1; n < range.end; ++n) {
        pending = advance_pages<false>(n, range, r, pending);
      }
      pending = advance_pages<true>(range.end, range, r, pending);
    }
    if (pending) {
      add_pieces(range.end - 1, 0, r.operand, r.units, r.part);
    } else {
      pass_values(range.end - 1);
    }
  }
  // The same with one S: P V of a page beside Q K of the next.
  QUANT_DEVICE void two_stages(const Range& range) {
    Score score;
    Operand operand;
    Units units;
    Part part;
    multiply_keys(range.begin, score);
    mma_wait<0>();
    for (int n = range.begin; n < range.end; ++n) {
      scale(n, score, score);
      const bool counts = raise_top(n, range, score, units);
      if (counts) {
        exponentiate(n, score, operand, units);
      } else {
        give_back(shared.key_empty, n);
      }
      if (n + 1 < range.end) multiply_keys(n + 1, score);
      if (counts) {
        add_pieces(n, 0, operand, units, part);
      } else {
        pass_values(n);
        mma_wait<0>();
      }
    }
  }

  // Pages of the tile that no row of this warpgroup sees.
  QUANT_DEVICE void skip(int begin, int end) const {
    for (int n = begin; n < end; ++n) {
      barrier_wait(shared.key_full + C::stage_of(n), C::parity_of(n));
      barrier_wait(shared.value_full + C::stage_of(n), C::parity_of(n));
      give_back(shared.key_empty, n);
      give_back(shared.value_empty, n);
    }
  }
  QUANT_DEVICE Range range() const {
    const int first_row = group * kGroupRows;
    int last_token = (first_row + kGroupRows - 1) / p.ratio;
    if (last_token >= tile.tokens) last_token = tile.tokens - 1;
    const int first = tile.first_position + first_row / p.ratio;
    const int last = tile.first_position + last_token;
    if (first_row / p.ratio > last_token || last < 0) return {0, 0, 0, 0};
    const int whole = (oldest_key(last, p.window) + kPage - 1) / kPage;
    return {oldest_key(first, p.window) / kPage - tile.begin, last / kPage + 1 - tile.begin,
            whole - tile.begin, (first + 1 > 0 ? first + 1 : 0) / kPage - tile.begin};
  }

  template <class T>
  QUANT_DEVICE void store(int64_t at, float a, float b) const {
    struct alignas(2 * sizeof(T)) Two {
      T x[2];
    } two;
    from_float(a, two.x[0]);
    from_float(b, two.x[1]);
    *reinterpret_cast<Two*>(static_cast<T*>(p.out) + at) = two;
  }
  QUANT_DEVICE void store() {
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      QUANT_UNROLL for (int mask = 1; mask < 4; mask *= 2) {
        total[i] += shuffle_xor(total[i], mask);
        offsets[i] += shuffle_xor(offsets[i], mask);
      }
      const int at = row(i);
      if (!live(at)) continue;
      const int64_t token = tile.start + at / p.ratio, head = tile.head * p.ratio + at % p.ratio;
      const int64_t first = token * p.out_token + head * p.out_head + 2 * q;
      const float share = 1.0f / (total[i] == 0 ? 1.0f : total[i]);
      QUANT_UNROLL for (int j = 0; j < C::kDim / 8; ++j) {
        const float a = (sum[4 * j + 2 * i] + offsets[i]) * share;
        const float b = (sum[4 * j + 2 * i + 1] + offsets[i]) * share;
        if (p.out_type == Type::bf16) {
          store<Bf16>(first + 8 * j, a, b);
        } else if (p.out_type == Type::fp16) {
          store<Fp16>(first + 8 * j, a, b);
        } else {
          store<float>(first + 8 * j, a, b);
        }
      }
    }
  }

  QUANT_DEVICE void run() {
    load_queries();
    const Range pages = range();
    skip(0, pages.begin);
    if (pages.begin < pages.end) {
      if constexpr (C::kThreeStages) {
        three_stages(pages);
      } else {
        two_stages(pages);
      }
    }
    skip(pages.end, tile.end - tile.begin);
    store();
  }
};

}  // namespace quant
