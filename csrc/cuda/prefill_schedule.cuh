// Which tiles the blocks of a prefill over expanded pages take, so that a block works on one tile
// while the pages of its next come in.
//
// All tiles in the order of a launch of a block each: from the last tiles of the sequences to the
// first ones, of whole prompts the longest first, sequence by sequence and head by head. Rounds of
// as many as there are blocks; every other round is dealt from the other end, so that who got the
// longest of one gets the shortest of the next. Nothing is counted in memory: a warp finds its
// tiles from the lengths alone.
#pragma once

#include "cuda/prefill_tile.cuh"

namespace quant {

// By a whole warp.
struct PrefillSchedule {
  const PrefillParams& params;
  int lane;

  QUANT_DEVICE int tiles_of(int sequence) const {
    if (sequence >= params.shared.batch) return 0;
    const int length = params.cu_seqlens[sequence + 1] - params.cu_seqlens[sequence];
    return (length + params.tile_tokens - 1) / params.tile_tokens;
  }
  // Tiles of one head of all sequences from `index` on.
  QUANT_DEVICE int tiles_from(int index) const {
    int count = 0;
    for (int first = 0; first < params.shared.batch; first += 32) {
      const int more = tiles_of(first + lane) - index;
      count += more > 0 ? more : 0;
    }
    return sum_of_warp(count);
  }
  // The tile of a place in the order; none (tokens is 0) behind the last.
  QUANT_DEVICE PrefillTile tile(int place) const {
    const int heads = params.shared.kv_heads, rank = place / heads;
    if (rank >= tiles_from(0)) return {};
    int index = 0, above = params.tiles;  // tiles_from(index) > rank >= tiles_from(above)
    while (above - index > 1) {
      const int middle = (index + above) / 2;
      if (tiles_from(middle) > rank) {
        index = middle;
      } else {
        above = middle;
      }
    }
    // Among the sequences that have a tile `index`.
    int before = rank - tiles_from(above), sequence = 0;
    for (int first = 0; first < params.shared.batch; first += 32) {
      const uint32_t having = ballot(tiles_of(first + lane) > index);
      const int count = bits_set(having);
      if (before < count) {
        const bool mine = having >> lane & 1 && bits_set(having & ((1u << lane) - 1)) == before;
        sequence = first + sum_of_warp(mine ? lane : 0);
        break;
      }
      before -= count;
    }
    return prefill_tile(params, sequence, place % heads, index);
  }
  // The tile of this block in a round.
  QUANT_DEVICE PrefillTile tile_of_round(int round) const {
    const int blocks = grid_size(), block = block_index();
    return tile(round * blocks + (round % 2 == 0 ? block : blocks - 1 - block));
  }
};

}  // namespace quant
