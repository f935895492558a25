// Codes, scales and powers of two of the INT4 cache, as both attention kernels need them.
//
// A byte of the cache holds channel j in its low nibble and channel j + D/2 in its high one, two's
// complement. Instructions for eight codes:
//
//   e4m3_of_low, e4m3_of_high   11   E4M3 of q 2^-9: a byte of sign and magnitude m <= 8
//   halves_of_low, .._high       5   FP16 of (q + 8) 2^-24 or 2^-20: subnormal numbers, exact in
//   MMAs
#pragma once

#include <cmath>

#include "cuda/attention_params.h"
#include "cuda/bits.cuh"
#include "cuda/convert.cuh"

namespace quant {

constexpr float kCodeUnit = 512;   // from E4M3 codes of e4m3_of_low and e4m3_of_high to q
constexpr float kRangeOfP = 256;   // reference_attention.P_RANGE
constexpr float kLowest = -1e30f;  // below every score, and finite: no NaN between two of them
constexpr int kAndXor = (0xF0 & 0xCC) ^ 0xAA;

// --- four codes as bytes ---
// A negative nibble n is -(16 - n), and 16 - n is (n ^ 15) + 1.
QUANT_DEVICE uint32_t e4m3_of_nibbles(uint32_t nibbles, uint32_t negative) {
  return (nibbles ^ negative * 15) + negative * 129;
}
QUANT_DEVICE uint32_t e4m3_of_low(uint32_t bytes) {
  return e4m3_of_nibbles(bytes & 0x0F0F0F0F, bytes >> 3 & kBytes);
}
QUANT_DEVICE uint32_t e4m3_of_high(uint32_t bytes) {
  return e4m3_of_nibbles(bytes >> 4 & 0x0F0F0F0F, bytes >> 7 & kBytes);
}

// --- the codes of bytes 0 and 2, in FP16: q + 8 is q ^ 8, and a small integer in the mantissa of a
// subnormal number is itself times 2^-24. Sums in FP32 bear that the codes are not centred. ---
constexpr float kCentre = 8, kLowUnit = 0x1p24f, kHighUnit = 0x1p20f;
QUANT_DEVICE uint32_t halves_of_low(uint32_t bytes) {
  return lop3<kAndXor>(bytes, 0x000F000F, 0x00080008);
}
QUANT_DEVICE uint32_t halves_of_high(uint32_t bytes) {
  return lop3<kAndXor>(bytes, 0x00F000F0, 0x00800080);
}

// --- numbers ---
QUANT_DEVICE float low_half(uint32_t pair) { return to_float(Fp16{static_cast<uint16_t>(pair)}); }
QUANT_DEVICE float high_half(uint32_t pair) {
  return to_float(Fp16{static_cast<uint16_t>(pair >> 16)});
}
// A row's scale and offset.
QUANT_DEVICE float scale_of(uint32_t pair) { return low_half(pair); }
QUANT_DEVICE float offset_of(uint32_t pair) { return high_half(pair); }
// z: the least power of two that is not below x, within what FP16 has.
QUANT_DEVICE float power_of_two_above(float x) {
  const float bounded = fminf(fmaxf(x, 0x1p-24f), 0x1p16f);
  return float_of((bits_of(bounded) + 0x7FFFFF) & 0x7F800000);
}
QUANT_DEVICE float reciprocal_of_power_of_two(float z) { return float_of(0x7F000000 - bits_of(z)); }
// cap tanh(x / (2 log2(e))), from an x that has 2 log2(e) / cap in it. Within 2^-21 of
// cap; with the hardware's tanh, whose error is 2^-11, a score of 50 would move by 2^-5.
QUANT_DEVICE float capped(float x, float cap) {
  return cap - 2 * cap * reciprocal(1 + exponential2(x));
}
// The sum of four E4M3 codes.
QUANT_DEVICE float sum_of_e4m3(uint32_t codes) {
  const uint32_t low = halves_of_e4m3(codes), high = halves_of_e4m3(codes >> 16);
  return (low_half(low) + high_half(low)) + (low_half(high) + high_half(high));
}

// --- which keys a query at a position sees: [oldest, position] ---
QUANT_DEVICE int oldest_key(int position, int window) {
  const int oldest = position - window + 1;
  return window > 0 && oldest > 0 ? oldest : 0;
}

}  // namespace quant
