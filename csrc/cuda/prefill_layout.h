// Where the tokens and channels of a page lie in shared memory. Pure integers, for host and
// device; bits and not quotients, since the compiler does not know that they are not negative.
//
// The accumulator of S [64, 64] gives a thread, q = lane % 4, columns 8 i + 2 q + e of two rows;
// as P they must be the A fragment of an 8-bit MMA, where it holds k = 16 h + 4 q + b of every 32.
// No register moves: column c of S (row c of the tile of K) holds what is called slot k of P (and
// of V^T), where, of every 32,
//
//     c = 8 (2 h + b / 2) + 2 q + b % 2        <->        k = 16 h + 4 q + b
//
// The sum over slots does not care which token a slot is. Slot k is token 4 (k % 16) + k / 16: so a
// thread that transposes V reads every fourth token, and those that work at the same time meet
// different banks. Scales are stored by slots: four neighbours are four of a thread's columns.
#pragma once

#include "cuda/decode_schedule.h"

namespace quant {

QUANT_BOTH int token_of_slot(int slot) { return (slot & 15) << 2 | slot >> 4; }
QUANT_BOTH int slot_of_token(int token) { return (token & 3) << 4 | token >> 2; }
QUANT_BOTH int column_of_slot(int slot) {
  const int h = slot >> 4 & 1, q = slot >> 2 & 3, b = slot & 3;
  return (slot & 32) | h << 4 | (b >> 1) << 3 | q << 1 | (b & 1);
}
// Of a byte in a tile of rows of 64 or 128 bytes, as MMAs read it.
template <int kRow>
QUANT_BOTH int swizzled_place(int row, int byte) {
  static_assert(kRow == 64 || kRow == 128, "");
  return row * kRow + (byte ^ (kRow == 64 ? row >> 1 & 3 : row & 7) << 4);
}

// A page of a KV head as MMAs read it; in global memory what it is in shared memory, so that bulk
// copies bring it there:
//
//     K [64, D] | V^T [D, 64] | planes
//
// planes: K scale and offset, V weight and offset of every slot, and from P V to O, all FP32. An
// image is a whole number of lines of 128 bytes.
template <int kDim>
struct PageImage {
  static constexpr int kKeyRow = kDim == 64 ? 64 : 128, kValueRow = 64;  // bytes, of the tiles
  static constexpr int kTileBytes = kPage * kDim;
  static constexpr int kBack = 4 * kPage, kPlaneBytes = 4 * kBack + 128;
  static constexpr int kBytes = 2 * kTileBytes + kPlaneBytes;
};

// A piece of work of the threads that unpack keys: 16 bytes of a token. Eight threads in turn read
// 128 bytes in different banks, and write to different banks.
struct KeyChunk {
  int token, chunk;
};
template <int kDim>
QUANT_BOTH KeyChunk key_chunk(int index) {
  constexpr int kBits = kDim == 64 ? 1 : kDim == 128 ? 2 : 3;  // of the chunk of a token
  constexpr int kApart = kDim == 64 ? 17 : 33;
  const int group = index >> 3, within = index & 7;
  return {group ^ (within >> kBits) * kApart, within & ((1 << kBits) - 1)};
}

// Of those that transpose values: lane % 4 says which 16 slots, and a word of four bytes is read of
// every token.
template <int kDim>
QUANT_BOTH int value_word(int lane, int round) {
  constexpr int kRounds = kDim / 64;
  return lane >> 2 | ((round + ((lane & 3) * kRounds >> 2)) & (kRounds - 1)) << 3;
}

}  // namespace quant
