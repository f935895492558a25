// What rounding to a grid loses, group by group: the inner loop of the search for scales.
//
//   errors[n, G] = u^2 sum over k in G of h[k] (y - nearest(y))^2
//   y = w[n, k] / u,  u = units[n, G]
//
// nearest(y) is an integer in -8 .. 7, or +-levels[i], i in 0 .. 7, or -levels[8]: E4M3(q m) of one
// mantissa m. Distances there are found without a search and without codes: |y| less the step from
// each level to the next whose midpoint it is above. On a midpoint both levels are equally far.
#include "kernels.h"
#include "simd.h"

namespace quant {
namespace QUANT_ISA {
namespace {

struct Integers {
  F32 distance(F32 y) const {
    const float shifter = 0x1.8p23f;  // its unit in the last place is 1
    return y - ((min(max(y, splat(-8.0f)), splat(7.0f)) + shifter) - shifter);
  }
};

struct Products {
  F32 middle[8], step[8];

  explicit Products(const float* levels) {
    for (int i = 0; i < 8; ++i) {
      middle[i] = splat((levels[i] + levels[i + 1]) / 2);
      step[i] = splat(levels[i + 1] - levels[i]);
    }
  }
  F32 distance(F32 y) const {
    const F32 size = abs(y);
    F32 left = size;
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) left -= select(size > middle[i], step[i], F32{});
    return left - select(y < -middle[7], step[7], F32{});
  }
};

template <class Grid>
void errors_of_row(const QuantCpuGroupErrors& call, int64_t row, const Grid& grid) {
  const int64_t size = call.columns / call.groups;
  const float* w = call.w + row * call.columns;
  const float* h = call.h;
  for (int64_t group = 0; group < call.groups; ++group, w += size, h += size) {
    const float unit = call.units[row * call.groups + group], inverse = 1 / unit;
    F32 sums = {};
    for (int64_t k = 0; k < size; k += LANES) {
      const F32 distance = grid.distance(load(w + k, size - k) * inverse);
      sums = fma(load(h + k, size - k) * distance, distance, sums);
    }
    call.errors[row * call.groups + group] = sum(sums) * unit * unit;
  }
}

}  // namespace

void group_errors(const QuantCpuGroupErrors& call, int64_t row) {
  const DefaultRounding guard;
  if (call.levels == nullptr) return errors_of_row(call, row, Integers());
  errors_of_row(call, row, Products(call.levels));
}

}  // namespace QUANT_ISA
}  // namespace quant
