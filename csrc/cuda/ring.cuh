#pragma once

#include "cuda/sm90.cuh"

namespace quant {

// A place in the ring of stages, and the parity of its phase.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  QUANT_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace quant
