// codes[n, k] = ((packed[n, k / 8] >> 4 (k mod 8)) & 15) - 8
//
// On a little-endian machine byte b of a row holds columns 2b (low nibble) and 2b + 1 (high
// nibble), so that a row is a run of bytes with two codes each. Compilers turn a loop over bytes
// into mask, shift, interleave and subtract on whole vector registers; they do not do so for eight
// shifts of a 32-bit word.
#include "quant_cpu.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte order of packed words");

namespace {

void unpack_row(const uint8_t* __restrict packed, int64_t columns, int8_t* __restrict codes) {
  const int64_t pairs = columns / 2;
  for (int64_t b = 0; b < pairs; ++b) {
    codes[2 * b] = static_cast<int8_t>((packed[b] & 15) - 8);
    codes[2 * b + 1] = static_cast<int8_t>((packed[b] >> 4) - 8);
  }
  if (columns % 2 != 0) {
    codes[columns - 1] = static_cast<int8_t>((packed[pairs] & 15) - 8);
  }
}

}  // namespace

int quant_cpu_unpack_int4(const int32_t* packed, int64_t rows, int64_t words_per_row,
                          int64_t columns, int8_t* codes) {
  if (rows < 0 || words_per_row < 0 || columns < 0) return QUANT_CPU_NEGATIVE_SIZE;
  // Not 8 * words_per_row, which can overflow.
  if (columns / 8 + (columns % 8 != 0) > words_per_row) return QUANT_CPU_COLUMNS_OUT_OF_RANGE;
  if (rows == 0 || columns == 0) return QUANT_CPU_OK;
  if (packed == nullptr || codes == nullptr) return QUANT_CPU_NULL_POINTER;
  for (int64_t n = 0; n < rows; ++n) {
    unpack_row(reinterpret_cast<const uint8_t*>(packed + n * words_per_row), columns,
               codes + n * columns);
  }
  return QUANT_CPU_OK;
}
