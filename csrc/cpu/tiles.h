// AMX's tile registers 0 .. 3 as sums: four tiles of 16 x 16 numbers of 32 bits.
#ifndef QUANT_TILES_H_
#define QUANT_TILES_H_

#include <immintrin.h>

#include <cstdint>

namespace quant {
namespace {

// GCC's intrinsics do not say which memory they read: what was written before is there from here
// on, and nothing that is written after comes before.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// 16 rows of so many bytes for each of the tile registers, until _tile_release().
inline void configure_tiles(const uint16_t (&bytes)[8] = {64, 64, 64, 64, 64, 64, 64, 64}) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = bytes[tile];
  written(&config);
  _tile_loadconfig(&config);
}

// Tokens, in pairs of tiles, that fill 1 MiB of an L2 cache of two. More than 128 gain nothing.
inline int64_t tokens_in_cache(int64_t token_bytes) {
  constexpr int64_t kPair = 32, kMost = 128;
  if (token_bytes << 7 <= 1 << 20) return kMost;
  const int64_t fit = (1 << 20) / token_bytes / kPair * kPair;
  return fit < kPair ? kPair : fit;
}

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles lie `apart` numbers apart, their rows `row` bytes.
template <class T>
inline void store_tiles(T* sums, int64_t apart, int64_t row) {
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + apart, row);
  _tile_stored(2, sums + 2 * apart, row);
  _tile_stored(3, sums + 3 * apart, row);
}

}  // namespace
}  // namespace quant

#endif  // QUANT_TILES_H_
