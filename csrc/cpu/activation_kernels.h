// A row and its codes, shared by the activations and by the queries that leave RoPE.
#ifndef QUANT_ACTIVATION_KERNELS_H_
#define QUANT_ACTIVATION_KERNELS_H_

#include "kernels.h"
#include "simd.h"

namespace quant {
namespace QUANT_ISA {

// The scale of a row: `magnitude` holds the bits of its largest |x|, which as integers have the
// same order, with NaN above all.
inline float scale_of(int32_t magnitude, float limit) {
  const float a = bits_as<float>(magnitude) / limit;
  return a == 0.0f ? 1.0f : a;
}

template <class T>
inline void quantize_row(const T* x, int64_t columns, float a, bool fp8, uint8_t* codes) {
  const float limit = fp8 ? 448.0f : 127.0f;
  for (int64_t k = 0; k < columns; k += LANES) {
    const int64_t n = columns - k;
    const F32 y = min(splat(limit), max(splat(-limit), load(x + k, n) / a));
    const I32 code = fp8 ? e4m3_codes(y) : nearest_integers(y);
    if (n >= LANES) {
      store_low_bytes(codes + k, code);
    } else {
      uint8_t part[LANES];
      store_low_bytes(part, code);
      for (int64_t i = 0; i < n; ++i) codes[k + i] = part[i];
    }
  }
}

}  // namespace QUANT_ISA
}  // namespace quant

#endif  // QUANT_ACTIVATION_KERNELS_H_
