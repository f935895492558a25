// E4M3 codes to FP32.
//
// A table, because arithmetic on the bits passes through FP32 subnormals, which a process may have
// told its CPU to flush to zero.
#include <cmath>
#include <limits>

#include "quant_cpu.h"

namespace {

struct Values {
  float of[256];

  Values() noexcept {
    for (int code = 0; code < 256; ++code) {
      const int exponent = (code >> 3) & 15;
      const int mantissa = code & 7;
      const float magnitude = exponent == 0
                                  ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
      of[code] = (code & 128) != 0 ? -magnitude : magnitude;
    }
    of[0x7F] = of[0xFF] = std::numeric_limits<float>::quiet_NaN();
  }
};

const Values kValues;

}  // namespace

int quant_cpu_e4m3_to_float(const uint8_t* __restrict codes, int64_t count,
                            float* __restrict values) {
  if (count < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (count == 0) return QUANT_CPU_OK;
  if (codes == nullptr || values == nullptr) return QUANT_CPU_NULL_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = kValues.of[codes[i]];
  }
  return QUANT_CPU_OK;
}
