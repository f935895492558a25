// What the C functions (ops.cpp) and the kernels, compiled once per instruction set, agree on.
#ifndef QUANT_KERNELS_H_
#define QUANT_KERNELS_H_

#include <stdint.h>

#include "quant_cpu.h"

namespace quant {

constexpr int PAGE = 64;  // tokens of a page of the cache: packing.KV_PAGE
constexpr int MAX_HEAD_DIM = 256;
constexpr int SPAN_PAGES = 16;  // pages that are summed before their sum joins the others
constexpr int TILE_ROWS = 60;   // (token, query head) rows of a KV head that share its pages

constexpr int LINEAR_ROWS = 64;    // of a dense weight, that an item of work has
constexpr int LINEAR_TOKENS = 16;  // that are prepared together

// Columns of a prepared token, and bytes of LINEAR_TOKENS of them, which are FP32 or BF16. A
// thread's scratch is twice as long.
constexpr int64_t linear_columns(int64_t k) { return k > 0 ? (k + 31) / 32 * 32 : 32; }
constexpr int64_t linear_bytes(int64_t k) { return 4 * LINEAR_TOKENS * linear_columns(k); }

// LINEAR_ROWS rows of a dense weight, or what is left of them, and some tokens.
struct LinearPart {
  int64_t row, token, tokens;
};

// Rows first .. first + count - 1 of one sequence and KV head; row r is its query token r / ratio
// and query head kv_head * ratio + r % ratio.
struct Tile {
  int64_t sequence, kv_head, first, count;
};

// Sums of a GEMM, INT32 or FP32 [tokens, 64], of the block of outputs that begins with `column`;
// with silu_mul also those of the blocks that hold the same columns of up, `apart` bytes from one
// to the next.
struct BlockSums {
  int64_t column, token, tokens;
  const uint8_t *sums, *up;
  int64_t apart;
};

struct OpKernels {
  // One row; scratch: `columns` floats.
  void (*quantize)(const QuantCpuTokens& call, int64_t row);
  void (*rms_norm)(const QuantCpuNorm& call, int64_t row, float* scratch);
  void (*silu_mul)(const QuantCpuTokens& call, int64_t row, float* scratch);
  void (*rope)(const QuantCpuRope& call, int64_t token);
  // A tile over some spans of its sequence, to the end.
  void (*attend)(const QuantCpuAttention& call, const Tile& tile, int64_t first_span,
                 int64_t spans);
  // The same in parts: the sums over one span, `state_floats` of them, and what spans' sums, in
  // order and `stride` floats apart, come to.
  int64_t (*state_floats)(int64_t rows, int64_t head_dim);
  void (*attend_span)(const QuantCpuAttention& call, const Tile& tile, int64_t span, float* state);
  void (*combine)(const QuantCpuAttention& call, const Tile& tile, float* states, int64_t spans,
                  int64_t stride);
  // LINEAR_TOKENS tokens, or what is left of them, from `first` on; then a part of their product
  // with the weight. All memory is aligned to 64 bytes.
  void (*linear_prepare)(const QuantCpuLinear& call, int64_t first, uint8_t* prepared);
  void (*linear)(const QuantCpuLinear& call, const LinearPart& part, const uint8_t* prepared,
                 uint8_t* scratch);
  // A GEMM's sums to its outputs.
  void (*finish_gemm)(const QuantCpuGemm& call, const BlockSums& part);
  // One row.
  void (*group_errors)(const QuantCpuGroupErrors& call, int64_t row);
};

// Those of the instruction set in use (quant_cpu_isa); null where $QUANT_CPU_ISA names what the
// machine lacks.
const OpKernels* op_kernels();

#ifdef QUANT_ISA
namespace QUANT_ISA {
void quantize_token(const QuantCpuTokens& call, int64_t row);
void rms_norm_token(const QuantCpuNorm& call, int64_t row, float* scratch);
void silu_mul_token(const QuantCpuTokens& call, int64_t row, float* scratch);
void rope_token(const QuantCpuRope& call, int64_t token);
void attend(const QuantCpuAttention& call, const Tile& tile, int64_t first_span, int64_t spans);
int64_t state_floats(int64_t rows, int64_t head_dim);
void attend_span(const QuantCpuAttention& call, const Tile& tile, int64_t span, float* state);
void combine(const QuantCpuAttention& call, const Tile& tile, float* states, int64_t spans,
             int64_t stride);
void linear_prepare(const QuantCpuLinear& call, int64_t first, uint8_t* prepared);
void linear(const QuantCpuLinear& call, const LinearPart& part, const uint8_t* prepared,
            uint8_t* scratch);
void finish_gemm(const QuantCpuGemm& call, const BlockSums& part);
void group_errors(const QuantCpuGroupErrors& call, int64_t row);
extern const OpKernels table;
}  // namespace QUANT_ISA
#endif

}  // namespace quant

#endif  // QUANT_KERNELS_H_
