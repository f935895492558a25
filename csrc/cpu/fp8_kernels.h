// The FP8 kernel of a block: y[m, n] = sum_k x[m, k] P(q, t)[n, k], products exact, sums in FP32.
//
// E4M3 codes and the operands of `lut` are BF16 numbers, so that BF16 dot products lose nothing;
// the operands q t of grouped `exact` are FP32. A lane sums the columns that fall to it, in order,
// and the lanes are added at the end: the order of a sum depends on K alone.
//
// Codes b = q + 8 lie in rows of eight outputs, codes [N / 8, spans, 8, 64 bytes]: nibble j of
// 16-bit word w of a span is column 32 j + w. A group has the 16 levels P(-8, t) .. P(7, t), and
// the nibbles of many columns are looked up in them together. Operands and tokens lie in the order
// in which they come out (column_of): [spans, kFours, 4, lanes].
// t [N / 8, G, 8]: E4M3 codes for lut, FP32 for exact, nothing for one scale an output. Columns
// from K to the span's end have q = 0.
//
// For few tokens, operands are made in registers (`fp8_stream`). For more, eight rows' operands of
// kColumns columns are made in the L1 cache and multiplied by all tokens (`fp8_tile`), whose sums,
// a vector each, wait in the L2 cache for the next columns.
//
// An instruction set gives, before it includes this file: Operand (float, or uint16_t for BF16),
// Level (what tables of 16 levels are made of), Sum, Table, kColumnsAtOnce, kTileTokens, kTileRows,
// kStreamSums, zero, operand, store, dot, total, table_at, column_of, look_up; and fp8_stream after
// it, or fp8_words.h. As in int8_sums.h, nothing here may call a function template of the standard
// library.
#include <cstring>

#include "gemm.h"

namespace quant {
namespace {

constexpr int kRows = kFp8Rows;
constexpr int kRowBytes = kSpan / 2;         // of codes, of a span
constexpr int kFours = 32 / kColumnsAtOnce;  // fours of vectors of their operands
constexpr int kColumns = 6 * kSpan;          // made together: 24 KiB of eight rows in FP32
constexpr int kMostTokens = 96;              // whose columns and sums stay in the L2 cache
constexpr int kStreamTokens = 2;             // what belongs to more leaves the L1 cache
constexpr uint8_t kOne = 0x38;               // 1, as an E4M3 code
constexpr int kAhead = 1024;                 // bytes of codes, fetched before their turn

int64_t fp8_columns(const Gemm& g) { return g.spans() * kSpan; }
int64_t fp8_token_bytes(const Gemm& g) {
  return static_cast<int64_t>(sizeof(Operand)) * fp8_columns(g);
}
int64_t fp8_most_tokens(const Gemm&) { return kMostTokens; }
int64_t fp8_scratch_bytes(const Gemm&) {
  return static_cast<int64_t>(sizeof(Operand)) * kRows * kColumns +
         static_cast<int64_t>(sizeof(Sum)) * kBlock * kMostTokens;
}

inline const float* values(float) { return kFp8Tables.value; }
inline const uint16_t* values(uint16_t) { return kFp8Tables.value_bf16; }
inline const float* levels_of(uint8_t t, float) { return kFp8Tables.levels[t & 127]; }
inline const uint16_t* levels_of(uint8_t t, uint16_t) { return kFp8Tables.levels_bf16[t & 127]; }
inline const uint8_t* levels_of(uint8_t t, uint8_t) { return kFp8Tables.level_bytes[t & 127][0]; }

// Columns of a span in the order of operands.
struct Order {
  uint8_t of[kSpan] = {};

  constexpr Order() {
    for (int i = 0; i < kSpan; ++i) {
      of[i] = static_cast<uint8_t>(column_of(i / kColumnsAtOnce, i % kColumnsAtOnce));
    }
  }
};
constexpr Order kOrder;

// Prepared tokens: the operands in their order, zero from K to the end of the last span.
void fp8_prepare(const Gemm& g, int64_t token, uint8_t* prepared) {
  const uint8_t* x = g.x + token * g.x_stride;
  Operand* to = reinterpret_cast<Operand*>(prepared + token * fp8_token_bytes(g));
  const Operand* value = values(Operand());
  for (int64_t span = 0; span < fp8_columns(g); span += kSpan, to += kSpan) {
    for (int i = 0; i < kSpan; ++i) {
      const int64_t k = span + kOrder.of[i];
      to[i] = k < g.k ? value[x[k]] : Operand();
    }
  }
}

// The levels of a row's span: of[j] are those of its nibbles j, or of[0] of all.
struct Levels {
  const Level* of[4];
  float scale[4];
  Kind kind;
  Level own[4][16];

  Table table(int j) const { return table_at(of[kind.apart * j], scale[kind.apart * j]); }
};

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

  // [8, 64 bytes]
  const uint8_t* codes(int64_t eight, int64_t span) const {
    return codes_ + (eight * spans_ + span) * kRows * kRowBytes;
  }

