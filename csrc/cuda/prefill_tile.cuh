// What a block of prefill attention works on: its tile of queries, and its shared memory.
#pragma once

#include "cuda/attention_codes.cuh"
#include "cuda/prefill_layout.h"

namespace quant {

constexpr int kPrefillConsumers = 256, kPrefillThreads = 384;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroupWarps = 4;
constexpr int kKeyWarps = 2, kValueWarps = 2;
constexpr int kTileStages = 2;

template <int kDim_, int kOptions = kPlain>
struct PrefillConfig {
  static constexpr int kDim = kDim_, kHalf = kDim / 2;
  static constexpr bool kCaps = (kOptions & kSoftCap) != 0, kSkipping = (kOptions & kSkips) != 0;
  static constexpr bool kUnpacks = (kOptions & kExpanded) == 0;
  static constexpr bool kThreeStages = kDim <= 128;
  static constexpr bool kQueriesInRegisters = kDim <= 128;
  static constexpr int kPiece = 64;  // channels of a P V
  static constexpr int kPieces = kDim / kPiece;
  static constexpr int kSlabs = (kDim + 127) / 128;  // of 128 bytes of a row of Q and K
  static constexpr int kSlabBytes = kGroupRows * 128;
  static constexpr int kQueryBytes = 2 * kSlabs * kSlabBytes;
  using Image = PageImage<kDim>;
  static constexpr int kTileBytes = Image::kTileBytes;  // of a page's K, and of its V
  // Of unpacked pages: a power of two. A stage is an image, or a part of each of three regions.
  static constexpr int kStageBits = kUnpacks || kDim == 256 ? 2 : 3, kStages = 1 << kStageBits;
  static constexpr int kImageStage = (Image::kBytes + 1023) / 1024 * 1024;
  static constexpr int kTileStage = kUnpacks ? kTileBytes : kImageStage;
  static constexpr int kPlaneStage = kUnpacks ? Image::kPlaneBytes : kImageStage;
  static constexpr int kStageBytes = kUnpacks ? Image::kBytes : kImageStage;
  static constexpr int kKeyRow = kUnpacks ? 128 : Image::kKeyRow;
  static constexpr int kValueRow = kUnpacks ? 128 : Image::kValueRow;
  // Packed pages.
  static constexpr int kCodeBytes = kPage * kHalf, kScaleBytes = kPage * 4;
  static constexpr int kPackedBytes = 2 * (kCodeBytes + kScaleBytes);
  static constexpr int kPackedStages = !kUnpacks ? 0 : kDim == 256 ? 3 : 4;
  // Of values of head_dim 64 one warp unpacks every other page.
  static constexpr int kValueArrivals = kDim == 64 ? 1 : kValueWarps;
  static constexpr int kRowBytes = 3 * kTileQueries * 4, kBarrierBytes = 1024;
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes +
                                      kPackedStages * kPackedBytes + kRowBytes + kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "shared memory does not suffice");

  // Of a page of the tile, counted from its first.
  static QUANT_DEVICE int stage_of(int n) { return n & (kStages - 1); }
  static QUANT_DEVICE int parity_of(int n) { return n >> kStageBits & 1; }
};

// A tile of queries, and pages [begin, end) of its sequence that some of its rows see.
struct PrefillTile {
  int sequence, head;
  int start, tokens;   // of queries in q; tokens: up to tile_tokens, 0 where there are none
  int first_position;  // of the first one
  int kv_len, begin, end;
  int first_page;  // that a query of the sequence sees
};

