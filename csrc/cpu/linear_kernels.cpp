// Y = X W^T with a dense weight, in FP32, rounded once. Rows of W are read where they lie.
//
// A sum is a vector of LANES sums over k = i mod LANES, each in order of k, folded at the end: it
// knows neither how many tokens nor which other rows there are. With AMX, BF16 has tiles instead.
#include "kernels.h"
#include "simd.h"
#if defined(__AMX_BF16__)
#include "linear_amx.h"
#endif

namespace quant {
namespace QUANT_ISA {
namespace {

constexpr int BLOCK = 16;  // rows that stay in the L1 cache, as FP32, while tokens pass
constexpr int ROWS = 4;    // of a register tile, and its tokens
constexpr int TOKENS = LANES == 16 ? 6 : 3;
static_assert(LINEAR_ROWS % BLOCK == 0 && BLOCK % LANES == 0, "whole blocks and vectors");

// y[t, r] = w[r] . x[t] over k columns, whole vectors; a row of y is BLOCK floats.
template <int T, class W>
void tile(const W* w, int64_t stride, const float* x, int64_t columns, int64_t k, float* y) {
  F32 sums[ROWS][T] = {};
  for (int64_t i = 0; i < k; i += LANES) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      // Another tile's rows; where there are none, nothing is read.
      __builtin_prefetch(w + (ROWS + r) * stride + i);
      const F32 row = load(w + r * stride + i);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) sums[r][t] = fma(row, load(x + t * columns + i), sums[r][t]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) y[t * BLOCK + r] = sum(sums[r][t]);
  }
}

template <int T, class W>
void tiles(int count, const W* w, int64_t stride, const float* x, int64_t columns, int64_t k,
           float* y) {
  if (count < T) {
    if constexpr (T > 1) tiles<T - 1>(count, w, stride, x, columns, k, y);
    return;
  }
  for (int r = 0; r < BLOCK; r += ROWS) tile<T>(w + r * stride, stride, x, columns, k, y + r);
}

// BLOCK rows of the weight, or count of them, from `row` on.
template <class T>
void multiply(const QuantCpuLinear& call, int64_t row, int64_t count, const LinearPart& part,
              const float* x, float* scratch) {
  const int64_t columns = linear_columns(call.k);
  const T* w = static_cast<const T*>(call.weight) + row * call.weight_row;
  const bool widened = part.tokens > TOKENS || count < BLOCK || call.k % LANES != 0;
  for (int64_t r = 0; widened && r < BLOCK; ++r) {
    for (int64_t i = 0; i < columns; i += LANES) {
      const int64_t n = r < count ? call.k - i : 0;
      store(scratch + r * columns + i, n > 0 ? load(w + r * call.weight_row + i, n) : F32{});
    }
  }
  T* out = static_cast<T*>(call.out) + part.token * call.out_row + row;
  for (int64_t t = 0; t < part.tokens; t += TOKENS) {
    const int together = part.tokens - t < TOKENS ? static_cast<int>(part.tokens - t) : TOKENS;
    float y[TOKENS * BLOCK];
    if (widened) {
      tiles<TOKENS>(together, scratch, columns, x + t * columns, columns, columns, y);
    } else {
      tiles<TOKENS>(together, w, call.weight_row, x + t * columns, columns, call.k, y);
    }
    for (int i = 0; i < together; ++i) {
      for (int64_t r = 0; r < count; r += LANES) {
        store(out + (t + i) * call.out_row + r, load(y + i * BLOCK + r), count - r);
      }
    }
  }
}

template <class T>
void multiply_rows(const QuantCpuLinear& call, const LinearPart& part, const float* x,
                   float* scratch) {
  const DefaultRounding guard;
  for (int64_t row = part.row; row < part.row + LINEAR_ROWS && row < call.n; row += BLOCK) {
    const int64_t count = call.n - row < BLOCK ? call.n - row : BLOCK;
    multiply<T>(call, row, count, part, x, scratch);
  }
}

// Tokens first .. first + LINEAR_TOKENS - 1 as FP32 [linear_columns(k)], zeros behind k.
template <class T>
void widen_tokens(const QuantCpuLinear& call, int64_t first, float* to) {
  const DefaultRounding guard;
  const int64_t columns = linear_columns(call.k);
  for (int64_t t = first; t < first + LINEAR_TOKENS && t < call.m; ++t, to += columns) {
    const T* x = static_cast<const T*>(call.x) + t * call.x_row;
    for (int64_t i = 0; i < columns; i += LANES) {
      store(to + i, i < call.k ? load(x + i, call.k - i) : F32{});
    }
  }
}

}  // namespace

void linear_prepare(const QuantCpuLinear& call, int64_t first, uint8_t* prepared) {
  float* const to = reinterpret_cast<float*>(prepared);
  switch (call.type) {
    case QUANT_CPU_BF16:
#if defined(__AMX_BF16__)
      return prepare_tiles(call, first, reinterpret_cast<Bf16*>(prepared));
#else
      return widen_tokens<Bf16>(call, first, to);
#endif
    case QUANT_CPU_FP16:
      return widen_tokens<Fp16>(call, first, to);
    default:
      return widen_tokens<float>(call, first, to);
  }
}

void linear(const QuantCpuLinear& call, const LinearPart& part, const uint8_t* prepared,
            uint8_t* scratch) {
  const float* const x = reinterpret_cast<const float*>(prepared);
  float* const memory = reinterpret_cast<float*>(scratch);
  switch (call.type) {
    case QUANT_CPU_BF16:
#if defined(__AMX_BF16__)
      return multiply_with_amx(call, part, reinterpret_cast<const Bf16*>(prepared),
                               reinterpret_cast<Bf16*>(scratch));
#else
      return multiply_rows<Bf16>(call, part, x, memory);
#endif
    case QUANT_CPU_FP16:
      return multiply_rows<Fp16>(call, part, x, memory);
    default:
      return multiply_rows<float>(call, part, x, memory);
  }
}

}  // namespace QUANT_ISA
}  // namespace quant
