// Four neighbouring rows of the weight, of one token: from a sum to Y, and what is added on the
// way.
#pragma once

#include "cuda/bits.cuh"
#include "cuda/gemm_params.h"

namespace quant {

using namespace sm90;

// Numbers from or to `type`, `count` of four; all of them at once where they are aligned.
template <class T>
QUANT_DEVICE void load_four(const void* from, int64_t at, int count, bool aligned, float (&to)[4]) {
  const T* source = static_cast<const T*>(from) + at;
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  };
  if (aligned && count == 4) {
    const Four four = *reinterpret_cast<const Four*>(source);
    QUANT_UNROLL for (int i = 0; i < 4; ++i) to[i] = to_float(four.x[i]);
  } else {
    QUANT_UNROLL for (int i = 0; i < 4; ++i) to[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}
QUANT_DEVICE void load_four(const void* from, Type type, int64_t at, int count, bool aligned,
                            float (&to)[4]) {
  if (type == Type::bf16) {
    load_four<Bf16>(from, at, count, aligned, to);
  } else if (type == Type::fp16) {
    load_four<Fp16>(from, at, count, aligned, to);
  } else {
    load_four<float>(from, at, count, aligned, to);
  }
}
template <class T>
QUANT_DEVICE void store_four(void* to, int64_t at, int count, bool aligned, const float (&y)[4]) {
  T* target = static_cast<T*>(to) + at;
  struct alignas(4 * sizeof(T)) Four {
    T x[4];
  } four;
  QUANT_UNROLL for (int i = 0; i < 4; ++i) from_float(y[i], four.x[i]);
  if (aligned && count == 4) {
    *reinterpret_cast<Four*>(target) = four;
  } else {
    QUANT_UNROLL for (int i = 0; i < 4; ++i) {
      if (i < count) target[i] = four.x[i];
    }
  }
}

// Through the L2, where other blocks find it.
template <class Sum>
QUANT_DEVICE void store_through(uint4* to, const Sum* four) {
  uint4 bits;
  memcpy(&bits, four, sizeof bits);
  *to = bits;
}
template <class Sum>
QUANT_DEVICE void load_through(const uint4* from, Sum (&four)[4]) {
  const uint4 bits = load_l2(from);
  memcpy(four, &bits, sizeof bits);
}

// a c sum + bias, of rows n .. n + 3; no product is fused into a sum: INT8 owes the reference's
// bits.
template <class Sum>
QUANT_DEVICE void scale_rows(const GemmParams& p, float unit, const Sum* sums, float a, int n,
                             int count, float (&y)[4]) {
  float c[4], bias[4];
  load_four<float>(p.c, n, count, p.vectors, c);
  QUANT_UNROLL for (int i = 0; i < 4; ++i) {
    y[i] = multiply(multiply(static_cast<float>(sums[i]), a), multiply(c[i], unit));
  }
  if (p.bias != nullptr) {
    load_four(p.bias, p.bias_type, n, count, p.vectors, bias);
    QUANT_UNROLL for (int i = 0; i < 4; ++i) y[i] = add(y[i], bias[i]);
  }
}

// sums: of rows row .. row + 3 of a tile and one token. silu_mul: `row` is of the gate, and up lies
// kFragmentRows further. Returns, with silu_mul, the largest `magnitude` before the output's
// rounding.
template <class Sum>
QUANT_DEVICE uint32_t store_rows(const GemmParams& p, float unit, const Sum* sums, int row_tile,
                                 int row, int token) {
  const float a = p.x_scale[token * p.x_scale_stride];
  const int limit = p.silu_mul ? p.rows / 2 : p.rows;
  const int n = row_tile * (p.silu_mul ? kFragmentRows : kTileRows) + row;
  const int count = limit - n < 4 ? limit - n : 4;
  if (count <= 0) return 0;
  float y[4];
  uint32_t top = 0;
  scale_rows(p, unit, sums, a, n, count, y);
  if (p.silu_mul) {
    float up[4];
    scale_rows(p, unit, sums + kFragmentRows, a, limit + n, count, up);
    QUANT_UNROLL for (int i = 0; i < 4; ++i) {
      constexpr float kLog2E = 1.4426950408889634f;
      y[i] = y[i] / (1.0f + exponential2(-kLog2E * y[i])) * up[i];
      top = larger(top, magnitude(y[i]));  // whose rows come in whole fours
    }
  } else if (p.residual != nullptr) {
    float residual[4];
    load_four(p.residual, p.residual_type, token * p.residual_stride + n, count, p.vectors,
              residual);
    QUANT_UNROLL for (int i = 0; i < 4; ++i) y[i] = add(y[i], residual[i]);
  }
  const int64_t at = token * p.out_stride + n;
  if (p.out_type == Type::bf16) {
    store_four<Bf16>(p.out, at, count, p.vectors, y);
  } else if (p.out_type == Type::fp16) {
    store_four<Fp16>(p.out, at, count, p.vectors, y);
  } else {
    store_four<float>(p.out, at, count, p.vectors, y);
  }
  return top;
}

}  // namespace quant
