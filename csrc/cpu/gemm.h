// What the GEMM's driver (gemm.cpp) and its kernels agree on.
//
// A weight [N, K] is cut into blocks of 64 outputs. A kernel computes the sums of one block and
// some tokens; the epilogue (epilogue_kernels.cpp) makes outputs of them. Every kernel
// exists per instruction set, from the same templates, and is chosen at run time.
#ifndef QUANT_GEMM_H_
#define QUANT_GEMM_H_

#include <cstdint>

#include "kernels.h"

namespace quant {

constexpr int kBlock = 64;
constexpr int kMostBlocks = 5;  // of an item: four, or two of the gate and three that hold up
constexpr int kFp8Rows = 8;     // unpacked together over all of K
constexpr int kSpan = 128;
constexpr int kRange = 48;  // tokens: tiles of one to four, six and eight divide it

// group_size: K where there is one scale an output.
struct Gemm : QuantCpuGemm {
  bool per_channel;

  explicit Gemm(const QuantCpuGemm& call) : QuantCpuGemm(call), per_channel(call.group_size < 0) {
    if (per_channel) group_size = k;
  }
  int64_t groups() const { return per_channel ? 1 : k / group_size; }
  int64_t pairs() const { return (groups() + 1) / 2; }
  int64_t spans() const { return (k + kSpan - 1) / kSpan; }
  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }
};

// The blocks that an item multiplies by the same tokens, and the one to fetch ahead, or -1.
struct Blocks {
  int64_t at[kMostBlocks];
  int count;
  int64_t next;
};

// Lines of the weight that will be read soon, fetched into the L2 cache one a step: what goes on to
// L1 holds a fill buffer until memory has answered, and tokens that come from L2 wait for one.
struct Ahead {
  const uint8_t* at;
  int64_t lines;  // at most; 0 for none

  Ahead next(int64_t steps) {
    const Ahead part = {at, lines < steps ? lines : steps};
    at += part.lines * 64;
    lines -= part.lines;
    return part;
  }
};

// The kernels of one instruction set and one kind of number.
struct Kernels {
  int blocks;    // that an item of many tokens takes, at most four
  int together;  // tokens that `prepare` takes, the first of which is a multiple of it
  int tile;      // tokens that a range is a multiple of
  // Tokens that share unpacked weights, at most: what belongs to them stays in the L2 cache.
  int64_t (*most_tokens)(const Gemm&);
  // Bytes that `prepare` writes for a token, and scratch bytes of a thread.
  int64_t (*token_bytes)(const Gemm&);
  int64_t (*scratch_bytes)(const Gemm&);
  void (*prepare)(const Gemm&, int64_t first, uint8_t* prepared);
  // The sums [tokens, 64], INT32 or FP32, of every block, `apart` bytes from one to the next.
  void (*multiply)(const Gemm&, const Blocks&, int64_t first, int tokens, const uint8_t* prepared,
                   uint8_t* scratch, uint8_t* sums, int64_t apart);
};

extern const Kernels kInt8Portable, kFp32Portable;
#if defined(__x86_64__)
extern const Kernels kInt8Avx2, kInt8AvxVnni, kInt8Avx512, kInt8Amx;
extern const Kernels kFp32Avx2, kFp32Avx512, kBf16Avx512, kBf16Amx;
#endif

// The kernels for these numbers on this machine; null where $QUANT_CPU_ISA names what it lacks.
const Kernels* kernels_for(bool int8, bool exact_in_bf16);

// How the levels of an FP8 weight's span are found.
struct Kind {
  bool apart = false;   // in more than one group, so that every nibble of a word has its own table
  bool scaled = false;  // and multiplied, which instruction sets that have FP32 tables do in them
};

// E4M3's values, and the levels E4M3(q t) of every positive E4M3 scale t, by code; q = -8..7. Of
// BF16 levels also all upper bytes, then all lower ones.
struct Fp8Tables {
  float value[256], levels[128][16];
  uint16_t value_bf16[256], levels_bf16[128][16];
  uint8_t level_bytes[128][2][16];
};
extern const Fp8Tables kFp8Tables;

}  // namespace quant

#endif  // QUANT_GEMM_H_
