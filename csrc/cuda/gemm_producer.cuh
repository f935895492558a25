// What fetches weights and activations of a GEMM ahead of those who multiply: one thread.
#pragma once

#include "cuda/gemm_config.cuh"

namespace quant {

template <class C>
struct Producer {
  const GemmParams& p;
  const TensorMap* x;
  const Shared<C>& shared;
  int rank;

  QUANT_DEVICE int row_tile(int tile) const {
    return tile % p.schedule.row_tiles * C::kCluster + rank;
  }
  QUANT_DEVICE void weights(int stage, int tile, int block) const {
    Barrier* full = shared.full + stage;
    barrier_expect(full, C::kStageBytes);
    for (int i = 0; i < 2; ++i) {
      const int64_t at = int64_t{1} * fragment_of(p, row_tile(tile), i) * p.schedule.blocks + block;
      copy_bulk(shared.codes + (2 * stage + i) * kFragmentBytes, p.codes + at * kFragmentBytes,
                kFragmentBytes, full, Keep::first_out);
      if constexpr (C::kGrouped) {
        copy_bulk(shared.scales + (2 * stage + i) * C::kScaleBytes, p.t + at * C::kScaleBytes,
                  C::kScaleBytes, full, Keep::first_out);
      }
    }
  }
  QUANT_DEVICE void tokens(int stage, int tile, int block) const {
    const int token = tile / p.schedule.row_tiles * C::kTokens, k = block * kBlockColumns;
    char* to = shared.tokens + stage * C::kTokenBytes;
    if constexpr (C::kCluster == 1) {
      copy_box(to, x, k, token, shared.full + stage, Keep::last_out);
    } else {  // each block fetches its part for all
      constexpr int kPart = C::kTokens / C::kCluster;
      copy_box_to(to + rank * kPart * kBlockColumns, x, k, token + rank * kPart,
                  shared.full + stage, (1 << C::kCluster) - 1, Keep::last_out);
    }
  }
  QUANT_DEVICE void run(int worker) const {
    Ring<C::kStages> ring;
    int tile = 0, block = 0, filled = 0;
    // Weights do not depend on the kernel before this one.
    for (Units ahead(p.schedule, worker); filled < C::kStages && ahead.next(tile, block);) {
      weights(filled++, tile, block);
    }
    previous_kernel_wait();
    Units units(p.schedule, worker);
    for (int i = 0; i < filled; ++i) {
      units.next(tile, block);
      tokens(ring.stage, tile, block);
      ring.advance();
    }
    while (units.next(tile, block)) {
      barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
      weights(ring.stage, tile, block);
      tokens(ring.stage, tile, block);
      ring.advance();
    }
    next_kernel_start();
  }
};

}  // namespace quant
