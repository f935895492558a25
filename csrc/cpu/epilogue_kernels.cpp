// The epilogue of a GEMM: what the sums of a block of outputs become, in FP32, in this order, one
// rounding each, then rounded to the output's type:
//
//   y = sum * x_scale * c (+ bias) (+ residual);  or silu(gate) * up
#include "gemm.h"
#include "simd.h"

namespace quant {
namespace QUANT_ISA {
namespace {

// LANES numbers, or the n that there are, from the index-th on.
F32 load_as(int64_t type, const void* from, int64_t index, int64_t n) {
  switch (type) {
    case QUANT_CPU_BF16:
      return load(static_cast<const Bf16*>(from) + index, n);
    case QUANT_CPU_FP16:
      return load(static_cast<const Fp16*>(from) + index, n);
    default:
      return load(static_cast<const float*>(from) + index, n);
  }
}

// What 64 rows of the weight are multiplied by and what is added, zeros behind the last one.
struct Factors {
  alignas(64) float c[kBlock] = {}, bias[kBlock] = {};
  const bool integers, has_bias;

  Factors(const QuantCpuGemm& call, int64_t row)
      : integers(call.numerics == QUANT_CPU_INT8), has_bias(call.bias != nullptr) {
    const int64_t count = call.n - row < kBlock ? call.n - row : kBlock;
    for (int64_t j = 0; j < count; j += LANES) {
      store(c + j, load(call.c + row + j, count - j));
      if (has_bias) store(bias + j, load_as(call.bias_type, call.bias, row + j, count - j));
    }
  }

  F32 scale(const uint8_t* sums, float x_scale, int64_t j) const {
    sums += 4 * j;
    const F32 sum = integers ? to_float(read<I32>(sums)) : read<F32>(sums);
    const F32 y = sum * x_scale * load(c + j);
    return has_bias ? y + load(bias + j) : y;
  }
};

template <class T>
void finish_gemm_as(const QuantCpuGemm& call, const BlockSums& part) {
  const bool gated = call.silu_mul != 0;
  const int64_t outputs = gated ? call.n / 2 : call.n;
  const int64_t count = outputs - part.column < kBlock ? outputs - part.column : kBlock;
  const int64_t up_row = outputs + part.column, shift = up_row % kBlock;
  const Factors factors(call, part.column), up_factors(call, gated ? up_row : part.column);
  const void* const residual = call.residual;
  const int64_t residual_type = call.residual_type;
  for (int64_t m = 0; m < part.tokens; ++m) {
    const int64_t token = part.token + m;
    const float x_scale = call.x_scale[token * call.x_scale_stride];
    const uint8_t* const sums = part.sums + m * 4 * kBlock;
    alignas(64) uint8_t row[4 * kBlock];
    if (gated) {  // where up does not begin with a block, its 64 rows lie in two
      const uint8_t* const up = part.up + m * 4 * kBlock;
      memcpy(row, up + 4 * shift, 4 * (kBlock - shift));
      memcpy(row + 4 * (kBlock - shift), up + part.apart, 4 * shift);
    }
    T* const out = static_cast<T*>(call.out) + token * call.out_stride + part.column;
    const int64_t added = token * call.residual_stride + part.column;
    for (int64_t j = 0; j < count; j += LANES) {
      F32 y = factors.scale(sums, x_scale, j);
      if (gated) {
        y = y / (1.0f + exp(-y)) * up_factors.scale(row, x_scale, j);
      } else if (residual != nullptr) {
        y = y + load_as(residual_type, residual, added + j, count - j);
      }
      store(out + j, y, count - j);
    }
  }
}

}  // namespace

void finish_gemm(const QuantCpuGemm& call, const BlockSums& part) {
  const DefaultRounding guard;
  switch (call.out_type) {
    case QUANT_CPU_BF16:
      return finish_gemm_as<Bf16>(call, part);
    case QUANT_CPU_FP16:
      return finish_gemm_as<Fp16>(call, part);
    default:
      return finish_gemm_as<float>(call, part);
  }
}

}  // namespace QUANT_ISA
}  // namespace quant
