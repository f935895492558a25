// Numbers of sm90.cuh on a CPU: roundings, pairs of FP16, and warp MMAs.
#include <algorithm>
#include <array>
#include <cmath>

#include "cuda/simulate/simulator.h"

namespace quant::sm90 {
namespace {

float e4m3_value(uint8_t code) {
  if ((code & 0x7F) == 0x7F) return std::nanf("");
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return code & 0x80 ? -size : size;
}

}  // namespace

namespace detail {

const std::array<float, 256>& e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values{};
    for (int code = 0; code < 256; ++code) {
      values[static_cast<size_t>(code)] = e4m3_value(static_cast<uint8_t>(code));
    }
    return values;
  }();
  return table;
}

}  // namespace detail

float exponential2(float x) { return std::exp2(x); }

uint32_t to_e4m3(float a, float b, float c, float d) {
  uint32_t word = 0;
  const float values[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const float size = std::fabs(values[i]);
    uint32_t code = 0x7F;  // NaN
    if (size >= 448.0f) {
      code = 0x7E;
    } else if (size == size) {
      int exponent = 0;
      std::frexp(size, &exponent);
      const int step = std::max(exponent - 4, -9);  // a unit in the last place is 2^step
      const float rounded = std::ldexp(std::nearbyint(std::ldexp(size, -step)), step);
      code = 0;
      while (e4m3_value(static_cast<uint8_t>(code)) < rounded) ++code;
    }
    word |= (code | (std::signbit(values[i]) ? 0x80u : 0u)) << 8 * i;
  }
  return word;
}

int to_integer(float x) {
  if (x != x) return 0;
  constexpr float kEnd = 2147483648.0f;
  if (x >= kEnd) return 0x7FFFFFFF;
  return x < -kEnd ? -0x7FFFFFFF - 1 : static_cast<int>(std::nearbyint(x));
}

float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
float to_float(Fp16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}
void from_float(float x, Bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x == x) bits += 0x7FFF + (bits >> 16 & 1);
  y.bits = static_cast<uint16_t>(bits >> 16);
}
void from_float(float x, Fp16& y) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&y.bits, &half, sizeof half);
}

namespace {
float half_value(uint32_t word, int index) {
  return to_float(Fp16{static_cast<uint16_t>(word >> 16 * index)});
}
uint32_t pair_of(float low, float high) {
  Fp16 a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
}  // namespace

uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  const auto fused = [&](int i) {
    const double product = static_cast<double>(half_value(a, i)) * half_value(b, i);
    return static_cast<float>(product + half_value(c, i));
  };
  return pair_of(fused(0), fused(1));
}
uint32_t halves_of_e4m3(uint32_t x) {
  const auto& table = detail::e4m3_table();
  return pair_of(table[x & 0xFF], table[x >> 8 & 0xFF]);
}
uint32_t transpose(uint32_t x) {
  detail::WarpWords all;
  detail::gather({x, 0, 0, 0, 0, 0}, &all);
  const int lane = thread_index() % 32, row = lane / 4, column = lane % 4 * 2;
  const auto at = [&](int r, int c) { return all.of[4 * r + c / 2][0] >> c % 2 * 16 & 0xFFFF; };
  return at(column, row) | at(column + 1, row) << 16;
}
void warp_mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  detail::WarpWords all;
  detail::gather({a[0], a[1], a[2], a[3], b[0], b[1]}, &all);
  const int g = thread_index() % 32 / 4, q = thread_index() % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i / 2, column = 2 * q + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = all.of[4 * g + k % 8 / 2][k / 8 * 2 + high];
      const uint32_t y = all.of[4 * column + k % 8 / 2][4 + k / 8];
      total += static_cast<double>(half_value(x, k % 2)) * half_value(y, k % 2);
    }
    sum[i] = static_cast<float>(total);
  }
}

}  // namespace quant::sm90
