// What happens to the sums of one token and one block of outputs, in FP32, in this order:
//
//   y = sum * x_scale * c (+ bias) (+ residual);  or silu(gate) * up;  then rounded once
//
// Plain loops that compilers vectorize for the instruction set of the file that includes this one.
// They are compiled without contraction to FMA: the bits are those of the reference.
#ifndef QUANT_EPILOGUE_H_
#define QUANT_EPILOGUE_H_

#include <cstdint>
#include <cstring>

#include "gemm.h"

namespace quant {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float value_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp(z), within an ulp or two in [-87, 88]; what lies outside counts as the nearest of them.
float exponential(float z) {
  z = z > 88.0f ? 88.0f : z;
  z = z < -87.0f ? -87.0f : z;
  // Added to 1.5 * 2^23, a number is rounded to an integer that stands in the lowest bits.
  const float shifted = z * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (z - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = r * r * p + r + 1.0f;
  return p * value_of((bits_of(shifted) + 127) << 23);
}

uint16_t bf16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

uint16_t fp16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  // Beside 0.5 the last bit is worth 2^-24, FP16's smallest subnormal: the addition rounds.
  const uint32_t subnormal = bits_of(value_of(magnitude) + 0.5f) - (126u << 23);
  const uint32_t special = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  uint32_t half = magnitude < 113u << 23 ? subnormal : normal;
  half = magnitude >= 143u << 23 ? special : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

float fp16_value(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  const uint32_t normal = magnitude + (112u << 23);
  const float subnormal = value_of(magnitude + (113u << 23)) - value_of(113u << 23);
  uint32_t bits = magnitude < 1u << 23 ? bits_of(subnormal) : normal;
  bits = magnitude >= 31u << 23 ? normal + (112u << 23) : bits;
  return value_of(bits | static_cast<uint32_t>(half & 0x8000) << 16);
}

template <class Sum>
void scale_sums(const void* from, float x_scale, const float* c, const float* bias, float* y) {
  const Sum* sums = static_cast<const Sum*>(from);
  for (int j = 0; j < kBlock; ++j) y[j] = static_cast<float>(sums[j]) * x_scale * c[j];
  if (bias != nullptr) {
    for (int j = 0; j < kBlock; ++j) y[j] += bias[j];
  }
}

void add(const float* from, float* y) {
  for (int j = 0; j < kBlock; ++j) y[j] += from[j];
}

void silu_mul(const float* gate, const float* up, float* y) {
  for (int j = 0; j < kBlock; ++j) y[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
}

void load_row(const void* from, int type, int count, float* to) {
  if (type == QUANT_CPU_FP32) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  const uint16_t* narrow = static_cast<const uint16_t*>(from);
  if (type == QUANT_CPU_BF16) {
    for (int j = 0; j < count; ++j) to[j] = value_of(static_cast<uint32_t>(narrow[j]) << 16);
  } else {
    for (int j = 0; j < count; ++j) to[j] = fp16_value(narrow[j]);
  }
}

void store_row(const float* from, int type, int count, void* to) {
  if (type == QUANT_CPU_FP32) {
    std::memcpy(to, from, sizeof(float) * static_cast<size_t>(count));
    return;
  }
  uint16_t* narrow = static_cast<uint16_t*>(to);
  if (type == QUANT_CPU_BF16) {
    for (int j = 0; j < count; ++j) narrow[j] = bf16_of(from[j]);
  } else {
    for (int j = 0; j < count; ++j) narrow[j] = fp16_of(from[j]);
  }
}

}  // namespace
}  // namespace quant

#endif  // QUANT_EPILOGUE_H_
