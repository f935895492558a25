// From a caller's arguments to a kernel's, and whether a kernel takes them: on a host without a
// GPU.
#pragma once

#include "cuda/gemm_params.h"
#include "quant_cuda.h"

namespace quant {

constexpr int64_t kMostTokens = int64_t{1} << 24, kMostRows = 1 << 24, kMostColumns = 1 << 20;
constexpr int kMostWorkers = 160;  // blocks of a launch: Hoppers have 132 multiprocessors at most
constexpr int64_t kMostBlocks = 0x7FFFFFFF;  // of a grid

// Kinds without groups are listed at 128. Sums of exact take a second accumulator, so 128 tokens
// at most; clusters share X, which is worth it from 64 tokens on.
constexpr bool has_kernel(int kind, int group, int tokens, int cluster) {
  const bool known = kind >= 0 && kind < kKinds;
  const bool grouped = kind == QUANT_CUDA_INT8_GROUP || kind >= QUANT_CUDA_LUT;
  const bool promoted = kind >= QUANT_CUDA_EXACT;
  const int widest = promoted ? 128 : 256;
  const bool of_group = group == 128 || (grouped && (group == 64 || group == 32));
  const bool of_tokens =
      tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128 || tokens == 256;
  const bool of_cluster =
      cluster == 1 || (cluster == 2 && (tokens == widest || (group == 128 && tokens >= 64)));
  return known && of_group && of_tokens && tokens <= widest && of_cluster;
}

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}
inline int64_t partial_bytes(const QuantCudaGemm& g) {
  return g.split ? int64_t{4} * g.workers * g.cluster * kTileRows * g.tile_tokens : 0;
}
inline int64_t workspace_bytes(const QuantCudaGemm& g) {
  return partial_bytes(g) + (g.out_codes ? int64_t{4} * g.tokens * (g.rows / kTileRows) : 0);
}
inline int64_t quantize_blocks(const QuantCudaGemm& g) {
  return g.tokens * ceil_div(g.rows / 2, kQuantizeColumns);
}

inline int check(const QuantCudaGemm& g) {
  if (!has_kernel(g.kind, g.group_size, g.tile_tokens, g.cluster)) return QUANT_CUDA_NO_KERNEL;
  const bool positive = g.tokens > 0 && g.rows > 0 && g.columns > 0;
  const bool small = g.tokens <= kMostTokens && g.rows <= kMostRows && g.columns <= kMostColumns;
  const bool grouped = g.kind == QUANT_CUDA_INT8_GROUP || g.kind >= QUANT_CUDA_LUT;
  const bool whole = g.columns % (grouped ? g.group_size : 16) == 0;  // groups; rows of X
  if (!positive || !small || !whole) return QUANT_CUDA_BAD_SHAPE;
  if (g.silu_mul && (g.rows % (2 * kFragmentRows) != 0 || g.residual != nullptr)) {
    return QUANT_CUDA_BAD_SHAPE;
  }
  if (g.out_codes && (!g.silu_mul || quantize_blocks(g) > kMostBlocks)) return QUANT_CUDA_BAD_SHAPE;
  const auto type = [](int value) { return value >= QUANT_CUDA_FP32 && value <= QUANT_CUDA_FP16; };
  if (!type(g.out_type) || !type(g.bias_type) || !type(g.residual_type))
    return QUANT_CUDA_BAD_SHAPE;
  if (g.out_codes_type != QUANT_CUDA_E4M3 && g.out_codes_type != QUANT_CUDA_INT8) {
    return QUANT_CUDA_BAD_SHAPE;
  }
  const bool many = g.workers * g.cluster > kMostWorkers;
  if (g.workers < 1 || many || (g.split && g.tile_tokens > 128)) return QUANT_CUDA_NO_KERNEL;
  if (!g.x || !g.x_scale || !g.codes || (grouped && !g.t) || !g.c || !g.out) {
    return QUANT_CUDA_NULL_POINTER;
  }
  if (!g.out_codes != !g.out_scale) return QUANT_CUDA_NULL_POINTER;
  if (workspace_bytes(g) > 0 && !g.workspace) return QUANT_CUDA_NULL_POINTER;
  if (!aligned(g.x, 16) || g.x_stride % 16 != 0 || g.x_stride < g.columns ||
      !aligned(g.codes, 16) || (grouped && !aligned(g.t, 16)) || !aligned(g.workspace, 16)) {
    return QUANT_CUDA_BAD_ALIGNMENT;
  }
  if (g.out_codes && (!aligned(g.out, 16) || g.out_stride % 16 != 0 || !aligned(g.out_codes, 16) ||
                      g.out_codes_stride % 16 != 0)) {
    return QUANT_CUDA_BAD_ALIGNMENT;
  }
  return g.workspace_bytes < workspace_bytes(g) ? QUANT_CUDA_SMALL_WORKSPACE : QUANT_CUDA_OK;
}

