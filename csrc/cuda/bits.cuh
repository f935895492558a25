// FP32 numbers by their bits.
#pragma once

#include "cuda/sm90.cuh"

namespace quant {

using namespace sm90;

QUANT_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
QUANT_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
QUANT_DEVICE float infinity() { return float_of(0x7F800000); }

// The bits of |x|: ordered as |x|, and a NaN above infinity, which a maximum of numbers may lose.
QUANT_DEVICE uint32_t magnitude(float x) { return bits_of(x) & 0x7FFFFFFF; }
QUANT_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

}  // namespace quant
