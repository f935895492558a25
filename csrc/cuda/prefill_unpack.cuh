// Packed pages of the cache to what MMAs read: 64 threads for K and its planes, as many for V.
// Codes and tiles may lie in shared or global memory.
#pragma once

#include "cuda/prefill_layout.h"
#include "cuda/prefill_tile.cuh"

namespace quant {

// --- K: rows of the tile are columns of S, bytes are channels from `first` on ---
template <class C, int kRow>
QUANT_DEVICE void store_key(char* tile, int column, int byte, const uint4& codes) {
  char* slab = tile + byte / 128 * C::kSlabBytes;
  *reinterpret_cast<uint4*>(slab + swizzled_place<kRow>(column, byte % 128)) = codes;
}
template <class C, int kRow>
QUANT_DEVICE void unpack_keys(const char* codes, char* tile, int first, int thread) {
  QUANT_UNROLL for (int i = 0; i < C::kDim / 32; ++i) {
    const KeyChunk at = key_chunk<C::kDim>(i * 64 + thread);
    const uint4 x = *reinterpret_cast<const uint4*>(codes + at.token * C::kHalf + 16 * at.chunk);
    const int column = column_of_slot(slot_of_token(at.token)), byte = first + 16 * at.chunk;
    store_key<C, kRow>(tile, column, byte,
                       {e4m3_of_low(x.x), e4m3_of_low(x.y), e4m3_of_low(x.z), e4m3_of_low(x.w)});
    store_key<C, kRow>(
        tile, column, byte + C::kHalf,
        {e4m3_of_high(x.x), e4m3_of_high(x.y), e4m3_of_high(x.z), e4m3_of_high(x.w)});
  }
}

// --- planes ---
// A token's pair; what lies behind the last key may be anything, and 0 times NaN is NaN.
QUANT_DEVICE uint32_t pair_of(const char* pairs, int token, int keys) {
  return token < keys ? reinterpret_cast<const uint32_t*>(pairs)[token] : 0;
}
// keys: of the page's tokens, those that there are, or more.
template <class C>
QUANT_DEVICE void unpack_scales(const char* of_keys, const char* of_values, int keys, float* plane,
                                int thread) {
  float largest = 0;
  QUANT_UNROLL for (int i = 0; i < 2; ++i) {
    largest = fmaxf(largest, fabsf(scale_of(pair_of(of_values, 32 * i + thread % 32, keys))));
  }
  QUANT_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
    largest = fmaxf(largest, shuffle_xor(largest, mask));
  }
  const float z = power_of_two_above(largest);
  const int token = token_of_slot(thread);
  const uint32_t key = pair_of(of_keys, token, keys), value = pair_of(of_values, token, keys);
  plane[thread] = scale_of(key) * kCodeUnit;
  plane[kPage + thread] = offset_of(key);
  plane[2 * kPage + thread] = scale_of(value) * (kRangeOfP * reciprocal_of_power_of_two(z));
  plane[3 * kPage + thread] = offset_of(value);
  if (thread == 0) plane[C::Image::kBack] = z * (kCodeUnit / kRangeOfP);
}

// --- V: rows of the tile are channels, bytes are slots from `first` on ---
// Four tokens of four bytes: x[i] byte j becomes x[j] byte i.
QUANT_DEVICE void transpose_bytes(uint32_t* x) {
  const uint32_t a = permute(x[0], x[1], 0x5140), b = permute(x[0], x[1], 0x7362);
  const uint32_t c = permute(x[2], x[3], 0x5140), d = permute(x[2], x[3], 0x7362);
  x[0] = permute(a, c, 0x5410);
  x[1] = permute(a, c, 0x7632);
  x[2] = permute(b, d, 0x5410);
  x[3] = permute(b, d, 0x7632);
}
// A round, of D / 64: sixteen tokens of eight channels, by each lane of a warp.
template <class C, int kRow>
QUANT_DEVICE void unpack_values(const char* codes, char* tile, int first, int lane, int round) {
  const int word = value_word<C::kDim>(lane, round);
  const int byte = first + ((lane & 3) << 4);
  uint32_t x[16];
  const char* from = codes + (lane & 3) * C::kHalf + 4 * word;  // slot 16 t + i is token 4 i + t
  QUANT_UNROLL for (int i = 0; i < 16; ++i) {
    x[i] = *reinterpret_cast<const uint32_t*>(from + token_of_slot(i) * C::kHalf);
  }
  QUANT_UNROLL for (int i = 0; i < 16; i += 4) transpose_bytes(x + i);
  QUANT_UNROLL for (int j = 0; j < 4; ++j) {
    const int channel = 4 * word + j;
    const uint4 low = {e4m3_of_low(x[j]), e4m3_of_low(x[4 + j]), e4m3_of_low(x[8 + j]),
                       e4m3_of_low(x[12 + j])};
    const uint4 high = {e4m3_of_high(x[j]), e4m3_of_high(x[4 + j]), e4m3_of_high(x[8 + j]),
                        e4m3_of_high(x[12 + j])};
    *reinterpret_cast<uint4*>(tile + swizzled_place<kRow>(channel, byte)) = low;
    *reinterpret_cast<uint4*>(tile + swizzled_place<kRow>(channel + C::kHalf, byte)) = high;
  }
}

}  // namespace quant
