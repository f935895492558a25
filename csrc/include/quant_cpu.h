// The C ABI of libquant_cpu.so.
//
// Every function that can fail returns a QuantCpuStatus and writes nothing unless that is
// QUANT_CPU_OK. Sizes and strides count elements. Nothing keeps a pointer of the caller's. Ops take
// their arguments as one struct, all of whose fields have eight bytes.
#ifndef QUANT_CPU_H_
#define QUANT_CPU_H_

#include <stdint.h>

#define QUANT_CPU_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CPU_ABI_VERSION 6

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCpuStatus {
  QUANT_CPU_OK = 0,
  QUANT_CPU_NULL_POINTER = 1,
  QUANT_CPU_NEGATIVE_SIZE = 2,
  QUANT_CPU_COLUMNS_OUT_OF_RANGE = 3,
  QUANT_CPU_UNKNOWN_TYPE = 4,
  QUANT_CPU_RAGGED_GROUPS = 5,
  QUANT_CPU_NOT_A_PAIR = 6,
  QUANT_CPU_OUT_OF_MEMORY = 7,
  QUANT_CPU_ISA_UNAVAILABLE = 8,
  QUANT_CPU_INDEX_OUT_OF_RANGE = 9,
  QUANT_CPU_BAD_HEADS = 10,
  QUANT_CPU_UNKNOWN_OP = 11,
};

// INT4: of a KV cache, codes with scales and offsets.
enum QuantCpuType {
  QUANT_CPU_FP32 = 0,
  QUANT_CPU_BF16 = 1,
  QUANT_CPU_FP16 = 2,
  QUANT_CPU_INT4 = 3
};

// What a GEMM multiplies: INT8 codes with q t, or E4M3 codes with E4M3(q t) or with q t in FP32.
enum QuantCpuNumerics { QUANT_CPU_INT8 = 0, QUANT_CPU_LUT = 1, QUANT_CPU_EXACT = 2 };

// QUANT_CPU_ABI_VERSION of the library, as opposed to that of this header.
QUANT_CPU_API int quant_cpu_abi_version(void);

// One English sentence for a status; static storage, never null.
QUANT_CPU_API const char* quant_cpu_error_string(int status);

// INT4 codes out of the compressed-tensors "pack-quantized" layout:
//
//   codes[n, k] = ((packed[n, k / 8] >> 4 (k mod 8)) & 15) - 8        in -8..7
//
// packed [rows, words_per_row] and codes [rows, columns] are row-major and dense, and must not
// overlap. 0 <= columns <= 8 * words_per_row: nibbles at and beyond `columns` are padding and are
// not read out. Pointers may be null where rows or columns is 0.
QUANT_CPU_API int quant_cpu_unpack_int4(const int32_t* packed, int64_t rows, int64_t words_per_row,
                                        int64_t columns, int8_t* codes);

// The values of E4M3 codes (1 sign, 4 exponent, 3 mantissa bits, bias 7; no infinities):
//
//   values[i] = +-2^(e - 7) (1 + m / 8), or +-2^-6 m / 8 where e = 0; NaN where e = 15 and m = 7
//
// codes and values [count] are dense and must not overlap. Pointers may be null where count is 0.
QUANT_CPU_API int quant_cpu_e4m3_to_float(const uint8_t* codes, int64_t count, float* values);

// Instruction sets that this machine runs, best first, separated by spaces, out of amx,
// avx512_vnni, avx_vnni, avx2, portable; static storage.
QUANT_CPU_API const char* quant_cpu_isas(void);

// The one in use: that of quant_cpu_set_isa, of the environment's QUANT_CPU_ISA, or the best; empty
// where QUANT_CPU_ISA names none of quant_cpu_isas.
QUANT_CPU_API const char* quant_cpu_isa(void);

// Use this instruction set from now on; null or "": the environment's or the best again.
QUANT_CPU_API int quant_cpu_set_isa(const char* name);