  Kind kind() const { return {t_ != nullptr && shift_ < kSpanShift, t_ != nullptr && exact_}; }

  void levels(int64_t eight, int64_t span, int row, Levels& found) const {
    found.kind = kind();
    if (!found.kind.apart) {
      of_group(eight * groups_ + (span * kSpan >> shift_), row, 0, found);
      return;
    }
    for (int j = 0; j < 4; ++j) {
      int64_t group = (span * kSpan + 32 * j) >> shift_;
      if (group >= groups_) group = groups_ - 1;  // beyond K: q = 0, and any levels will do
      of_group(eight * groups_ + group, row, j, found);
    }
  }

  // 128 columns of eight rows, `row` numbers from one to the next, every vector `apart`; as many
  // codes are fetched `ahead`, and after row r, after(r) is done.
  template <class After>
  void eight(int64_t eight, int64_t span, Operand* operands, int64_t row, int64_t apart,
             const uint8_t* ahead, const After& after) const {
    const uint8_t* words = codes(eight, span);
    const auto unpack = [&](int r, Kind kind, const auto& table) __attribute__((always_inline)) {
      __builtin_prefetch(ahead + r * kRowBytes);
      for (int four = 0; four < kFours; ++four) {
        Sum some[4];
        look_up(words + r * kRowBytes, four, table, kind, some);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(operands + r * row + (4 * four + i) * apart, some[i]);
      }
      after(r);
    };
    if (const uint8_t* t = only_scales(eight, span)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Table only = table_at(levels_of(t[r], Level()), 1.0f);
        unpack(r, {}, [&](int) __attribute__((always_inline)) { return only; });
      }
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      Levels found;
      levels(eight, span, r, found);
      unpack(r, found.kind, [&](int j) __attribute__((always_inline)) { return found.table(j); });
    }
  }

  // The scales of eight rows where all of the span shares them and a table has their levels.
  const uint8_t* only_scales(int64_t eight, int64_t span) const {
    static constexpr uint8_t kOnes[kRows] = {kOne, kOne, kOne, kOne, kOne, kOne, kOne, kOne};
    if (t_ == nullptr) return kOnes;
    if (shift_ < kSpanShift || (exact_ && !kInTables)) return nullptr;
    return static_cast<const uint8_t*>(t_) + (eight * groups_ + (span * kSpan >> shift_)) * kRows;
  }

 private:
  static constexpr int kSpanShift = 7;
  static_assert(kSpan == 1 << kSpanShift, "columns of a span");
  // Groups of `exact` have FP32 operands, and their own levels.
  static constexpr bool kInTables = sizeof(Operand) == 2;

  // Of one group of one row of eight, nibbles j of which are in it.
  void of_group(int64_t group, int row, int j, Levels& found) const {
    found.scale[j] = 1.0f;
    if (t_ == nullptr) {
      found.of[j] = levels_of(kOne, Level());
    } else if (!exact_ || kInTables) {
      found.of[j] = levels_of(static_cast<const uint8_t*>(t_)[group * kRows + row], Level());
    } else {
      const float scale = static_cast<const float*>(t_)[group * kRows + row];
      if (sizeof(Level) < sizeof(Operand)) {
        found.of[j] = levels_of(kOne, Level());
        found.scale[j] = scale;
      } else {
        for (int q = 0; q < 16; ++q) {
          found.own[j][q] = static_cast<Level>(static_cast<float>(q - 8) * scale);
        }
        found.of[j] = found.own[j];
      }
    }
  }

  const uint8_t* const codes_;
  const void* const t_;  // null with one scale an output
  const bool exact_;
  const int64_t spans_, groups_;
  const int shift_;
};

// sums[m, r] = sum_k x[m, k] w[r, k] for eight rows and few tokens: fp8_words.h, or the instruction
// set's own.
template <int Tokens>
void fp8_stream(const Unpacking& unpacking, int64_t eight, int64_t spans, const Operand* x,
                float* sums);

template <int Tokens>
void fp8_streams(int tokens, const Unpacking& unpacking, int64_t eight, int64_t spans,
                 const Operand* x, float* sums) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return fp8_streams<Tokens - 1>(tokens, unpacking, eight, spans, x, sums);
  }
  fp8_stream<Tokens>(unpacking, eight, spans, x, sums);
}

// sums[m, r] += x[m, :] w[r, :], from nothing where `begin`: w [8, columns], sums [tokens, 8].
template <int Tokens>
__attribute__((noinline)) void fp8_tile(const Operand* w, int64_t columns, const Operand* x,
                                        int64_t x_row, bool begin, Sum* sums, Ahead ahead) {
  for (int first = 0; first < kRows; first += kTileRows) {
    Sum sum[Tokens][kTileRows];
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sum[m][r] = begin ? zero() : sums[m * kRows + first + r];
    }
    const Operand* rows = w + first * columns;
    const auto add_columns = [&](int64_t k) __attribute__((always_inline)) {
      Sum token[Tokens];
#pragma GCC unroll 8
      for (int m = 0; m < Tokens; ++m) token[m] = operand(x + m * x_row + k);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Sum weight = operand(rows + r * columns + k);
#pragma GCC unroll 8
        for (int m = 0; m < Tokens; ++m) dot(sum[m][r], weight, token[m]);
      }
    };
    int64_t k = 0;
    for (int64_t line = 0; line < ahead.lines && k < columns; ++line, k += kColumnsAtOnce) {
      __builtin_prefetch(ahead.at + line * 64, 0, 2);
      add_columns(k);
    }
    for (; k < columns; k += kColumnsAtOnce) add_columns(k);
