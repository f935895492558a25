// What a GEMM kernel is told. Shared by the kernels, their launcher and the simulator.
#pragma once

#include <cstdint>

#include "cuda/schedule.h"

namespace quant {

enum class Kind : int {
  int8_channel,   // HighNibble
  int8_group,     // TwoLevel
  fp8_channel,    // Raw: no code is -8
  fp8_channel_8,  // RawAll, any code
  lut,            // Lookup
  lut_8,          // LookupAll
  exact,          // Raw, and the groups' sums scaled in FP32
  exact_8,        // RawAll, likewise
};
constexpr int kKinds = 8;

constexpr int kTileRows = 128;      // of weights, a block (two warpgroups)
constexpr int kFragmentRows = 64;   // of weights, a warpgroup
constexpr int kBlockColumns = 128;  // of K, a stage
constexpr int kFragmentBytes = kFragmentRows * kBlockColumns / 2;
constexpr int kQuantizeThreads = 256, kQuantizeColumns = 16 * kQuantizeThreads;  // of a block

enum class Type : int { fp32, bf16, fp16 };

struct GemmParams {
  // codes [fragments, blocks, kFragmentBytes]; t [fragments, blocks, 128 / g, 64], bytes or BF16.
  const uint8_t* codes;
  const uint8_t* t;
  const float* c;        // [rows]
  const float* x_scale;  // [tokens], by stride
  const void* bias;      // [rows] or null
  const void* residual;  // [tokens, rows] or null
  void* out;             // [tokens, rows, or rows / 2 with silu_mul]
  int64_t x_scale_stride, residual_stride, out_stride;
  Type bias_type, residual_type, out_type;
  int tokens, rows, fragments;
  int silu_mul;  // a tile has 64 rows of the gate and 64 of up
  int vectors;   // rows come in fours, all aligned
  Schedule schedule;
  void* partials;   // [workers, kTileRows * tile tokens] sums, where tiles are split
  uint32_t* flags;  // [workers], zeros between launches
  // With silu_mul, or null: [tokens, fragments / 2], the largest `magnitude` that each row tile has
  // of a token, before the output's rounding.
  uint32_t* maxima;
};

// What the kernel behind a GEMM is told, that quantizes its output (quantize_kernel.cuh).
struct QuantizeParams {
  const void* h;           // [tokens, columns] of type T
  const uint32_t* maxima;  // [tokens, tiles]
  void* codes;             // [tokens, columns], E4M3 or INT8
  float* scale;            // [tokens]
  int64_t h_stride, codes_stride, scale_stride;
  int columns, tiles;
  int parts;  // blocks of a token
  int int8;
};

}  // namespace quant
