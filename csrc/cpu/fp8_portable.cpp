// FP8 in plain C++, in FP32, and the tables of all FP8 kernels.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "gemm.h"

namespace quant {
namespace {

using Operand = float;
using Level = Operand;
typedef float Sum __attribute__((vector_size(16)));
constexpr int kColumnsAtOnce = 4;
constexpr int kTileTokens = 2;
constexpr int kTileRows = 4;
constexpr int kStreamSums = 2;
using Words = const uint8_t*;
using Table = const Operand*;

Sum zero() { return Sum{}; }
Sum operand(const Operand* from) {
  Sum sum;
  std::memcpy(&sum, from, sizeof sum);
  return sum;
}
void dot(Sum& sum, Sum a, Sum b) { sum += a * b; }
float total(Sum sum) { return (sum[0] + sum[2]) + (sum[1] + sum[3]); }
void store(Operand* to, Sum operands) { std::memcpy(to, &operands, sizeof operands); }
Words words_at(const uint8_t* words, int part) { return words + 2 * kColumnsAtOnce * part; }
Table table_at(const Level* levels, float) { return levels; }
Sum look_up(Words words, int j, Table table) {
  Sum operands;
  for (int i = 0; i < kColumnsAtOnce; ++i) {
    operands[i] = table[words[2 * i + j / 2] >> (4 * (j % 2)) & 15];
  }
  return operands;
}

float e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9)
                                        : std::ldexp(float(8 + mantissa), exponent - 10);
  return (code & 128) != 0 ? -magnitude : magnitude;
}

// Nearest E4M3 number: four significant bits, or multiples of 2^-9.
float round_e4m3(float value) {
  if (!(std::fabs(value) > 0)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int last = exponent - 4 < -9 ? -9 : exponent - 4;
  return std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
}

uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

Fp8Tables make_tables() noexcept {
  Fp8Tables tables;
  for (int code = 0; code < 256; ++code) {
    tables.value[code] = e4m3_value(code);
    tables.value_bf16[code] = upper_half(tables.value[code]);
  }
  for (int t = 0; t < 128; ++t) {
    for (int q = 0; q < 16; ++q) {
      tables.levels[t][q] = round_e4m3(float(q - 8) * tables.value[t]);
      tables.levels_bf16[t][q] = upper_half(tables.levels[t][q]);
      tables.level_bytes[t][0][q] = static_cast<uint8_t>(tables.levels_bf16[t][q] >> 8);
      tables.level_bytes[t][1][q] = static_cast<uint8_t>(tables.levels_bf16[t][q] & 255);
    }
  }
  return tables;
}

}  // namespace

const Fp8Tables kFp8Tables = make_tables();

}  // namespace quant

#include "fp8_words.h"

namespace quant {
const Kernels kFp32Portable = fp8_kernels();
}  // namespace quant