// Y = X W^T with INT4 weights in blocks, codes and scales as quant_kernels/packing.py lays them
// out:
//
//   y[m, n] = sum_k x[m, k] P(q, t)[n, k] * x_scale[m] * c[n] (+ bias[n]) (+ residual[m, n])
//
// x [m, k] are INT8 or E4M3 codes, as `numerics` says. group_size is 32, 64 or 128 and divides k,
// or negative for one scale an output; t may then be null. k is a multiple of 8. silu_mul: y
// becomes silu(y[:, :n / 2]) * y[:, n / 2:], and out is [m, n / 2]; no residual then. Strides are
// those of the first dimension; the last is dense. bias [n] and residual [m, n] may be null, and
// residual may be out. An INT8 sum is exact where it fits INT32; FP32 sums depend neither on m nor
// on `threads`. Memory for intermediate results belongs to the calling thread, which keeps it.
typedef struct QuantCpuGemm {
  const uint8_t* x;
  int64_t x_stride;
  const float* x_scale;
  int64_t x_scale_stride;
  const uint8_t* codes;
  const void* t;
  const float* c;
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t group_size;
  int64_t numerics;  // QuantCpuNumerics
  void* out;
  int64_t out_stride;
  int64_t out_type;  // QuantCpuType
  const void* bias;
  int64_t bias_type;
  const void* residual;
  int64_t residual_stride;
  int64_t residual_type;
  int64_t silu_mul;
  int64_t threads;
} QuantCpuGemm;

QUANT_CPU_API int quant_cpu_gemm(const QuantCpuGemm* call);

// --- Activations, RoPE and attention over the INT4 cache ----------------------------------------
//
// What they compute is defined in quant_kernels/reference.py and reference_attention.py. Rows are
// `..._row` (or `_token`, `_head`) elements apart, and dense inside. `threads` is the most that a
// call may use; its results do not depend on it.

enum QuantCpuCodes { QUANT_CPU_CODES_E4M3 = 0, QUANT_CPU_CODES_INT8 = 1 };

// x [rows, columns] (silu_mul: [rows, 2 columns], the gate first) -> codes [rows, columns] and one
// scale a row.
typedef struct QuantCpuTokens {
  const void* x;
  int64_t x_row;
  int64_t x_type;  // QuantCpuType
  int64_t rows;
  int64_t columns;
  void* codes;
  int64_t codes_row;
  int64_t code_type;  // QuantCpuCodes
  float* scale;
  int64_t scale_row;
  int64_t threads;
} QuantCpuTokens;

QUANT_CPU_API int quant_cpu_quantize_activation(const QuantCpuTokens* call);

// weight [columns]; residual [rows, columns] of x's type, or null, becomes x + residual.
typedef struct QuantCpuNorm {
  QuantCpuTokens tokens;
  const void* weight;
  int64_t weight_type;
  double eps;
  void* residual;
  int64_t residual_row;
} QuantCpuNorm;

QUANT_CPU_API int quant_cpu_rms_norm_quantize(const QuantCpuNorm* call);

QUANT_CPU_API int quant_cpu_silu_mul_quantize(const QuantCpuTokens* call);

// qkv [tokens, (heads + 2 kv_heads) head_dim]; positions, slots [tokens], int64 where wide, else
// int32; cos, sin [table_rows, head_dim / 2]. q_norm, k_norm [head_dim], or null; key_scale,
// key_shift [kv_heads, head_dim], or null. kv_type INT4: q [tokens, heads, head_dim] becomes E4M3
// codes, q_scale [tokens, heads] their scales, kv [2, pages, kv_heads, 64, head_dim / 2] codes and
// kv_scales [..., 2] (FP16) theirs. kv_type = qkv_type: q and kv [2, pages, kv_heads, 64, head_dim]
// become numbers of that type, and there are neither scales nor a key transform.
typedef struct QuantCpuRope {
  const void* qkv;
  int64_t qkv_row;
  int64_t qkv_type;
  const void* positions;
  int64_t wide_positions;
  const void* slots;
  int64_t wide_slots;
  const float* cos;
  int64_t cos_row;
  const float* sin;
  int64_t sin_row;
  int64_t table_rows;
  void* q;
  int64_t q_token;
  int64_t q_head;
  float* q_scale;
  int64_t q_scale_token;
  void* kv;
  uint16_t* kv_scales;
  int64_t kv_type;
  const void* q_norm;
  int64_t q_norm_type;
  const void* k_norm;
  int64_t k_norm_type;
  const float* key_scale;
  int64_t key_scale_row;
  const float* key_shift;
  int64_t key_shift_row;
  double eps;
  int64_t symmetric;
  int64_t tokens;
  int64_t pages;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t threads;
} QuantCpuRope;

