// Causal attention of prompts, or chunks of them, over the paged INT4 cache, on Hopper.
//
//     S_t = (s_t (Qc . q_t) + o_t sum(Qc)) a sm_scale log2(e),   M = ceil(max S),   p = 2^(S - M)
//     O   = (sum over pages of z / 256 sum_t E4M3(256 p_t s'_t / z) q'_t + sum_t p_t o'_t)
//           / sum_t p_t
//
// for keys s_t q_t + o_t and values s'_t q'_t + o'_t (quant_kernels/reference_attention.py). Codes
// are exact in E4M3, so both products are FP8 WGMMAs and no value is dequantized. A block has 128
// rows, tokens x query heads of one KV head, which share every page:
//
//     warps 0-3, 4-7   64 rows each
//     warps 8, 9       bulk copies of packed pages; K and scales to shared memory for MMAs
//     warps 10, 11     V likewise, transposed on the way: FP8 MMAs want both operands K-major
//
//     time     --------------------------------------------------------------->
//     copies   [  j+3  ][  j+4  ][  j+5  ]          packed pages, 3 or 4
//     unpack   [  j+1  ][  j+2  ][  j+3  ]          K and V^T in E4M3, 4
//     MMA      [ P V j-2 | Q K j ][ P V j-1 | Q K j+1 ]
//     softmax      [   j - 1   ]      [     j     ]
//     sum            [ j-2 ]            [ j-1 ]     O = O fade + part z / 256, in FP32
//
// Groups of MMAs end in the order of their issue: P V (j-2), Q K (j). The softmax of j - 1 waits
// until Q K (j-1) alone is done (two groups in flight), the sum until P V (j-2) is (one). With
// head_dim 256 registers suffice for one S: then Q K (j+1) runs beside P V (j), in pieces of 64
// channels, and the two warpgroups fill each other's gaps.
//
// P V starts at zero for every page: the accumulators of FP8 tensor cores have about 14 bits.
//
// Budget per page of 64 tokens, D = 128, per SM and clock: 4096 products, so the MMAs take 512
// clocks; 16 exponentials, so 8192 of them take 512; 128 lanes, so the 8 instructions for an S
// take 512, the sums of O 128, and unpacking 16384 codes at 1.4 to 1.7 instructions 200: about 900
// clocks of issue, which bound the kernel. Sums are scaled only where M has changed.
//
// Blocks start with the last tiles: for whole prompts, the longest first. A tile's pages that all
// rows see need no mask.
#pragma once

#include "cuda/attention_codes.cuh"
#include "cuda/prefill_layout.h"
#include "cuda/rows.cuh"

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

template <int kDim_>
struct PrefillConfig {
  static constexpr int kDim = kDim_, kHalf = kDim / 2;
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

// --- the producers: two warps for K, two for V ---
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

// --- the consumers: two warpgroups ---
template <class C>
struct PrefillConsumer {
  static constexpr int kScores = kPage / 2, kPart = C::kPiece / 2;
  using Score = float[kScores];
  using Part = float[kPart];
  using Operand = uint32_t[2][4];  // P of 32 slots each
  using Fade = float[2];           // of what was summed before a page

  const AttentionParams& p;
  const PrefillShared<C>& shared;
  const PrefillTile& tile;
  int group, thread;  // of the block, of the warpgroup
  int g, q;           // lane 4 g + q: rows g and g + 8 of the warp's 16
  float top[2], total[2], offsets[2];
  float sum[C::kDim / 2];

