// Where the tokens and channels of a page lie in shared memory. Pure integers, for host and device.
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

#include "schedule.h"

namespace quant {

QUANT_BOTH int token_of_slot(int slot) { return slot % 16 * 4 + slot / 16; }
QUANT_BOTH int slot_of_token(int token) { return token % 4 * 16 + token / 4; }
QUANT_BOTH int column_of_slot(int slot) {
  const int h = slot / 16 % 2, q = slot / 4 % 4, b = slot % 4;
  return slot / 32 * 32 + 8 * (2 * h + b / 2) + 2 * q + b % 2;
}
// Of a byte in a tile of rows of 128 bytes, as MMAs read it (eight rows are 1024 bytes).
QUANT_BOTH int swizzled_place(int row, int byte) { return row * 128 + (byte ^ (row & 7) << 4); }

// A piece of work of the threads that unpack keys: 16 bytes of a token. Eight threads in turn read
// 128 bytes in different banks, and write to different banks.
struct KeyChunk {
  int token, chunk;
};
template <int kDim>
QUANT_BOTH KeyChunk key_chunk(int index) {
  constexpr int kChunks = kDim / 32;  // of a token
  constexpr int kApart = kDim == 64 ? 17 : 33;
  const int group = index / 8, within = index % 8;
  return {group ^ within / kChunks * kApart, within % kChunks};
}

// Of those that transpose values: lane % 4 says which 16 slots, and a word of four bytes is read of
// every token.
template <int kDim>
QUANT_BOTH int value_word(int lane, int round) {
  constexpr int kRounds = kDim / 64;
  return lane / 4 + 8 * ((round + lane % 4 * kRounds / 4) % kRounds);
}

}  // namespace quant
