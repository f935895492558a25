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

  // Where a tile's operands are: found once a tile, as divisions take longer than a stage of few
  // tokens may.
  struct Place {
    uint32_t first[2];  // block of K of each fragment, of all fragments' blocks
    int tile = -1, token = 0;
  };
  QUANT_DEVICE void find(Place& at, int tile) const {
    if (tile == at.tile) return;
    at.tile = tile;
    const int token_tile = tile / p.schedule.row_tiles;
    const int row_tile = (tile - token_tile * p.schedule.row_tiles) * C::kCluster + rank;
    at.token = token_tile * C::kTokens;
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      at.first[i] = static_cast<uint32_t>(fragment_of(p, row_tile, i)) *
                    static_cast<uint32_t>(p.schedule.blocks);
    }
  }
  QUANT_DEVICE void weights(int stage, const Place& at, int block) const {
    Barrier* full = shared.full + stage;
    barrier_expect(full, C::kStageBytes);
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      const uint64_t from = at.first[i] + static_cast<uint32_t>(block);
      copy_bulk(shared.codes + (2 * stage + i) * kFragmentBytes, p.codes + from * kFragmentBytes,
                kFragmentBytes, full, Keep::first_out);
      if constexpr (C::kGrouped) {
        copy_bulk(shared.scales + (2 * stage + i) * C::kScaleBytes, p.t + from * C::kScaleBytes,
                  C::kScaleBytes, full, Keep::first_out);
      }
    }
  }
  QUANT_DEVICE void tokens(int stage, const Place& at, int block) const {
    const int token = at.token, k = block * kBlockColumns;
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
    Place at;
    int tile = 0, block = 0, filled = 0;
    // Weights do not depend on the kernel before this one.
    for (Units ahead(p.schedule, worker); filled < C::kStages && ahead.next(tile, block);) {
      find(at, tile);
      weights(filled++, at, block);
    }
    previous_kernel_wait();
    Units units(p.schedule, worker);
    for (int i = 0; i < filled; ++i) {
      units.next(tile, block);
      find(at, tile);
      tokens(ring.stage, at, block);
      ring.advance();
    }
    while (units.next(tile, block)) {
      find(at, tile);
      barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
      weights(ring.stage, at, block);
      tokens(ring.stage, at, block);
      ring.advance();
    }
    next_kernel_start();
  }
};

}  // namespace quant
