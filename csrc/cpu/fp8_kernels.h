// The FP8 kernel of a block: y[m, n] = sum_k x[m, k] P(q, t)[n, k], products exact, sums in FP32.
//
// E4M3 codes and the operands of `lut` are BF16 numbers, so that BF16 dot products lose nothing;
// the operands q t of grouped `exact` are FP32. A lane sums the columns that fall to it, in order,
// and the lanes are added at the end: the order of a sum depends on K alone.
//
// Codes b = q + 8 lie in rows of eight outputs, codes [N / 8, spans, 8, 64 bytes]: nibble j of
// 16-bit word w of a span is column 32 j + w. A group has the 16 levels P(-8, t) .. P(7, t), and a
// nibble is looked up in them, all nibbles of one j together. t [N / 8, G, 8]: E4M3 codes for lut,
// FP32 for exact, nothing for one scale an output. Columns from K to the span's end have q = 0.
//
// An instruction set gives, before it includes this file: Operand (float, or uint16_t for BF16),
// Sum, kColumnsAtOnce, kTileTokens, kTileRows, zero, operand, dot, total, look_up. As in
// int8_kernels.h, nothing here may call a function template of the standard library.
#include <cstring>

#include "epilogue.h"
#include "gemm.h"

namespace quant {
namespace {

constexpr int kRows = kFp8Rows;
constexpr uint8_t kOne = 0x38;  // 1, as an E4M3 code
constexpr int kAhead = 1024;    // bytes of codes, fetched before their turn

int64_t fp8_token_bytes(const Gemm& g) {
  return static_cast<int64_t>(sizeof(Operand)) * g.spans() * kSpan;
}
int64_t fp8_most_tokens(const Gemm& g) { return (1 << 20) / (g.k + 4 * kBlock); }
int64_t fp8_scratch_bytes(const Gemm& g) { return kRows * fp8_token_bytes(g); }

inline const float* values(float) { return kFp8Tables.value; }
inline const uint16_t* values(uint16_t) { return kFp8Tables.value_bf16; }
inline const float* levels_of(uint8_t t, float) { return kFp8Tables.levels[t & 127]; }
inline const uint16_t* levels_of(uint8_t t, uint16_t) { return kFp8Tables.levels_bf16[t & 127]; }

// Prepared tokens: the operands, zero from K to the end of the last span.
void fp8_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  const uint8_t* x = g.x + token * g.x_stride;
  Operand* to = reinterpret_cast<Operand*>(prepared + token * fp8_token_bytes(g));
  const Operand* value = values(Operand());
  for (int64_t k = 0; k < g.k; ++k) to[k] = value[x[k]];
  for (int64_t k = g.k; k < g.spans() * kSpan; ++k) to[k] = Operand();
}

// The way from codes to operands; what would have to be divided is divided once.
class Unpacking {
 public:
  explicit Unpacking(const Gemm& g)
      : codes_(g.codes),
        t_(g.per_channel ? nullptr : g.t),
        exact_(g.numerics == QUANT_CPU_EXACT),
        spans_(g.spans()),
        groups_(g.groups()),
        shift_(g.per_channel ? 62 : __builtin_ctzll(static_cast<uint64_t>(g.group_size))) {}