// After `check`. Rows come in fours, aligned, where every address and stride allows it.
inline GemmParams plan(const QuantCudaGemm& g, uint32_t* flags) {
  constexpr int64_t kSizes[] = {4, 2, 2};
  const int64_t outputs = g.silu_mul ? g.rows / 2 : g.rows;
  const auto fours = [&](const void* pointer, int type, int64_t stride) {
    return pointer == nullptr || (aligned(pointer, 4 * kSizes[type]) && stride % 4 == 0);
  };
  GemmParams p{};
  p.codes = static_cast<const uint8_t*>(g.codes);
  p.t = static_cast<const uint8_t*>(g.t);
  p.c = g.c;
  p.x_scale = g.x_scale;
  p.bias = g.bias;
  p.residual = g.residual;
  p.out = g.out;
  p.x_scale_stride = g.x_scale_stride;
  p.residual_stride = g.residual_stride;
  p.out_stride = g.out_stride;
  p.bias_type = static_cast<Type>(g.bias_type);
  p.residual_type = static_cast<Type>(g.residual_type);
  p.out_type = static_cast<Type>(g.out_type);
  p.tokens = static_cast<int>(g.tokens);
  p.rows = static_cast<int>(g.rows);
  p.fragments = ceil_div(g.rows, kFragmentRows);
  p.silu_mul = g.silu_mul;
  p.vectors = fours(g.out, g.out_type, g.out_stride) && fours(g.bias, g.bias_type, 0) &&
              fours(g.residual, g.residual_type, g.residual_stride) && aligned(g.c, 16) &&
              outputs % 4 == 0;
  p.schedule = {ceil_div(outputs, (g.silu_mul ? kFragmentRows : kTileRows) * g.cluster),
                ceil_div(g.tokens, g.tile_tokens), ceil_div(g.columns, kBlockColumns), g.workers,
                g.split};
  // A worker without units would be waited for.
  if (p.schedule.workers > p.schedule.units()) {
    p.schedule.workers = static_cast<int>(p.schedule.units());
  }
  if (!g.split && p.schedule.workers > p.schedule.tiles()) p.schedule.workers = p.schedule.tiles();
  p.partials = g.workspace;
  p.flags = flags;
  if (g.out_codes != nullptr) {
    p.maxima = reinterpret_cast<uint32_t*>(static_cast<char*>(g.workspace) + partial_bytes(g));
  }
  return p;
}

// After `plan`, where the output is quantized.
inline QuantizeParams plan_quantize(const QuantCudaGemm& g, const GemmParams& p) {
  QuantizeParams q{};
  q.h = g.out;
  q.maxima = p.maxima;
  q.codes = g.out_codes;
  q.scale = g.out_scale;
  q.h_stride = g.out_stride;
  q.codes_stride = g.out_codes_stride;
  q.scale_stride = g.out_scale_stride;
  q.columns = p.rows / 2;
  q.tiles = p.fragments / 2;
  q.parts = ceil_div(q.columns, kQuantizeColumns);
  q.int8 = g.out_codes_type == QUANT_CUDA_INT8;
  return q;
}

}  // namespace quant
