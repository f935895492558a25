// The pages that queries of a prefill see, unpacked once for all of its blocks, as the kernel ahead
// of it: an image of every page and KV head (prefill_layout.h) in the workspace. A block makes one,
// with the code that unpacks pages in the other prefill kernel; nothing is shared, so it waits for
// nobody.
//
// Images are written by threads and read by bulk copies, which are of another proxy: every thread
// fences what it wrote, this grid ends, blocks of the next one pass `previous_kernel_wait`, and the
// thread that copies fences again before it does. All blocks of this grid have begun when blocks of
// the next one may: none waits for room that these hold.
#pragma once

#include "cuda/prefill_unpack.cuh"

namespace quant {

constexpr int kExpandThreads = 32 * (kKeyWarps + kValueWarps);

template <int kDim>
QUANT_DEVICE void expand_body(const PrefillParams& params) {
  using C = PrefillConfig<kDim, kExpanded>;
  using Image = PageImage<kDim>;
  const AttentionParams& p = params.shared;
  next_kernel_start();
  previous_kernel_wait();
  const int head = block_index() % p.kv_heads, sequence = block_index() / p.kv_heads % p.batch;
  const int place = block_index() / p.kv_heads / p.batch;
  const int length = params.cu_seqlens[sequence + 1] - params.cu_seqlens[sequence];
  const int kv_len = p.kv_lens[sequence];
  const int page = oldest_key(kv_len - length, p.window) / kPage + place;
  if (length == 0 || page * kPage >= kv_len) return;
  const int64_t id = p.block_table[sequence * p.table_row + page];
  const int64_t row = (id * p.kv_heads + head) * kPage, of_values = row + p.value_rows;
  const char* codes = reinterpret_cast<const char*>(p.kv);
  const int64_t at = (int64_t{1} * sequence * p.kv_heads + head) * params.image_pages + place;
  char* image = params.images + at * Image::kBytes;
  const int warp = warp_index(), lane = thread_index() % 32;
  if (warp < kKeyWarps) {
    unpack_keys<C, Image::kKeyRow>(codes + row * C::kHalf, image, 0, thread_index());
    unpack_scales<C>(reinterpret_cast<const char*>(p.kv_scales + row),
                     reinterpret_cast<const char*>(p.kv_scales + of_values), kv_len - page * kPage,
                     reinterpret_cast<float*>(image + 2 * Image::kTileBytes), thread_index());
  } else {
    for (int round = warp - kKeyWarps; round < kDim / 64; round += kValueWarps) {
      unpack_values<C, Image::kValueRow>(codes + of_values * C::kHalf, image + Image::kTileBytes, 0,
                                         lane, round);
    }
  }
  fence_async_global();
}

template <int kDim>
QUANT_KERNEL_BESIDE(kExpandThreads, 8)
expand_kernel(QUANT_GRID_CONSTANT PrefillParams params) {
  expand_body<kDim>(params);
}

}  // namespace quant
