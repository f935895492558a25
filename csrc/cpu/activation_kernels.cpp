// Activations: per token, FP8 E4M3 or INT8 codes with one FP32 scale, after what comes before.
//
//   quantize   a = max|x| / limit (1 for zeros),  codes = round(clamp(x / a))     limit: 448, 127
//   rms_norm   x += residual;  y = x / sqrt(mean(x^2) + eps) w, rounded to x's type;  codes of y
//   silu_mul   y = g / (1 + e^-g) u, rounded to x's type;  codes of y
//
// One row at a time. It is read from memory once; y stays in a row of FP32.
#include "activation_kernels.h"

namespace quant {
namespace QUANT_ISA {
namespace {

template <class T>
const T* row_of(const QuantCpuTokens& call, int64_t row) {
  return static_cast<const T*>(call.x) + row * call.x_row;
}

// The codes of y [columns], whose largest magnitude is known.
template <class T>
void write_codes(const QuantCpuTokens& call, int64_t row, const T* y, I32 magnitudes) {
  const bool fp8 = call.code_type == QUANT_CPU_CODES_E4M3;
  const float a = scale_of(largest(magnitudes), fp8 ? 448.0f : 127.0f);
  call.scale[row * call.scale_row] = a;
  auto* codes = static_cast<uint8_t*>(call.codes) + row * call.codes_row;
  quantize_row(y, call.columns, a, fp8, codes);
}

template <class T>
void quantize(const QuantCpuTokens& call, int64_t row) {
  const T* x = row_of<T>(call, row);
  I32 magnitudes = {};
  for (int64_t k = 0; k < call.columns; k += LANES) {
    magnitudes = max(magnitudes, bits_as<I32>(abs(load(x + k, call.columns - k))));
  }
  write_codes(call, row, x, magnitudes);
}

template <class T, class W>
void rms_norm(const QuantCpuNorm& norm, int64_t row, float* y) {
  const QuantCpuTokens& call = norm.tokens;
  const T* x = row_of<T>(call, row);
  T* stream =
      norm.residual == nullptr ? nullptr : static_cast<T*>(norm.residual) + row * norm.residual_row;
  F32 squares = {};
  for (int64_t k = 0; k < call.columns; k += LANES) {
    const int64_t n = call.columns - k;
    F32 value = load(x + k, n);
    if (stream != nullptr) {
      value = round_to<T>(value + load(stream + k, n));
      store(stream + k, value, n);
    }
    store(y + k, value, n);
    squares = fma(value, value, squares);
  }
  const float mean = sum(squares) / static_cast<float>(call.columns);
  const float factor = 1.0f / __builtin_sqrtf(mean + static_cast<float>(norm.eps));
  const W* weight = static_cast<const W*>(norm.weight);
  I32 magnitudes = {};
  for (int64_t k = 0; k < call.columns; k += LANES) {
    const int64_t n = call.columns - k;
    const F32 value = round_to<T>(load(y + k, n) * factor * load(weight + k, n));
    store(y + k, value, n);
    magnitudes = max(magnitudes, bits_as<I32>(abs(value)));
  }
  write_codes(call, row, y, magnitudes);
}

template <class T>
void silu_mul(const QuantCpuTokens& call, int64_t row, float* y) {
  const T* gate = row_of<T>(call, row);
  const T* up = gate + call.columns;
  I32 magnitudes = {};
  for (int64_t k = 0; k < call.columns; k += LANES) {
    const int64_t n = call.columns - k;
    const F32 g = load(gate + k, n);
    const F32 value = round_to<T>(g / (1.0f + exp(-g)) * load(up + k, n));
    store(y + k, value, n);
    magnitudes = max(magnitudes, bits_as<I32>(abs(value)));
  }
  write_codes(call, row, y, magnitudes);
}

template <class T>
void rms_norm_by_weight(const QuantCpuNorm& call, int64_t row, float* y) {
  switch (call.weight_type) {
    case QUANT_CPU_BF16:
      return rms_norm<T, Bf16>(call, row, y);
    case QUANT_CPU_FP16:
      return rms_norm<T, Fp16>(call, row, y);
    default:
      return rms_norm<T, float>(call, row, y);
  }
}

}  // namespace

void quantize_token(const QuantCpuTokens& call, int64_t row) {
  const DefaultRounding guard;
  switch (call.x_type) {
    case QUANT_CPU_BF16:
      return quantize<Bf16>(call, row);
    case QUANT_CPU_FP16:
      return quantize<Fp16>(call, row);
    default:
      return quantize<float>(call, row);
  }
}

void rms_norm_token(const QuantCpuNorm& call, int64_t row, float* scratch) {
  const DefaultRounding guard;
  switch (call.tokens.x_type) {
    case QUANT_CPU_BF16:
      return rms_norm_by_weight<Bf16>(call, row, scratch);
    case QUANT_CPU_FP16:
      return rms_norm_by_weight<Fp16>(call, row, scratch);
    default:
      return rms_norm_by_weight<float>(call, row, scratch);
  }
}

void silu_mul_token(const QuantCpuTokens& call, int64_t row, float* scratch) {
  const DefaultRounding guard;
  switch (call.x_type) {
    case QUANT_CPU_BF16:
      return silu_mul<Bf16>(call, row, scratch);
    case QUANT_CPU_FP16:
      return silu_mul<Fp16>(call, row, scratch);
    default:
      return silu_mul<float>(call, row, scratch);
  }
}

}  // namespace QUANT_ISA
}  // namespace quant
