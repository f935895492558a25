// The producers of prefill attention: pages to tiles that MMAs read.
#pragma once

#include "cuda/prefill_schedule.cuh"
#include "cuda/prefill_unpack.cuh"

namespace quant {

// From packed pages: two warps for K and the scales, two for V.
template <class C>
struct PrefillProducer {
  const AttentionParams& p;
  const PrefillShared<C>& shared;
  const PrefillTile& tile;
  int warp, lane;
  int ids;  // of pages, one a lane

  // By warp 0, page after page.
  QUANT_DEVICE void load(int i) {
    const int stage = i % C::kPackedStages, parity = i / C::kPackedStages & 1;
    const int* table = p.block_table + tile.sequence * p.table_row + tile.begin;
    if (i % 32 == 0 && i + lane < tile.end - tile.begin) ids = table[i + lane];
    const int64_t row = (int64_t{1} * shuffle(ids, i % 32) * p.kv_heads + tile.head) * kPage;
    barrier_wait(shared.packed_empty + stage, parity ^ 1);
    if (lane != 0) return;
    Barrier* full = shared.packed_full + stage;
    char* to = shared.packed + stage * C::kPackedBytes;
    barrier_expect(full, C::kPackedBytes);
    QUANT_UNROLL for (int kind = 0; kind < 2; ++kind) {
      const int64_t from = row + kind * p.value_rows;
      copy_bulk(to + kind * C::kCodeBytes, p.kv + from * C::kHalf, C::kCodeBytes, full,
                Keep::last_out);
      copy_bulk(to + 2 * C::kCodeBytes + kind * C::kScaleBytes, p.kv_scales + from, C::kScaleBytes,
                full, Keep::last_out);
    }
  }

  // Written by this warp: seen by MMAs behind `full`. Read by it: free behind `empty`.
  QUANT_DEVICE void pass_on(Barrier* full, Barrier* empty) const {
    fence_async();
    warp_sync();
    if (lane != 0) return;
    barrier_arrive(full);
    barrier_arrive(empty);
  }
  QUANT_DEVICE void run_keys() {
    const int pages = tile.end - tile.begin;
    if (warp == 0) {
      for (int i = 0; i < C::kPackedStages - 1 && i < pages; ++i) load(i);
    }
    for (int i = 0; i < pages; ++i) {
      forget(lane);  // there are few registers: addresses are made anew for every page
      if (warp == 0 && i + C::kPackedStages - 1 < pages) load(i + C::kPackedStages - 1);
      const int from = i % C::kPackedStages, stage = C::stage_of(i);
      const char* packed = shared.packed + from * C::kPackedBytes;
      const char* pairs = packed + 2 * C::kCodeBytes;
      barrier_wait(shared.packed_full + from, i / C::kPackedStages & 1);
      barrier_wait(shared.key_empty + stage, C::parity_of(i) ^ 1);
      unpack_keys<C, C::kKeyRow>(packed, shared.keys + shared.key_tile(stage),
                                 shared.key_byte(stage), 32 * warp + lane);
      unpack_scales<C>(pairs, pairs + C::kScaleBytes, tile.kv_len - (tile.begin + i) * kPage,
                       shared.plane(stage), 32 * warp + lane);
      pass_on(shared.key_full + stage, shared.packed_empty + from);
    }
  }
  QUANT_DEVICE void run_values() {
    constexpr int kStep = C::kDim == 64 ? kValueWarps : 1;
    const int mine = warp - kKeyWarps, pages = tile.end - tile.begin;
    for (int i = kStep == 1 ? 0 : mine; i < pages; i += kStep) {
      forget(lane);
      const int from = i % C::kPackedStages, stage = C::stage_of(i);
      const char* packed = shared.packed + from * C::kPackedBytes + C::kCodeBytes;
      char* to = shared.values + shared.value_tile(stage);
      const int first = shared.value_byte(stage);
      barrier_wait(shared.packed_full + from, i / C::kPackedStages & 1);
      barrier_wait(shared.value_empty + stage, C::parity_of(i) ^ 1);
      if constexpr (C::kDim == 64) {
        unpack_values<C, C::kValueRow>(packed, to, first, lane, 0);
      } else {
        for (int round = mine; round < C::kDim / 64; round += kValueWarps) {
          unpack_values<C, C::kValueRow>(packed, to, first, lane, round);
        }
      }
      pass_on(shared.value_full + stage, shared.packed_empty + from);
    }
  }
  QUANT_DEVICE void run() {
    if (warp < kKeyWarps) {
      run_keys();
    } else {
      run_values();
    }
  }
};

// From expanded ones: a warp, which finds tiles, and copies their pages by one thread. Tiles and
// pages go on in rings, ahead of the consumers.
template <class C>
struct PrefillLoader {
  using Image = typename C::Image;
  const PrefillParams& params;
  const PrefillShared<C>& shared;
  int lane;

  QUANT_DEVICE void pass_on(const PrefillTile& tile, int round) const {
    const int stage = round % kTileStages;
    barrier_wait(shared.tile_empty + stage, round / kTileStages % 2 ^ 1);
    shared.tile[stage] = tile;
    barrier_arrive(shared.tile_full + stage);
  }
  // first: pages before this tile's.
  QUANT_DEVICE void load(const PrefillTile& tile, int first) const {
    const int64_t sequence = int64_t{1} * tile.sequence * params.shared.kv_heads + tile.head;
    const int64_t place = sequence * params.image_pages + tile.begin - tile.first_page;
    const char* image = params.images + place * Image::kBytes;
    for (int n = first; n < first + tile.end - tile.begin; ++n, image += Image::kBytes) {
      const int stage = C::stage_of(n);
      Barrier* full = shared.key_full + stage;
      barrier_wait(shared.value_empty + stage, C::parity_of(n) ^ 1);
      barrier_expect(full, Image::kBytes);
      copy_bulk(shared.keys + stage * C::kImageStage, image, Image::kBytes, full, Keep::last_out);
    }
  }
  QUANT_DEVICE void run() const {
    const PrefillSchedule schedule{params, lane};
    fence_async_global();
    for (int round = 0, first = 0;; ++round) {
      const PrefillTile tile = schedule.tile_of_round(round);
      if (lane == 0) pass_on(tile, round);
      if (tile.tokens == 0) break;
      if (lane == 0) load(tile, first);
      first += tile.end - tile.begin;
      warp_sync();
    }
  }
};

}  // namespace quant
