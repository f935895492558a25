// A GEMM kernel's sizes, its shared memory, and which rows a warpgroup multiplies.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/gemm_params.h"
#include "cuda/ring.cuh"

namespace quant {

constexpr int kConsumers = 256, kThreads = 384;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kSteps = kBlockColumns / 32;  // MMAs of K = 32 in a stage

// A kernel: how codes become operands, over groups of kGroup columns (kBlockColumns: of 128, or
// where there are none), kPromote: whose sums are scaled in FP32.
template <Kind kKind_, int kGroup_, int kTokens_, int kCluster_>
struct Config {
  static constexpr Kind kKind = kKind_;
  static constexpr int kGroup = kGroup_, kTokens = kTokens_, kCluster = kCluster_;
  static constexpr bool kPromote = kKind == Kind::exact || kKind == Kind::exact_8;
  static constexpr bool kTables = kKind == Kind::lut || kKind == Kind::lut_8;
  static constexpr bool kInt8 = kKind == Kind::int8_channel || kKind == Kind::int8_group;
  static constexpr bool kGrouped = kPromote || kTables || kKind == Kind::int8_group;
  static constexpr float kUnit = kKind == Kind::int8_channel ? HighNibble::kUnit
                                 : kInt8 || kTables          ? 1.0f
                                                             : Raw::kUnit;
  using Operand = std::conditional_t<kInt8, Int8, E4M3>;
  using Sum = typename Operand::Sum;

  // A wide tile's sums leave registers for the operands of half a stage at a time.
  static constexpr int kSlice = kTokens == 256 ? 2 : kSteps, kSlices = kSteps / kSlice;
  static constexpr int kStepsOfGroup = kGroup / 32;

  // Shared memory, from its start: X, codes, t of every stage, the epilogue's rows, tables,
  // barriers.
  static constexpr int kGroups = kBlockColumns / kGroup;
  static constexpr int kScaleBytes = kGrouped ? kFragmentRows * kGroups * (kPromote ? 2 : 1) : 0;
  static constexpr int kTokenBytes = kTokens * kBlockColumns;
  static constexpr int kStageBytes = kTokenBytes + 2 * (kFragmentBytes + kScaleBytes);
  static constexpr int kChunk = kTokens < 32 ? kTokens : 32;  // tokens of the epilogue at a time
  static constexpr int kPitch = kTileRows + 4;  // so that neither side meets a bank twice
  static constexpr int kEpilogueBytes = kChunk * kPitch * 4;
  static constexpr int kTableBytes = kTables ? 128 * 16 : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kFit =
      (kSharedBytes - kEpilogueBytes - kTableBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static_assert(kStages >= 4, "too few stages");
  static_assert(!kPromote || kTokens <= 128, "two accumulators do not fit");
};

template <class C>
struct Shared {
  char *tokens, *codes, *scales, *staging;
  uint4* tables;
  Barrier *full, *empty;
  QUANT_DEVICE explicit Shared(char* base) {
    tokens = base;
    codes = tokens + C::kStages * C::kTokenBytes;
    scales = codes + C::kStages * 2 * kFragmentBytes;
    staging = scales + C::kStages * 2 * C::kScaleBytes;
    tables = reinterpret_cast<uint4*>(staging + C::kEpilogueBytes);
    full = reinterpret_cast<Barrier*>(staging + C::kEpilogueBytes + C::kTableBytes);
    empty = full + C::kStages;
  }
};

// The 64 rows of weights that a warpgroup of a tile multiplies.
QUANT_DEVICE int fragment_of(const GemmParams& p, int row_tile, int warpgroup) {
  const int half = p.fragments / 2;
  const int index = p.silu_mul ? row_tile + warpgroup * half : 2 * row_tile + warpgroup;
  // The last tile may have one fragment too many: it computes, and stores nothing.
  return index < p.fragments ? index : p.fragments - 1;
}

}  // namespace quant
