// What the attention kernels are told. Shared by the kernels, their launcher and the simulator.
#pragma once

#include <cstdint>

#include "cuda/decode_schedule.h"
#include "cuda/gemm_params.h"

namespace quant {

constexpr int kTileQueries = 128;      // rows of a prefill block: tokens x heads of a KV head
constexpr int kMostSequences = 1024;   // of a decode step
constexpr int kMostHeadsOfGroup = 16;  // query heads of a KV head, in decode

// What an instance of a kernel does on top: bits of its config's kOptions.
constexpr int kPlain = 0, kSoftCap = 1, kSkips = 2, kExpanded = 4;

// The paged cache of quant_kernels/packing.py, and the queries over it.
struct AttentionParams {
  const uint8_t* q;           // [tokens, heads, D] E4M3
  const float* q_scale;       // [tokens, heads]
  const uint8_t* kv;          // [2, pages, kv_heads, kPage, D / 2]
  const uint32_t* kv_scales;  // [2, pages, kv_heads, kPage]: scale and offset, FP16
  const int* block_table;     // [batch, ...]
  const int* kv_lens;         // [batch]
  void* out;                  // [tokens, heads, D]
  int64_t q_token, q_head, q_scale_token, table_row, out_token, out_head;  // strides, elements
  int64_t value_rows;  // rows of a token and KV head, from a key to its value
  float scale;         // of scores, with log2(e); of kSoftCap: 2 log2(e) / cap more than sm_scale
  int window;          // 0: none
  int batch, kv_heads, ratio;
  Type out_type;
  float cap;  // of scores, with log2(e); for kSoftCap
};

struct PrefillParams {
  AttentionParams shared;
  const int* cu_seqlens;  // [batch + 1]
  int tile_tokens;        // kTileQueries / ratio
  int tiles;              // of the longest chunk
  float negligible;       // how far below M scores are left out; for kSkips
  char* images;           // [batch, kv_heads, image_pages] of PageImage; for kExpanded
  int image_pages;        // of a sequence at most, from the first that one of its queries sees
  int workers;            // blocks; for kExpanded
};

struct DecodeParams {
  AttentionParams shared;
  float* partials;  // [workers, ratio, D + 4]: sums, then M and l
  uint32_t* flags;  // [workers], zeros between launches
  int workers;
};

}  // namespace quant