// Tiles of K and V^T. Where they are unpacked, rows have 128 bytes; V^T [D, 64] fills half of them,
// and so does K of head_dim 64: two stages lie beside each other. Where they come expanded, they
// are PageImage's.
template <class C>
struct PrefillShared {
  char *queries, *keys, *values, *packed, *planes;
  float *row_sum, *row_unit;  // [kTileQueries]
  int* row_position;          // [kTileQueries], of its token; -1: sees nothing
  PrefillTile* tile;          // [kTileStages]
  // Of expanded pages key_full stands for the whole image, and value_empty too.
  Barrier *packed_full, *packed_empty, *key_full, *key_empty, *value_full, *value_empty;
  Barrier *tile_full, *tile_empty;
  QUANT_DEVICE explicit PrefillShared(char* base) {
    queries = base;
    keys = queries + C::kQueryBytes;
    values = keys + (C::kUnpacks ? C::kStages : 1) * C::kTileBytes;
    planes = values + (C::kUnpacks ? C::kStages : 1) * C::kTileBytes;
    packed = keys + C::kStages * C::kStageBytes;
    row_sum = reinterpret_cast<float*>(packed + C::kPackedStages * C::kPackedBytes);
    row_unit = row_sum + kTileQueries;
    row_position = reinterpret_cast<int*>(row_unit + kTileQueries);
    tile = reinterpret_cast<PrefillTile*>(row_position + kTileQueries);
    key_full = reinterpret_cast<Barrier*>(tile + kTileStages);
    key_empty = key_full + C::kStages;
    value_full = key_empty + C::kStages;
    value_empty = value_full + C::kStages;
    packed_full = value_empty + C::kStages;
    packed_empty = packed_full + C::kPackedStages;
    tile_full = packed_empty + C::kPackedStages;
    tile_empty = tile_full + kTileStages;
  }
  // Where a stage's tiles are in those of all stages, and its bytes in their rows.
  static constexpr bool kKeysInPairs = C::kUnpacks && C::kDim == 64;
  static QUANT_DEVICE int key_tile(int stage) {
    return kKeysInPairs ? (stage >> 1) * C::kSlabBytes : stage * C::kTileStage;
  }
  static QUANT_DEVICE int key_byte(int stage) { return kKeysInPairs ? (stage & 1) * 64 : 0; }
  static QUANT_DEVICE int value_tile(int stage) {
    return C::kUnpacks ? (stage >> 1) * 2 * C::kTileStage : stage * C::kTileStage;
  }
  static QUANT_DEVICE int value_byte(int stage) { return C::kUnpacks ? (stage & 1) * 64 : 0; }
  // As PageImage says.
  QUANT_DEVICE float* plane(int stage) const {
    return reinterpret_cast<float*>(planes + stage * C::kPlaneStage);
  }
};

QUANT_DEVICE PrefillTile prefill_tile(const PrefillParams& params, int sequence, int head,
                                      int index) {
  const AttentionParams& p = params.shared;
  PrefillTile tile{};
  tile.sequence = sequence;
  tile.head = head;
  const int first = index * params.tile_tokens;
  const int start = params.cu_seqlens[tile.sequence];
  const int length = params.cu_seqlens[tile.sequence + 1] - start, left = length - first;
  tile.kv_len = p.kv_lens[tile.sequence];
  tile.start = start + first;
  tile.tokens = left < params.tile_tokens ? (left < 0 ? 0 : left) : params.tile_tokens;
  tile.first_position = tile.kv_len - left;
  const int last = tile.first_position + tile.tokens - 1;
  tile.end = last < 0 ? 0 : last / kPage + 1;
  tile.begin = oldest_key(tile.first_position, p.window) / kPage;
  if (tile.begin > tile.end) tile.begin = tile.end;
  tile.first_page = oldest_key(tile.kv_len - length, p.window) / kPage;
  return tile;
}
// Of a block that has one tile.
QUANT_DEVICE PrefillTile prefill_tile(const PrefillParams& params, int block) {
  const int heads = params.shared.kv_heads, batch = params.shared.batch;
  return prefill_tile(params, block / heads % batch, block % heads,
                      params.tiles - 1 - block / heads / batch);
}

template <class C>
QUANT_DEVICE void init_barriers(const PrefillShared<C>& shared) {
  constexpr int kLoads = 1;  // a bulk copy's issuer, who arrives with its bytes
  for (int stage = 0; stage < C::kStages; ++stage) {
    barrier_init(shared.key_full + stage, C::kUnpacks ? kKeyWarps : kLoads);
    barrier_init(shared.key_empty + stage, 2 * kGroupWarps);
    barrier_init(shared.value_full + stage, C::kUnpacks ? C::kValueArrivals : kLoads);
    barrier_init(shared.value_empty + stage, 2 * kGroupWarps);
  }
  for (int stage = 0; stage < C::kPackedStages; ++stage) {
    barrier_init(shared.packed_full + stage, kLoads);
    barrier_init(shared.packed_empty + stage, kKeyWarps + C::kValueArrivals);
  }
  for (int stage = 0; stage < kTileStages; ++stage) {
    barrier_init(shared.tile_full + stage, 1);
    barrier_init(shared.tile_empty + stage, 2 * kGroupWarps);
  }
  barrier_init_fence();
}

}  // namespace quant
