// Where a weight's INT4 code lies in memory.
//
// A thread of a warp multiplies 16 codes of a 16 x 32 block of W [N, K] with one WGMMA: rows r and
// r + 8, columns 4 c .. 4 c + 3 and 16 more, with r = lane / 4, c = lane % 4. Offline they are put
// next to each other, 8 bytes a lane, so that one 64-bit load from shared memory fetches them:
//
//   offset(n, k) = 64 (n % 8) + 16 (k / 4 % 4) + 8 (k / 16 % 2) + 4 (n / 8 % 2) + k % 4
//                + 512 (n / 16 + (N / 16) (k / 32))                         in codes
//
// Blocks follow each other along N first. Kept free of CUDA code: tests compile it with g++.
#pragma once

#include "cute/layout.hpp"

namespace quant_baseline {

// One block. The modes of size 1 are what CUTLASS's mainloop expects beside the block's own.
using Block =
    cute::Layout<cute::Shape<cute::Shape<cute::Shape<cute::_8, cute::_2>, cute::_1>,
                             cute::Shape<cute::Shape<cute::_4, cute::_4, cute::_2>, cute::_1>>,
                 cute::Stride<cute::Stride<cute::Stride<cute::_64, cute::_4>, cute::_0>,
                              cute::Stride<cute::Stride<cute::_1, cute::_16, cute::_8>, cute::_0>>>;

// The layout of W [n, k], with a batch mode of 1.
inline auto weight_layout(int n, int k) {
  return cute::tile_to_shape(Block{}, cute::make_shape(n, k, 1));
}

using WeightLayout = decltype(weight_layout(0, 0));

}  // namespace quant_baseline