  // 128 columns of eight rows, `row` numbers from one to the next, every 32 columns `apart`.
  void eight(int64_t eight, int64_t span, Operand* operands, int64_t row, int64_t apart) const {
    const uint8_t* words = codes_ + (eight * spans_ + span) * kRows * (kSpan / 2);
    Operand own[16];
    if (t_ == nullptr || shift_ >= kSpanShift) {
      const int64_t group = eight * groups_ + (span * kSpan >> shift_);
      for (int i = 0; i < kRows; ++i, words += kSpan / 2, operands += row) {
        __builtin_prefetch(words + kAhead);
        const Operand* all = levels(group, i, own);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) look_up(words, j, all, operands + j * apart);
      }
      return;
    }
    for (int i = 0; i < kRows; ++i, words += kSpan / 2, operands += row) {
      __builtin_prefetch(words + kAhead);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        int64_t group = (span * kSpan + 32 * j) >> shift_;
        if (group >= groups_) group = groups_ - 1;  // beyond K: q = 0, and any levels will do
        look_up(words, j, levels(eight * groups_ + group, i, own), operands + j * apart);
      }
    }
  }

  // Eight rows -> operands [8, K to the end of the last span].
  void rows(int64_t eight_rows, Operand* operands) const {
    for (int64_t span = 0; span < spans_; ++span) {
      eight(eight_rows, span, operands + span * kSpan, spans_ * kSpan, 32);
    }
  }

 private:
  static constexpr int kSpanShift = 7;
  static_assert(kSpan == 1 << kSpanShift, "columns of a span");

  // Of one group of one row of eight; `own` is room for those that no table holds.
  const Operand* levels(int64_t group, int row, Operand* own) const {
    if (t_ == nullptr) return levels_of(kOne, Operand());
    if (!exact_) {
      return levels_of(static_cast<const uint8_t*>(t_)[group * kRows + row], Operand());
    }
    const float scale = static_cast<const float*>(t_)[group * kRows + row];
    for (int q = 0; q < 16; ++q) own[q] = static_cast<Operand>(static_cast<float>(q - 8) * scale);
    return own;
  }

  const uint8_t* const codes_;
  const void* const t_;  // null with one scale an output
  const bool exact_;
  const int64_t spans_, groups_;
  const int shift_;
};

// sums[m, r] = sum_k x[m, k] w[r, k]. `ahead` is the part of the weight that will be read next.
template <int Tokens>
__attribute__((noinline)) void fp8_tile(const Operand* w, const Operand* x, int64_t columns,
                                        float* sums, const uint8_t* ahead) {
  Sum sum[Tokens][kTileRows];
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) sum[m][r] = zero();
  }
  for (int64_t k = 0; k < columns; k += kColumnsAtOnce) {
    __builtin_prefetch(ahead + k * kTileRows / 2);
    __builtin_prefetch(ahead + k * kTileRows / 2 + 64);
    Sum token[Tokens];
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) token[m] = operand(x + m * columns + k);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Sum weight = operand(w + r * columns + k);
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) dot(sum[m][r], weight, token[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) sums[m * kBlock + r] = total(sum[m][r]);
  }
}

// As many tokens as a tile takes, at most Tokens; returns their number.
template <int Tokens>
int fp8_tiles(int left, const Operand* w, const Operand* x, int64_t columns, float* sums,
              const uint8_t* ahead) {
  if constexpr (Tokens > 1) {
    if (left < Tokens) return fp8_tiles<Tokens - 1>(left, w, x, columns, sums, ahead);
  }
  for (int r = 0; r < kRows; r += kTileRows) {
    fp8_tile<Tokens>(w + r * columns, x, columns, sums + r, ahead + r * columns / 2);
  }
  return Tokens;
}

void fp8_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                  const uint8_t* prepared, uint8_t* scratch, uint8_t* to, int64_t apart) {
  constexpr int kParts = kBlock / kRows;
  const int64_t columns = g.spans() * kSpan;
  const int64_t code_bytes = kRows * columns / 2;
  const Unpacking unpacking(g);
  Operand* operands = reinterpret_cast<Operand*>(scratch);
  const Operand* x = reinterpret_cast<const Operand*>(prepared) + first * columns;
  for (int i = 0; i < blocks.count; ++i) {
    const int64_t next = i + 1 < blocks.count ? blocks.at[i + 1] : blocks.next;
    for (int64_t part = blocks.at[i] * kParts; part < (blocks.at[i] + 1) * kParts; ++part) {
      unpacking.rows(part, operands);
      int64_t ahead = part + 1;
      if (ahead % kParts == 0) ahead = next < 0 ? part : next * kParts;
      float* sums = reinterpret_cast<float*>(to + i * apart) + part % kParts * kRows;
      for (int m = 0; m < tokens;) {
        m += fp8_tiles<kTileTokens>(tokens - m, operands, x + m * columns, columns,
                                    sums + m * kBlock, g.codes + ahead * code_bytes);
      }
    }
  }
}

// Evaluated by the compiler: nothing of this file may run where the machine lacks its instructions.
constexpr Kernels fp8_kernels() noexcept {
  return {1,
          1,
          fp8_most_tokens,
          fp8_token_bytes,
          fp8_scratch_bytes,
          fp8_prepare,
          fp8_multiply,
          scale_sums<float>,
          silu_mul,
          load_row,
          store_row,
          add};
}

}  // namespace
}  // namespace quant
