// How INT4 codes become the operand of an 8-bit MMA, in registers.
//
// A thread's share of a WGMMA operand A [64, 32] of bytes, thread t of the warpgroup, w = t / 32,
// l = t % 32, r = 16 w + l / 4, k = 4 (l % 4):
//
//     register 0: row r,     k .. k + 3         2: row r,     k + 16 .. k + 19
//     register 1: row r + 8, k .. k + 3         3: row r + 8, k + 16 .. k + 19
//
// A 32-bit word of the weight holds the eight codes of registers 0 and 2 (of `low` and `high`), or
// of 1 and 3: one row, so one group scale a word. Where a code's bits lie in the word is chosen for
// the fewest instructions; fragments.py writes them so. Instructions for eight weights:
//
//   HighNibble  3   INT8, a scale a row: q in the upper half of a byte is 16 q
//   TwoLevel    7   INT8, u = q + 8 and t in 1..16: (t u + 128 - 8 t) ^ 128 is t q in two's
//                   complement; no byte overflows into the next, so one multiply-add does four
//                   (the idea of LiquidQuant, LiquidGEMM section 4)
//   Raw         3   E4M3, |q| <= 7: a byte of sign and magnitude m is +- m 2^-9, exactly
//   RawAll      6   the same with q = -8: the word has |q| - 1 of a negative q, to which its sign,
//                   seven bits further up, is added: eight sums of four bits in one word
//   Lookup      7   E4M3(q t), |q| <= 7: PRMT picks four bytes out of the eight of {0, t, .. 7 t}
//   LookupAll   9   the same with q = -8, out of two tables of eight. Where bit 3 of an index is
//                   set, PRMT gives the sign of a byte, eight times. So one table gives a byte, and
//                   the other, asked with bit 3 flipped, zeros or ones: ones where the byte is kept
//                   with its bits flipped. XOR joins them
//
// PRMT, LOP3 and shifts share 64 lanes of a multiprocessor; multiplications have 64 others, and
// LookupAll leaves two of its nine to those.
#pragma once

#include "cuda/sm90.cuh"

namespace quant {

using namespace sm90;

constexpr uint32_t kBytes = 0x01010101;  // times a byte: the byte four times

// (a & b) | c and a ? b : c, as tables of lop3.
constexpr int kAndOr = (0xF0 & 0xCC) | 0xAA;
constexpr int kSelect = (0xF0 & 0xCC) | (0x0F & 0xAA);

// --- the lookup tables of a group scale ---
// E4M3 of t times 0 .. 3, 4 .. 7, -8 .. -5 and, all bits flipped, -4 .. -1. Lookup has 0 .. 7 in
// its table; of LookupAll's, the one has 0 .. 3 and -8 .. -5, the other the rest.
struct Table {
  uint32_t from_0, from_4, from_minus_8, flipped_from_minus_4;
};

// The table of an E4M3 scale. Products are rounded to nearest, ties to even, as formats.py has it.
QUANT_DEVICE float e4m3_to_float(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  float size = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa);
  for (uint32_t i = 1; i < exponent; ++i) size *= 2.0f;
  return size * 0x1p-9f;
}
QUANT_DEVICE Table make_table(uint32_t code) {
  const float t = e4m3_to_float(code);
  return {to_e4m3(0.0f, t, 2 * t, 3 * t), to_e4m3(4 * t, 5 * t, 6 * t, 7 * t),
          to_e4m3(-8 * t, -7 * t, -6 * t, -5 * t), ~to_e4m3(-4 * t, -3 * t, -2 * t, -t)};
}

// --- conversions: word -> low, high ---
struct HighNibble {
  using Type = Int8;
  static constexpr float kUnit = 1.0f / 16;
  static QUANT_DEVICE void convert(uint32_t word, uint32_t& low, uint32_t& high) {
    low = word & 0xF0F0F0F0;
    high = (word << 4) & 0xF0F0F0F0;
  }
};

struct TwoLevel {
  using Type = Int8;
  static constexpr float kUnit = 1;
  static QUANT_DEVICE void convert(uint32_t word, uint32_t t, uint32_t offset, uint32_t& low,
                                   uint32_t& high) {
    low = ((word & 0x0F0F0F0F) * t + offset) ^ 0x80808080;
    high = ((word >> 4 & 0x0F0F0F0F) * t + offset) ^ 0x80808080;
  }
  static QUANT_DEVICE uint32_t offset(uint32_t t) { return 0x80808080 - t * (8 * kBytes); }
};

struct Raw {
  using Type = E4M3;
  static constexpr float kUnit = 512;
  static QUANT_DEVICE void convert(uint32_t word, uint32_t& low, uint32_t& high) {
    low = word & 0x87878787;
    high = rotate_right(word, 4) & 0x87878787;
  }
};

struct RawAll {
  using Type = E4M3;
  static constexpr float kUnit = Raw::kUnit;
  static QUANT_DEVICE void convert(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t signs = word & 0x88888888;
    const uint32_t sizes = (word - signs) + rotate_right(signs, 7);
    low = lop3<kSelect>(0x0F0F0F0F, sizes, signs);
    high = rotate_right(lop3<kSelect>(0xF0F0F0F0, sizes, signs), 4);
  }
};

struct Lookup {
  using Type = E4M3;
  static QUANT_DEVICE void convert(uint32_t word, const Table& table, uint32_t& low,
                                   uint32_t& high) {
    const uint32_t index = word & 0x77777777;
    low = lop3<kAndOr>(word, 0x80808080, permute(table.from_0, table.from_4, index));
    high = lop3<kAndOr>(word << 4, 0x80808080, permute(table.from_0, table.from_4, index >> 16));
  }
};

struct LookupAll {
  using Type = E4M3;
  static QUANT_DEVICE void convert(uint32_t word, const Table& table, uint32_t& low,
                                   uint32_t& high) {
    const uint32_t other = word ^ 0x88888888;
    low = bytes(table, word, other);
    high = bytes(table, upper_half(word), upper_half(other));
  }
  static QUANT_DEVICE uint32_t bytes(const Table& table, uint32_t index, uint32_t other) {
    return permute(table.from_0, table.from_minus_8, index) ^
           permute(table.from_4, table.flipped_from_minus_4, other);
  }
};

}  // namespace quant