#pragma GCC unroll 8
    for (int m = 0; m < Tokens; ++m) {
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) sums[m * kRows + first + r] = sum[m][r];
    }
  }
}

// As many tokens as a tile takes, at most Tokens; returns their number.
template <int Tokens>
int fp8_tiles(int left, const Operand* w, int64_t columns, const Operand* x, int64_t x_row,
              bool begin, Sum* sums, Ahead ahead) {
  if constexpr (Tokens > 1) {
    if (left < Tokens) {
      return fp8_tiles<Tokens - 1>(left, w, columns, x, x_row, begin, sums, ahead);
    }
  }
  fp8_tile<Tokens>(w, columns, x, x_row, begin, sums, ahead);
  return Tokens;
}

// The block's sums [64 / 8, tokens, 8], a vector each, and from them sums [tokens, 64].
void fp8_many(const Gemm& g, const Unpacking& unpacking, int64_t block, int64_t next, int tokens,
              const Operand* x, Operand* operands, Sum* partial, float* sums) {
  constexpr int kEights = kBlock / kRows;
  constexpr int64_t kSpans = kColumns / kSpan;
  for (int64_t span = 0; span < g.spans(); span += kSpans) {
    const int64_t spans = g.spans() - span < kSpans ? g.spans() - span : kSpans;
    for (int i = 0; i < kEights; ++i) {
      const int64_t eight = block * kEights + i;
      for (int64_t j = 0; j < spans; ++j) {
        unpacking.eight(eight, span + j, operands + j * kSpan, spans * kSpan, kColumnsAtOnce,
                        unpacking.codes(eight, span + j) + kAhead, [](int) {});
      }
      // What is read next: eight more rows, more columns, or another block.
      Ahead ahead = {unpacking.codes(eight + 1, span), spans * kRows};
      if (i + 1 == kEights && span + spans < g.spans()) {
        ahead.at = unpacking.codes(block * kEights, span + spans);
      } else if (i + 1 == kEights) {
        ahead = next < 0 ? Ahead{} : Ahead{unpacking.codes(next * kEights, 0), spans * kRows};
      }
      const int64_t part = (ahead.lines * kTileTokens + tokens - 1) / tokens;
      for (int m = 0; m < tokens;) {
        m += fp8_tiles<kTileTokens>(
            tokens - m, operands, spans * kSpan, x + m * fp8_columns(g) + span * kSpan,
            fp8_columns(g), span == 0, partial + (i * tokens + m) * kRows, ahead.next(part));
      }
    }
  }
  for (int i = 0; i < kEights; ++i) {
    for (int m = 0; m < tokens; ++m) {
      for (int r = 0; r < kRows; ++r) {
        sums[m * kBlock + i * kRows + r] = total(partial[(i * tokens + m) * kRows + r]);
      }
    }
  }
}

void fp8_multiply(const Gemm& g, const Blocks& blocks, int64_t first, int tokens,
                  const uint8_t* prepared, uint8_t* scratch, uint8_t* to, int64_t apart) {
  constexpr int kEights = kBlock / kRows;
  const Unpacking unpacking(g);
  const Operand* x = reinterpret_cast<const Operand*>(prepared) + first * fp8_columns(g);
  Sum* partial = reinterpret_cast<Sum*>(scratch);
  Operand* operands = reinterpret_cast<Operand*>(partial + kBlock * kMostTokens);
  for (int i = 0; i < blocks.count; ++i) {
    const int64_t block = blocks.at[i];
    const int64_t next = i + 1 < blocks.count ? blocks.at[i + 1] : blocks.next;
    float* sums = reinterpret_cast<float*>(to + i * apart);
    if (tokens > kStreamTokens) {
      fp8_many(g, unpacking, block, next, tokens, x, operands, partial, sums);
      continue;
    }
    for (int j = 0; j < kEights; ++j) {
      fp8_streams<kStreamTokens>(tokens, unpacking, block * kEights + j, g.spans(), x,
                                 sums + j * kRows);
    }
  }
}

// Evaluated by the compiler: nothing of this file may run where the machine lacks its instructions.
constexpr Kernels fp8_kernels() noexcept {
  return {1,           1,           kRange, fp8_most_tokens, fp8_token_bytes, fp8_scratch_bytes,
          fp8_prepare, fp8_multiply};
}

}  // namespace
}  // namespace quant
