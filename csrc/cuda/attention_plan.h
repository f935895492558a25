// From a caller's arguments to the attention kernels', and whether they take them: on a host
// without a GPU.
#pragma once

#include "cuda/attention_params.h"
#include "cuda/decode_config.h"
#include "cuda/gemm_plan.h"
#include "cuda/prefill_layout.h"
#include "quant_cuda.h"

namespace quant {

constexpr float kLog2E = 1.4426950408889634f;

constexpr bool has_attention(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

// Finite, and 0 or more.
constexpr bool is_option(float x) { return x >= 0 && x < 1e30f; }

inline int check(const QuantCudaAttention& a) {
  if (!has_attention(a.head_dim)) return QUANT_CUDA_NO_KERNEL;
  constexpr int kMost = 1 << 20;
  const bool positive = a.batch > 0 && a.heads > 0 && a.kv_heads > 0 && a.pages >= 0;
  if (!positive || a.batch > kMost || a.heads > kMost || a.heads % a.kv_heads != 0 ||
      a.window < 0 || !(a.sm_scale > 0) || !is_option(a.soft_cap) || a.out_type < QUANT_CUDA_FP32 ||
      a.out_type > QUANT_CUDA_FP16) {
    return QUANT_CUDA_BAD_SHAPE;
  }
  if (!a.q || !a.q_scale || !a.kv_codes || !a.kv_scales || !a.block_table || !a.kv_lens || !a.out) {
    return QUANT_CUDA_NULL_POINTER;
  }
  const int64_t four = a.out_type == QUANT_CUDA_FP32 ? 16 : 8;
  const bool queries = aligned(a.q, 16) && a.q_token % 16 == 0 && a.q_head % 16 == 0;
  const bool output = aligned(a.out, four) && a.out_token % 4 == 0 && a.out_head % 4 == 0;
  const bool cache = aligned(a.kv_codes, 16) && aligned(a.kv_scales, 16);
  return queries && output && cache ? QUANT_CUDA_OK : QUANT_CUDA_BAD_ALIGNMENT;
}
inline int64_t tiles_of(const QuantCudaPrefill& prefill) {
  const int64_t tokens = kTileQueries / (prefill.attention.heads / prefill.attention.kv_heads);
  return (prefill.max_query_len + tokens - 1) / tokens;
}
// Pages of a sequence that its queries see, at most.
inline int image_pages(const QuantCudaPrefill& prefill) {
  const int64_t keys = int64_t{1} * prefill.attention.window + prefill.max_query_len - 1;
  const int64_t pages = (keys + kPage - 2) / kPage + 1;
  const bool all = prefill.attention.window == 0 || pages > prefill.table_pages;
  return all ? prefill.table_pages : static_cast<int>(pages);
}
inline int64_t images(const QuantCudaPrefill& prefill) {
  return int64_t{1} * prefill.attention.batch * prefill.attention.kv_heads * image_pages(prefill);
}
constexpr int64_t image_bytes(int head_dim) {
  return head_dim == 64    ? PageImage<64>::kBytes
         : head_dim == 128 ? PageImage<128>::kBytes
                           : PageImage<256>::kBytes;
}
inline int64_t prefill_workspace(const QuantCudaPrefill& prefill) {
  return images(prefill) * image_bytes(prefill.attention.head_dim);
}
// In clocks of a multiprocessor, estimated and not yet measured: what a block saves with a page
// that it need not unpack (prefill_kernel.cuh), what memory takes for an image's 17 KB written and
// 9 KB read, both at D = 128, and how long the launch of a kernel more is.
constexpr int64_t kUnpackClocks = 240, kImageClocks = 2000, kLaunchClocks = 5000;
constexpr int64_t kMostImageBytes = 256 << 20;  // 120000 tokens of eight heads of 128
// After `check`.
inline bool gains(const QuantCudaPrefill& prefill) {
  const QuantCudaAttention& a = prefill.attention;
  // Twice the tiles that see a page: of a prompt half of all, of a chunk behind many keys all.
  const int64_t length = prefill.max_query_len, keys = int64_t{1} * prefill.table_pages * kPage;
  const int64_t total = keys > length ? keys : length;
  const int64_t of_all = tiles_of(prefill) * (2 * total - length) / total;
  const int64_t of_window = 2 * (a.window / (kTileQueries / (a.heads / a.kv_heads)) + 1);
  const int64_t readers = a.window > 0 && of_window < of_all ? of_window : of_all;
  const int64_t saved = images(prefill) * (kUnpackClocks * readers / 2 - kImageClocks);
  return saved * a.head_dim / 128 >= kLaunchClocks * prefill.workers &&
         prefill_workspace(prefill) <= kMostImageBytes;
}
inline int check(const QuantCudaPrefill& prefill) {
  const QuantCudaAttention& a = prefill.attention;
  if (const int status = check(a)) return status;
  if (a.heads / a.kv_heads > kTileQueries) return QUANT_CUDA_NO_KERNEL;
  if (prefill.max_query_len < 1 || !is_option(prefill.skip_threshold)) return QUANT_CUDA_BAD_SHAPE;
  if (!prefill.cu_seqlens) return QUANT_CUDA_NULL_POINTER;
  if (tiles_of(prefill) * a.batch * a.kv_heads > INT32_MAX) return QUANT_CUDA_BAD_SHAPE;
  if (!prefill.workspace) return QUANT_CUDA_OK;
  if (prefill.table_pages < 1 || prefill.workers < 1) return QUANT_CUDA_BAD_SHAPE;
  if (images(prefill) > INT32_MAX) return QUANT_CUDA_BAD_SHAPE;
  if (!aligned(prefill.workspace, 16)) return QUANT_CUDA_BAD_ALIGNMENT;
  return prefill.workspace_bytes < prefill_workspace(prefill) ? QUANT_CUDA_SMALL_WORKSPACE
                                                              : QUANT_CUDA_OK;
}
// Rows of D sums, M and l: one worker publishes at most one segment.
inline int64_t decode_workspace(const QuantCudaDecode& d) {
  const QuantCudaAttention& a = d.attention;
  return int64_t{4} * d.workers * (a.heads / a.kv_heads) * (a.head_dim + 4);
}
inline int check(const QuantCudaDecode& d) {
  const QuantCudaAttention& a = d.attention;
  if (const int status = check(a)) return status;
  if (decode_blocks(a.heads, a.kv_heads, a.head_dim) == 0 || a.batch > kMostSequences) {
    return QUANT_CUDA_NO_KERNEL;
  }
  if (d.workers < 1 || d.workers > kMostFlags) return QUANT_CUDA_BAD_SHAPE;
  if (!d.workspace) return QUANT_CUDA_NULL_POINTER;
  if (!aligned(d.workspace, 16)) return QUANT_CUDA_BAD_ALIGNMENT;
  return d.workspace_bytes < decode_workspace(d) ? QUANT_CUDA_SMALL_WORKSPACE : QUANT_CUDA_OK;
}

// Of the kernel for these arguments.
inline int options(const QuantCudaPrefill& prefill) {
  return (prefill.attention.soft_cap > 0 ? kSoftCap : kPlain) |
         (prefill.skip_threshold > 0 ? kSkips : kPlain) |
         (prefill.workspace != nullptr ? kExpanded : kPlain);
}
inline int options(const QuantCudaDecode& d) {
  return d.attention.soft_cap > 0 ? kSoftCap : kPlain;
}

// After `check`.
inline AttentionParams plan(const QuantCudaAttention& a) {
  AttentionParams p{};
  p.q = static_cast<const uint8_t*>(a.q);
  p.q_scale = a.q_scale;
  p.kv = static_cast<const uint8_t*>(a.kv_codes);
  p.kv_scales = static_cast<const uint32_t*>(a.kv_scales);
  p.block_table = a.block_table;
  p.kv_lens = a.kv_lens;
  p.out = a.out;
  p.q_token = a.q_token;
  p.q_head = a.q_head;
  p.q_scale_token = a.q_scale_token;
  p.table_row = a.table_row;
  p.out_token = a.out_token;
  p.out_head = a.out_head;
  p.value_rows = a.pages * a.kv_heads * kPage;
  p.scale = a.sm_scale * kLog2E;
  p.cap = a.soft_cap * kLog2E;
  if (a.soft_cap > 0) p.scale *= 2 / a.soft_cap;  // tanh(x) is of 2^(2 log2(e) x)
  p.window = a.window;
  p.batch = a.batch;
  p.kv_heads = a.kv_heads;
  p.ratio = a.heads / a.kv_heads;
  p.out_type = static_cast<Type>(a.out_type);
  return p;
}
inline PrefillParams plan(const QuantCudaPrefill& prefill) {
  PrefillParams p{};
  p.shared = plan(prefill.attention);
  p.cu_seqlens = prefill.cu_seqlens;
  p.tile_tokens = kTileQueries / p.shared.ratio;
  p.tiles = ceil_div(prefill.max_query_len, p.tile_tokens);
  p.images = static_cast<char*>(prefill.workspace);
  p.image_pages = image_pages(prefill);
  p.workers = prefill.workers;
  p.negligible = prefill.skip_threshold + 1;  // M is less than 1 above the largest score
  return p;
}
inline int prefill_blocks(const PrefillParams& p) {
  const int tiles = p.tiles * p.shared.batch * p.shared.kv_heads;
  return p.images != nullptr && p.workers < tiles ? p.workers : tiles;
}
inline int expand_blocks(const PrefillParams& p) {
  return p.shared.batch * p.shared.kv_heads * p.image_pages;
}
inline DecodeParams plan(const QuantCudaDecode& d, uint32_t* flags) {
  DecodeParams p{};
  p.shared = plan(d.attention);
  p.partials = static_cast<float*>(d.workspace);
  p.flags = flags;
  p.workers = d.workers;
  return p;
}

}  // namespace quant
