// Sizes of the decode kernels, and how many blocks of one a multiprocessor holds.
#pragma once

#include "cuda/attention_params.h"

namespace quant {

constexpr int kDecodeWarps = 4, kDecodeConsumers = 32 * kDecodeWarps;
constexpr int kDecodeThreads = kDecodeConsumers + 32;
constexpr int kWarpTokens = kPage / kDecodeWarps;
constexpr int kAllShared = 227 * 1024;

// Of kHeadBlocks times 8 query heads of a KV head.
template <int kDim_, int kHeadBlocks_, int kOptions = kPlain>
struct DecodeConfig {
  static constexpr int kDim = kDim_, kHalf = kDim / 2;
  static constexpr bool kCaps = (kOptions & kSoftCap) != 0;
  static constexpr int kHeadBlocks = kHeadBlocks_, kHeads = 8 * kHeadBlocks;
  static constexpr int kBlocks = kDim / 16;             // MMAs over D
  static constexpr int kVector = kDim >= 128 ? 16 : 8;  // bytes of a row that a load takes
  static constexpr int kCodeBytes = kPage * kHalf, kScaleBytes = kPage * 4;
  static constexpr int kStageBytes = 2 * (kCodeBytes + kScaleBytes);
  static constexpr int kStages = kDim == 64 ? 8 : kDim == 128 ? 6 : 4;
  static constexpr int kPitch = kDim + 4;  // of a row of sums, with M and l behind them
  static constexpr int kSumBytes = kDecodeWarps * kHeads * kPitch * 4;
  static constexpr int kRowBytes = kDecodeWarps * 2 * kHeads * 4;
  static constexpr int kBarrierBytes = 512;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kSumBytes + kMostSequences * 4 + kRowBytes + kBarrierBytes;
  static constexpr int kFit = kAllShared / (kSharedBytes + 1024);
  static constexpr int kBlocksPerSm = kFit < 4 ? kFit : 4;
};

// 0 where there is no kernel.
constexpr int decode_blocks(int heads, int kv_heads, int head_dim) {
  const int ratio = kv_heads > 0 ? heads / kv_heads : 0;
  if (ratio < 1 || ratio > kMostHeadsOfGroup) return 0;
  const bool few = ratio <= 8;
  switch (head_dim) {
    case 64:
      return few ? DecodeConfig<64, 1>::kBlocksPerSm : DecodeConfig<64, 2>::kBlocksPerSm;
    case 128:
      return few ? DecodeConfig<128, 1>::kBlocksPerSm : DecodeConfig<128, 2>::kBlocksPerSm;
    case 256:
      return few ? DecodeConfig<256, 1>::kBlocksPerSm : DecodeConfig<256, 2>::kBlocksPerSm;
    default:
      return 0;
  }
}

}  // namespace quant
