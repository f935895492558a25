// h [M, F], which a GEMM has stored, to codes and a scale a token, as the kernel behind it:
//
//     a[m] = max_f |h[m, f]| / L,   codes[m, f] = round(h[m, f] / a[m]),   L = 448 or 127
//
// in the bits of quant_kernels/reference.py; a token of zeros has a = 1. The GEMM leaves a maximum
// for every 64 numbers of a token (GemmParams::maxima), so h is read once, and by many blocks a
// token. A maximum a token by atomics would have to start at zero, in memory that other ops use
// between two calls; these are all written before they are read, in every launch and replay.
#pragma once

#include "cuda/bits.cuh"
#include "cuda/gemm_params.h"

namespace quant {

// The largest of a token's maxima, in every lane: of up to 256 all are under way at once.
QUANT_DEVICE uint32_t largest_of(const uint32_t* maxima, int tiles) {
  constexpr int kAtOnce = 8;
  uint32_t top = 0;
  for (int tile = thread_index() % 32; tile < tiles; tile += 32 * kAtOnce) {
    uint32_t found[kAtOnce];
    QUANT_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      found[i] = tile + 32 * i < tiles ? maxima[tile + 32 * i] : 0;
    }
    QUANT_UNROLL for (int i = 0; i < kAtOnce; ++i) top = larger(top, found[i]);
  }
  QUANT_UNROLL for (int mask = 16; mask > 0; mask /= 2) top = larger(top, shuffle_xor(top, mask));
  return top;
}

// Four codes, the first in the lowest byte. A NaN among INT8's is 0: the scale says that it was
// one.
QUANT_DEVICE uint32_t codes_of(const float (&q)[4], bool int8) {
  if (!int8) return to_e4m3(q[0], q[1], q[2], q[3]);
  uint32_t word = 0;
  QUANT_UNROLL for (int i = 0; i < 4; ++i) {
    const int nearest = to_integer(q[i]);
    const int code = nearest > 127 ? 127 : nearest < -127 ? -127 : nearest;
    word |= (static_cast<uint32_t>(code) & 0xFF) << 8 * i;
  }
  return word;
}

template <class T>
QUANT_DEVICE void quantize_body(const QuantizeParams& p) {
  constexpr int kVector = 8, kVectors = kQuantizeColumns / kQuantizeThreads / kVector;
  constexpr int kWords = kVector * sizeof(T) / sizeof(int);
  struct alignas(16) Numbers {
    int words[kWords];
  } h[kVectors] = {};
  struct alignas(kVector) Codes {
    uint32_t words[kVector / 4];
  };
  next_kernel_start();
  previous_kernel_wait();
  const int64_t token = block_index() / p.parts;
  const int first = block_index() % p.parts * kQuantizeColumns + thread_index() * kVector;
  const auto column = [&](int i) { return first + i * kQuantizeThreads * kVector; };
  // All loads before the first number is looked at: of few tokens their latency is the whole time.
  QUANT_UNROLL for (int i = 0; i < kVectors; ++i) {
    const T* from = static_cast<const T*>(p.h) + token * p.h_stride + column(i);
    if (column(i) < p.columns) h[i] = *reinterpret_cast<const Numbers*>(from);
  }
  T top;  // rounding is monotone: the largest of the rounded is the largest, rounded
  from_float(float_of(largest_of(p.maxima + token * p.tiles, p.tiles)), top);
  const float ratio = divide(to_float(top), p.int8 ? 127.0f : 448.0f);
  const float scale = ratio == 0 ? 1 : ratio;
  if (first == 0) p.scale[token * p.scale_stride] = scale;
  QUANT_UNROLL for (int i = 0; i < kVectors; ++i) {
    if (column(i) >= p.columns) continue;
    // Or they would be converted, and waited for, before the maxima are asked for.
    QUANT_UNROLL for (int j = 0; j < kWords; ++j) forget(h[i].words[j]);
    T x[kVector];
    memcpy(x, h[i].words, sizeof x);
    Codes codes;
    QUANT_UNROLL for (int j = 0; j < kVector / 4; ++j) {
      float q[4];
      QUANT_UNROLL for (int k = 0; k < 4; ++k) q[k] = divide(to_float(x[4 * j + k]), scale);
      codes.words[j] = codes_of(q, p.int8);
    }
    char* to = static_cast<char*>(p.codes) + token * p.codes_stride + column(i);
    *reinterpret_cast<Codes*>(to) = codes;
  }
}

template <class T>
QUANT_KERNEL_BESIDE(kQuantizeThreads, 4)
quantize_kernel(QUANT_GRID_CONSTANT QuantizeParams p) {
  quantize_body<T>(p);
}

}  // namespace quant
