// E4M3 codes to FP32.
//
// Shifted left by 20 bits, exponent and mantissa are those of an FP32 number whose exponent is off
// by 127 - 7 = 120; one multiplication puts that right, for subnormals too, and is exact.
#include <cstring>
#include <limits>

#include "quant_cpu.h"

namespace {

float value_of(uint8_t code) {
  constexpr float kScale = 0x1p120F;
  const uint32_t magnitude = code & 0x7FU;
  const uint32_t bits = (magnitude << 20) | (static_cast<uint32_t>(code & 0x80U) << 24);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return magnitude == 0x7FU ? std::numeric_limits<float>::quiet_NaN() : value * kScale;
}

}  // namespace

int quant_cpu_e4m3_to_float(const uint8_t* __restrict codes, int64_t count,
                            float* __restrict values) {
  if (count < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (count == 0) return QUANT_CPU_OK;
  if (codes == nullptr || values == nullptr) return QUANT_CPU_NULL_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = value_of(codes[i]);
  }
  return QUANT_CPU_OK;
}