  QUANT_DEVICE PrefillConsumer(const AttentionParams& p, const PrefillShared<C>& shared,
                               const PrefillTile& tile, int group, int thread)
      : p(p),
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
      *reinterpret_cast<uint4*>(slab + swizzled_place(of_group, byte % 128)) = x;
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
      total[i] = offsets[i] = 0;
    }
    QUANT_UNROLL for (int i = 0; i < C::kDim / 2; ++i) sum[i] = 0;
  }

  // --- MMAs; n counts the tile's pages ---
  QUANT_DEVICE void multiply_keys(int n, Score& score) const {
    const int stage = stage_of(n);
    barrier_wait(shared.key_full + stage, parity_of(n));
    const Descriptor query = describe(shared.queries + group * C::kSlabs * C::kSlabBytes);
    const Descriptor key = advance(describe(shared.key_tile(stage)), shared.key_byte(stage));
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) mma_operand(score[i]);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < C::kDim / 32; ++step) {
      const int at = step / 4 * C::kSlabBytes + step % 4 * 32;
      mma<E4M3, kPage>(score, advance(query, at), advance(key, at), step > 0);
    }
    mma_commit();
  }
  QUANT_DEVICE void multiply_values(int n, int piece, const Operand& operand, Part& part) const {
    const int stage = stage_of(n);
    if (piece == 0) barrier_wait(shared.value_full + stage, parity_of(n));
    const Descriptor value = advance(describe(shared.value_tile(stage)),
                                     shared.value_byte(stage) + piece * C::kPiece * 128);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < 2; ++step) {
      mma<E4M3, C::kPiece>(part, operand[step], advance(value, 32 * step), step > 0);
    }
    mma_commit();
  }
  QUANT_DEVICE void give_back(Barrier* empty, int n) const {
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(empty + stage_of(n));
  }

  // --- pages [begin, end) of the tile's, those outside [whole, whole_end) masked ---
  struct Range {
    int begin, end, whole, whole_end;
    QUANT_DEVICE bool masked(int n) const { return n < whole || n >= whole_end; }
  };

  // --- softmax of a page: S to P, and M, l and sums of offsets go on ---
  struct Four {
    float x[4];
  };
  QUANT_DEVICE Four plane(int n, int which, int step, int h) const {
    const float* from = shared.planes + (stage_of(n) * 4 + which) * kPage;
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
        }
      }
    }
  }
  QUANT_DEVICE void raise_top(int n, const Range& range, Score& score, Fade& fade) {
    if (range.masked(n)) mask(tile.begin + n, score);
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      float largest = score[2 * i];
      QUANT_UNROLL for (int at = 1; at < 16; ++at) {
        largest = fmaxf(largest, score[at / 2 * 4 + 2 * i + at % 2]);
      }
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float now = fmaxf(top[i], ceilf(largest * shared.row_unit[row(i)]));
      fade[i] = exponential2(top[i] - now);
      top[i] = now;
      total[i] *= fade[i];
      offsets[i] *= fade[i];
    }
  }
  QUANT_DEVICE void exponentiate(int n, const Score& score, Operand& operand) {
    const float unit[2] = {shared.row_unit[row(0)], shared.row_unit[row(1)]};
    QUANT_UNROLL for (int at = 0; at < 4; ++at) {
      const Four weight = plane(n, 2, at / 2, at % 2), offset = plane(n, 3, at / 2, at % 2);
      QUANT_UNROLL for (int i = 0; i < 2; ++i) {
        float y[4];
        QUANT_UNROLL for (int b = 0; b < 4; ++b) {
          const float x = score[index(at / 2, at % 2, b, i)];
          const float one = exponential2(x * unit[i] - top[i]);
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
  QUANT_DEVICE void add(int n, int piece, const Fade& fade, Part& part) {
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) mma_operand(part[i]);
    float* to = sum + piece * kPart;
    const float back = shared.back[n & (kBacks - 1)];
    if (any_of_warp(fade[0] != 1 || fade[1] != 1)) {
      QUANT_UNROLL for (int i = 0; i < kPart; ++i) to[i] *= fade[i / 2 % 2];
    }
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) to[i] += part[i] * back;
  }
  // From piece `first` on, one after the other.
  QUANT_DEVICE void add_pieces(int n, int first, const Operand& operand, const Fade& fade,
                               Part& part) {
    QUANT_UNROLL for (int piece = 0; piece < C::kPieces; ++piece) {
      if (piece < first) continue;
      multiply_values(n, piece, operand, part);
      mma_wait<0>();
      add(n, piece, fade, part);
    }
    give_back(shared.value_empty, n);
  }

  struct Pipeline {
    Score product, score;  // Q K of a page; what the page before it has become
    Operand operand;
    Fade fade;
    Part part;
  };
  // Page n begins (there is none where kEnds), n - 1 becomes P, and n - 2 is added.
  template <bool kEnds>
  QUANT_DEVICE void advance_pages(int n, const Range& range, Pipeline& r) {
    Fade fade;
    multiply_values(n - 2, 0, r.operand, r.part);
    scale(n - 1, r.product, r.score);
    if constexpr (C::kPieces == 2) {
      mma_wait<0>();
      add(n - 2, 0, r.fade, r.part);
      multiply_values(n - 2, 1, r.operand, r.part);
    }
    if constexpr (!kEnds) multiply_keys(n, r.product);
    raise_top(n - 1, range, r.score, fade);
    mma_wait<kEnds ? 0 : 1>();
    add(n - 2, C::kPieces - 1, r.fade, r.part);
    give_back(shared.value_empty, n - 2);
    exponentiate(n - 1, r.score, r.operand);
    r.fade[0] = fade[0];
    r.fade[1] = fade[1];
    mma_wait<0>();
  }
  QUANT_DEVICE void three_stages(const Range& range) {
    Pipeline r;
    QUANT_UNROLL for (int i = 0; i < kScores; ++i) r.product[i] = 0;
    QUANT_UNROLL for (int i = 0; i < kPart; ++i) r.part[i] = 0;
    multiply_keys(range.begin, r.product);
    mma_wait<0>();
    scale(range.begin, r.product, r.score);
    raise_top(range.begin, range, r.score, r.fade);
    exponentiate(range.begin, r.score, r.operand);
    const int second = range.begin + 1;
    if (second < range.end) {
      multiply_keys(second, r.product);
      mma_wait<0>();
      for (int n = second + 1; n < range.end; ++n) advance_pages<false>(n, range, r);
      advance_pages<true>(range.end, range, r);
    }
    add_pieces(range.end - 1, 0, r.operand, r.fade, r.part);
  }
  // The same with one S: P V of a page beside Q K of the next.
  QUANT_DEVICE void two_stages(const Range& range) {
    Score score;
    Operand operand;
    Fade fade;
    Part part;
    multiply_keys(range.begin, score);
    mma_wait<0>();
    for (int n = range.begin; n < range.end; ++n) {
      scale(n, score, score);
      raise_top(n, range, score, fade);
      exponentiate(n, score, operand);
      if (n + 1 < range.end) multiply_keys(n + 1, score);
      add_pieces(n, 0, operand, fade, part);
    }
  }

  // Pages of the tile that no row of this warpgroup sees.
  QUANT_DEVICE void skip(int begin, int end) const {
    for (int n = begin; n < end; ++n) {
      barrier_wait(shared.key_full + stage_of(n), parity_of(n));
      barrier_wait(shared.value_full + stage_of(n), parity_of(n));
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

template <class C>
QUANT_DEVICE void prefill_body(const PrefillParams& params) {
  const PrefillShared<C> shared(shared_memory());
  previous_kernel_wait();
  if (thread_index() == 0) {
    *shared.tile = prefill_tile(params, block_index());
    init_barriers<C>(shared);
  }
  block_sync();
  const PrefillTile& tile = *shared.tile;
  if (tile.tokens == 0) return;
  const int warp = warp_index(), producer_warp = warp - kPrefillConsumers / 32;
  if (producer_warp >= 0) {
    registers_shrink<40>();
    PrefillProducer<C> producer{params.shared, shared, tile, producer_warp, thread_index() % 32, 0};
    if (producer_warp < kKeyWarps) {
      producer.run_keys();
    } else {
      producer.run_values();
    }
  } else {
    registers_grow<232>();
    PrefillConsumer<C>(params.shared, shared, tile, warp / kGroupWarps, thread_index()).run();
  }
}

template <class C>
QUANT_KERNEL(kPrefillThreads)
prefill_kernel(QUANT_GRID_CONSTANT PrefillParams params) {
  prefill_body<C>(params);
}

}  // namespace quant
