// The rows of a warpgroup of a prefill block: what comes in of them, and what goes out.
#pragma once

#include "cuda/prefill_tile.cuh"
#include "cuda/rows.cuh"

namespace quant {

template <class C>
struct PrefillRows {
  const PrefillParams& params;
  const AttentionParams& p;
  const PrefillShared<C>& shared;
  int slot, before;   // of the tile, in the ring of tiles; pages of the tiles before it
  int group, thread;  // of the block, of the warpgroup
  int g, q;           // lane 4 g + q: rows g and g + 8 of the warp's 16
  float top[2], total[2], offsets[2];
  float sum[C::kDim / 2];

  QUANT_DEVICE PrefillRows(const PrefillParams& params, const PrefillShared<C>& shared, int group,
                           int thread)
      : params(params),
        p(params.shared),
        shared(shared),
        slot(0),
        before(0),
        group(uniform(group)),
        thread(thread % 128) {}

  // Anew for every tile: what follows from it would not all stay in registers from one to the next.
  QUANT_DEVICE void find_row() {
    forget(thread);
    g = thread % 32 / 4;
    q = thread % 4;
  }

  QUANT_DEVICE const PrefillTile& tile() const { return shared.tile[slot]; }
  QUANT_DEVICE int row(int i) const { return group * kGroupRows + thread / 32 * 16 + g + 8 * i; }
  QUANT_DEVICE const uint8_t* query(int row) const {
    const int64_t token = tile().start + row / p.ratio,
                  head = tile().head * p.ratio + row % p.ratio;
    return p.q + token * p.q_token + head * p.q_head;
  }
  QUANT_DEVICE bool live(int row) const { return row / p.ratio < tile().tokens; }

  QUANT_DEVICE void sync_group() const {
    if (group == 0) {
      group_sync(1, 128);
    } else {
      group_sync(2, 128);
    }
  }
  // Two threads a row.
  QUANT_DEVICE void load_queries() {
    if constexpr (!C::kUnpacks) sync_group();  // rows of the tile before have been read
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
      const int64_t token = tile().start + row / p.ratio,
                    head = tile().head * p.ratio + row % p.ratio;
      shared.row_sum[row] = codes;
      shared.row_position[row] = there ? tile().first_position + row / p.ratio : -1;
      shared.row_unit[row] = there ? p.q_scale[token * p.q_scale_token + head] * p.scale : 1.0f;
    }
    fence_async();
    sync_group();
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      top[i] = kLowest;
      if constexpr (C::kSkipping) {
        if (!live(this->row(i))) top[i] = -kLowest;  // finds every page negligible
      }
      total[i] = offsets[i] = 0;
    }
    QUANT_UNROLL for (int i = 0; i < C::kDim / 2; ++i) sum[i] = 0;
  }

  // Four codes of a row of this thread's, from channel `first` on.
  QUANT_DEVICE uint32_t query_codes(int i, int first) const {
    const char* slabs = shared.queries + group * C::kSlabs * C::kSlabBytes;
    const int place = swizzled_place<128>(row(i) % kGroupRows, first % 128);
    return *reinterpret_cast<const uint32_t*>(slabs + first / 128 * C::kSlabBytes + place);
  }

  // Pages [begin, end) of the tile's that these rows see; those outside [whole, whole_end) not all
  // of them do. Pages count on from those of the tiles before.
  struct Range {
    int begin, end, whole, whole_end;
    int until;  // the first page that begins behind one that needs masks again, or `end`
    QUANT_DEVICE bool masked(int n) const { return n < whole || n >= whole_end; }
  };
  QUANT_DEVICE int page(int n) const { return tile().begin + n - before; }
  QUANT_DEVICE Range range() const {
    const PrefillTile& tile = this->tile();
    const int first_row = group * kGroupRows;
    int last_token = (first_row + kGroupRows - 1) / p.ratio;
    if (last_token >= tile.tokens) last_token = tile.tokens - 1;
    const int first = tile.first_position + first_row / p.ratio;
    const int last = tile.first_position + last_token;
    const bool none = first_row / p.ratio > last_token || last < 0;
    const int from = tile.begin - before;
    const int begin = none ? before : oldest_key(first, p.window) / kPage - from;
    const int end = none ? before : last / kPage + 1 - from;
    const int whole = (oldest_key(last, p.window) + kPage - 1) / kPage - from;
    const int whole_end = (first + 1 > 0 ? first + 1 : 0) / kPage - from;
    const int until = end < whole_end + 1 ? end : whole_end + 1;
    return {uniform(begin), uniform(end), uniform(whole), uniform(whole_end), uniform(until)};
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
      const int64_t token = tile().start + at / p.ratio,
                    head = tile().head * p.ratio + at % p.ratio;
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
};

}  // namespace quant
