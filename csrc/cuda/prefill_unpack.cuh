// The producers of prefill attention: packed pages from the cache to tiles that MMAs read.
#pragma once

#include "cuda/prefill_layout.h"
#include "cuda/prefill_tile.cuh"

namespace quant {

// Two warps for K and the scales, two for V.
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

  static QUANT_DEVICE void store_key(char* to, int column, int byte, const uint4& codes) {
    char* slab = to + byte / 128 * C::kSlabBytes;
    *reinterpret_cast<uint4*>(slab + swizzled_place(column, byte % 128)) = codes;
  }
  QUANT_DEVICE void unpack_keys(const char* codes, int stage) const {
    char* to = shared.key_tile(stage);
    const int first = shared.key_byte(stage);
    QUANT_UNROLL for (int i = 0; i < C::kDim / 32; ++i) {
      const KeyChunk at = key_chunk<C::kDim>(i * 64 + warp * 32 + lane);
      const uint4 x = *reinterpret_cast<const uint4*>(codes + at.token * C::kHalf + 16 * at.chunk);
      const int column = column_of_slot(slot_of_token(at.token)), byte = first + 16 * at.chunk;
      store_key(to, column, byte,
                {e4m3_of_low(x.x), e4m3_of_low(x.y), e4m3_of_low(x.z), e4m3_of_low(x.w)});
      store_key(to, column, byte + C::kHalf,
                {e4m3_of_high(x.x), e4m3_of_high(x.y), e4m3_of_high(x.z), e4m3_of_high(x.w)});
    }
  }
  // What lies behind the last key may be anything, and 0 times NaN is NaN.
  QUANT_DEVICE uint32_t stored(const char* pairs, int first_key, int token) const {
    return first_key + token < tile.kv_len ? reinterpret_cast<const uint32_t*>(pairs)[token] : 0;
  }
  QUANT_DEVICE void unpack_scales(const char* pairs, int page) const {
    const int first_key = (tile.begin + page) * kPage, stage = stage_of(page);
    const char* of_values = pairs + C::kScaleBytes;
    float largest = 0;
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      largest = fmaxf(largest, fabsf(scale_of(stored(of_values, first_key, 32 * i + lane))));
    }
    QUANT_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
      largest = fmaxf(largest, shuffle_xor(largest, mask));
    }
    const float z = power_of_two_above(largest);
    const int slot = 32 * warp + lane, token = token_of_slot(slot);
    const uint32_t key = stored(pairs, first_key, token);
    const uint32_t value = stored(of_values, first_key, token);
    float* plane = shared.planes + stage * 4 * kPage + slot;
    plane[0] = scale_of(key) * kCodeUnit;
    plane[kPage] = offset_of(key);
    plane[2 * kPage] = scale_of(value) * (kRangeOfP * reciprocal_of_power_of_two(z));
    plane[3 * kPage] = offset_of(value);
    if (slot == 0) shared.back[page & (kBacks - 1)] = z * (kCodeUnit / kRangeOfP);
  }
  // Four tokens of four bytes: x[i] byte j becomes x[j] byte i.
  static QUANT_DEVICE void transpose_bytes(uint32_t* x) {
    const uint32_t a = permute(x[0], x[1], 0x5140), b = permute(x[0], x[1], 0x7362);
    const uint32_t c = permute(x[2], x[3], 0x5140), d = permute(x[2], x[3], 0x7362);
    x[0] = permute(a, c, 0x5410);
    x[1] = permute(a, c, 0x7632);
    x[2] = permute(b, d, 0x5410);
    x[3] = permute(b, d, 0x7632);
  }
  // Sixteen tokens of eight channels.
  QUANT_DEVICE void unpack_values(const char* codes, int stage, int round) const {
    const int word = value_word<C::kDim>(lane, round);
    char* to = shared.value_tile(stage);
    const int byte = shared.value_byte(stage) + ((lane & 3) << 4);
    uint32_t x[16];
    const char* from = codes + (lane & 3) * C::kHalf + 4 * word;  // slot 16 t + i is token 4 i + t
    QUANT_UNROLL for (int i = 0; i < 16; ++i) {
      x[i] = *reinterpret_cast<const uint32_t*>(from + token_of_slot(i) * C::kHalf);
    }
    QUANT_UNROLL for (int i = 0; i < 16; i += 4) transpose_bytes(x + i);
    QUANT_UNROLL for (int j = 0; j < 4; ++j) {
      const int channel = 4 * word + j;
      const uint4 low = {e4m3_of_low(x[j]), e4m3_of_low(x[4 + j]), e4m3_of_low(x[8 + j]),
                         e4m3_of_low(x[12 + j])};
      const uint4 high = {e4m3_of_high(x[j]), e4m3_of_high(x[4 + j]), e4m3_of_high(x[8 + j]),
                          e4m3_of_high(x[12 + j])};
      *reinterpret_cast<uint4*>(to + swizzled_place(channel, byte)) = low;
      *reinterpret_cast<uint4*>(to + swizzled_place(channel + C::kHalf, byte)) = high;
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
      const int from = i % C::kPackedStages, stage = stage_of(i);
      const char* packed = shared.packed + from * C::kPackedBytes;
      barrier_wait(shared.packed_full + from, i / C::kPackedStages & 1);
      barrier_wait(shared.key_empty + stage, parity_of(i) ^ 1);
      unpack_keys(packed, stage);
      unpack_scales(packed + 2 * C::kCodeBytes, i);
      pass_on(shared.key_full + stage, shared.packed_empty + from);
    }
  }
  QUANT_DEVICE void run_values() {
    constexpr int kStep = C::kDim == 64 ? kValueWarps : 1;
    const int mine = warp - kKeyWarps, pages = tile.end - tile.begin;
    for (int i = kStep == 1 ? 0 : mine; i < pages; i += kStep) {
      forget(lane);
      const int from = i % C::kPackedStages, stage = stage_of(i);
      const char* packed = shared.packed + from * C::kPackedBytes + C::kCodeBytes;
      barrier_wait(shared.packed_full + from, i / C::kPackedStages & 1);
      barrier_wait(shared.value_empty + stage, parity_of(i) ^ 1);
      if constexpr (C::kDim == 64) {
        unpack_values(packed, stage, 0);
      } else {
        for (int round = mine; round < C::kDim / 64; round += kValueWarps) {
          unpack_values(packed, stage, round);
        }
      }
      pass_on(shared.value_full + stage, shared.packed_empty + from);
    }
  }
};

}  // namespace quant