QUANT_CPU_API int quant_cpu_rope_append(const QuantCpuRope* call);

// Causal attention of the last cu_seqlens[b + 1] - cu_seqlens[b] of the kv_lens[b] tokens of every
// sequence b; cu_seqlens null: of the last one. q, q_scale, kv and kv_scales as
// quant_cpu_rope_append writes them, kv_type any; block_table [batch, table_columns]; out [tokens,
// heads, head_dim]. scale: sm_scale log2(e), positive. window: 0 for none.
typedef struct QuantCpuAttention {
  const void* q;
  int64_t q_token;
  int64_t q_head;
  const float* q_scale;
  int64_t q_scale_token;
  const void* kv;
  const uint16_t* kv_scales;
  int64_t kv_type;
  const int32_t* block_table;
  int64_t table_row;
  int64_t table_columns;
  const int32_t* cu_seqlens;
  const int32_t* kv_lens;
  void* out;
  int64_t out_token;
  int64_t out_head;
  int64_t out_type;
  int64_t batch;
  int64_t tokens;
  int64_t pages;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  double scale;
  int64_t window;
  int64_t threads;
} QuantCpuAttention;

QUANT_CPU_API int quant_cpu_attention(const QuantCpuAttention* call);

// out [m, n] = x [m, k] weight [n, k]^T, all of one type: sums in FP32, in an order that depends
// neither on m nor on n nor on `threads`, rounded once. Subnormal BF16 numbers may count as zeros.
// Memory for intermediate results belongs to the calling thread, which keeps it.
typedef struct QuantCpuLinear {
  const void* x;
  int64_t x_row;
  const void* weight;
  int64_t weight_row;
  void* out;
  int64_t out_row;
  int64_t type;  // QuantCpuType
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t threads;
} QuantCpuLinear;

QUANT_CPU_API int quant_cpu_linear(const QuantCpuLinear* call);

// What rounding w [rows, columns] to a grid would lose, by group of columns / groups columns:
//
//   errors[n, G] = u^2 sum over k in G of h[k] (w[n, k] / u - nearest)^2,         u = units[n, G]
//
// nearest is the nearest integer in -8 .. 7, or, with levels [9], which ascend from 0, the nearest
// of levels[0 .. 7], their negatives, and -levels[8]. h [columns]; units (positive) and errors
// [rows, groups]; all dense. groups divides columns. Results do not depend on `threads`.
typedef struct QuantCpuGroupErrors {
  const float* w;
  const float* h;
  const float* units;
  const float* levels;
  float* errors;
  int64_t rows;
  int64_t columns;
  int64_t groups;
  int64_t threads;
} QuantCpuGroupErrors;

QUANT_CPU_API int quant_cpu_group_errors(const QuantCpuGroupErrors* call);

// Calls one after the other, as if by their caller: what a decode step does, without what it takes
// to say it anew. Stops at the first that fails, and returns its status.
enum QuantCpuOp {
  QUANT_CPU_OP_QUANTIZE_ACTIVATION = 0,
  QUANT_CPU_OP_RMS_NORM_QUANTIZE = 1,
  QUANT_CPU_OP_SILU_MUL_QUANTIZE = 2,
  QUANT_CPU_OP_GEMM = 3,
  QUANT_CPU_OP_ROPE_APPEND = 4,
  QUANT_CPU_OP_ATTENTION = 5,
  QUANT_CPU_OP_LINEAR = 6,
};

typedef struct QuantCpuCall {
  int64_t op;             // QuantCpuOp
  const void* arguments;  // its struct
} QuantCpuCall;

QUANT_CPU_API int quant_cpu_replay(const QuantCpuCall* calls, int64_t count);

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CPU_H_
