// What a block of prefill attention works on: its tile of queries, and its shared memory.
#pragma once

#include "cuda/attention_codes.cuh"

namespace quant {

constexpr int kPrefillConsumers = 256, kPrefillThreads = 384;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroupWarps = 4;
constexpr int kKeyWarps = 2, kValueWarps = 2;
constexpr int kPageStages = 4;  // of unpacked pages; in pairs, see PrefillShared

// Of a page of the tile, counted from its first.
constexpr int kBacks = 8;
QUANT_DEVICE int stage_of(int n) { return n & (kPageStages - 1); }
QUANT_DEVICE int parity_of(int n) { return n / kPageStages & 1; }

template <int kDim_, int kOptions = kPlain>
struct PrefillConfig {
  static constexpr int kDim = kDim_, kHalf = kDim / 2;
  static constexpr bool kCaps = (kOptions & kSoftCap) != 0, kSkipping = (kOptions & kSkips) != 0;
  static constexpr bool kThreeStages = kDim <= 128;
  static constexpr int kPiece = 64;  // channels of a P V
  static constexpr int kPieces = kDim / kPiece;
  static constexpr int kSlabs = (kDim + 127) / 128;  // of 128 bytes of a row of Q and K
  static constexpr int kSlabBytes = kGroupRows * 128;
  static constexpr int kCodeBytes = kPage * kHalf, kScaleBytes = kPage * 4;
  static constexpr int kPackedBytes = 2 * (kCodeBytes + kScaleBytes);
  static constexpr int kPackedStages = kDim == 256 ? 3 : 4;
  static constexpr int kQueryBytes = 2 * kSlabs * kSlabBytes;
  static constexpr int kTileBytes = kPage * kDim;  // of a page's K, and of its V
  static constexpr int kPlaneBytes = 4 * kPage * 4;
  // Of values of head_dim 64 one warp unpacks every other page.
  static constexpr int kValueArrivals = kDim == 64 ? 1 : kValueWarps;
  static constexpr int kRowBytes = 3 * kTileQueries * 4, kBarrierBytes = 1024;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kPageStages * kTileBytes +
                                      kPackedStages * kPackedBytes + kPageStages * kPlaneBytes +
                                      kRowBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory does not suffice");
};

// A tile of queries, and pages [begin, end) that some of its rows see.
struct PrefillTile {
  int sequence, head;
  int start, tokens;   // of queries in q; tokens: up to tile_tokens, 0 where there are none
  int first_position;  // of the first one
  int kv_len, begin, end;
};

// Tiles have rows of 128 bytes. V^T [D, 64] fills half of them, and so does K of head_dim 64: two
// stages lie beside each other.
template <class C>
struct PrefillShared {
  char *queries, *keys, *values, *packed;
  float* planes;  // [kPageStages, 4, kPage]: of K scale and offset, of V weight and offset
  float *row_sum, *row_unit;  // [kTileQueries]
  int* row_position;          // [kTileQueries], of its token; -1: sees nothing
  float* back;                // [kBacks]: from P V to O, longer than the stage of K
  PrefillTile* tile;
  Barrier *packed_full, *packed_empty, *key_full, *key_empty, *value_full, *value_empty;
  QUANT_DEVICE explicit PrefillShared(char* base) {
    queries = base;
    keys = queries + C::kQueryBytes;
    values = keys + kPageStages * C::kTileBytes;
    packed = values + kPageStages * C::kTileBytes;
    planes = reinterpret_cast<float*>(packed + C::kPackedStages * C::kPackedBytes);
    row_sum = planes + kPageStages * 4 * kPage;
    row_unit = row_sum + kTileQueries;
    row_position = reinterpret_cast<int*>(row_unit + kTileQueries);
    back = row_unit + 2 * kTileQueries;
    tile = reinterpret_cast<PrefillTile*>(back + kBacks);
    packed_full = reinterpret_cast<Barrier*>(tile + 2);
    packed_empty = packed_full + C::kPackedStages;
    key_full = packed_empty + C::kPackedStages;
    key_empty = key_full + kPageStages;
    value_full = key_empty + kPageStages;
    value_empty = value_full + kPageStages;
  }
  QUANT_DEVICE char* key_tile(int stage) const {
    return C::kDim == 64 ? keys + stage / 2 * C::kSlabBytes : keys + stage * C::kTileBytes;
  }
  static QUANT_DEVICE int key_byte(int stage) { return C::kDim == 64 ? stage % 2 * 64 : 0; }
  QUANT_DEVICE char* value_tile(int stage) const { return values + stage / 2 * 2 * C::kTileBytes; }
  static QUANT_DEVICE int value_byte(int stage) { return stage % 2 * 64; }
};

QUANT_DEVICE PrefillTile prefill_tile(const PrefillParams& params, int block) {
  const AttentionParams& p = params.shared;
  PrefillTile tile{};
  tile.head = block % p.kv_heads;
  tile.sequence = block / p.kv_heads % p.batch;
  const int first = (params.tiles - 1 - block / p.kv_heads / p.batch) * params.tile_tokens;
  const int start = params.cu_seqlens[tile.sequence];
  const int left = params.cu_seqlens[tile.sequence + 1] - start - first;
  tile.kv_len = p.kv_lens[tile.sequence];
  tile.start = start + first;
  tile.tokens = left < params.tile_tokens ? (left < 0 ? 0 : left) : params.tile_tokens;
  tile.first_position = tile.kv_len - left;
  const int last = tile.first_position + tile.tokens - 1;
  tile.end = last < 0 ? 0 : last / kPage + 1;
  tile.begin = oldest_key(tile.first_position, p.window) / kPage;
  if (tile.begin > tile.end) tile.begin = tile.end;
  return tile;
}

template <class C>
QUANT_DEVICE void init_barriers(const PrefillShared<C>& shared) {
  for (int stage = 0; stage < C::kPackedStages; ++stage) {
    barrier_init(shared.packed_full + stage, 1);
    barrier_init(shared.packed_empty + stage, kKeyWarps + C::kValueArrivals);
  }
  for (int stage = 0; stage < kPageStages; ++stage) {
    barrier_init(shared.key_full + stage, kKeyWarps);
    barrier_init(shared.key_empty + stage, 2 * kGroupWarps);
    barrier_init(shared.value_full + stage, C::kValueArrivals);
    barrier_init(shared.value_empty + stage, 2 * kGroupWarps);
  }
  barrier_init_fence();
}

}  // namespace quant
