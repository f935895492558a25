// The C ABI of libquant_cuda.so. The library loads, and says what is wrong, on a machine that has
// no driver and no GPU.
//
// Every function that can fail returns a status: QUANT_CUDA_OK, or one of our own negative
// QuantCudaStatus, or a positive cudaError_t as it came.
#ifndef QUANT_CUDA_H_
#define QUANT_CUDA_H_

#define QUANT_CUDA_API __attribute__((visibility("default")))

// Goes up with every change that an already built caller would notice.
#define QUANT_CUDA_ABI_VERSION 7

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum QuantCudaStatus {
  QUANT_CUDA_OK = 0,
  QUANT_CUDA_NULL_POINTER = -1,
  QUANT_CUDA_NO_DRIVER = -2,
  QUANT_CUDA_DRIVER_TOO_OLD = -3,
  QUANT_CUDA_NO_DEVICE = -4,
  QUANT_CUDA_BAD_SHAPE = -5,
  QUANT_CUDA_BAD_ALIGNMENT = -6,
  QUANT_CUDA_NO_KERNEL = -7,
  QUANT_CUDA_SMALL_WORKSPACE = -8,
  QUANT_CUDA_NOT_HOPPER = -9,
  QUANT_CUDA_TENSOR_MAP = -10,
};

// How codes become operands; _8: some code is -8, which takes more instructions (convert.cuh).
enum QuantCudaKind {
  QUANT_CUDA_INT8_CHANNEL,
  QUANT_CUDA_INT8_GROUP,
  QUANT_CUDA_FP8_CHANNEL,
  QUANT_CUDA_FP8_CHANNEL_8,
  QUANT_CUDA_LUT,
  QUANT_CUDA_LUT_8,
  QUANT_CUDA_EXACT,
  QUANT_CUDA_EXACT_8,
};
enum QuantCudaType { QUANT_CUDA_FP32, QUANT_CUDA_BF16, QUANT_CUDA_FP16 };
enum QuantCudaCodes { QUANT_CUDA_E4M3, QUANT_CUDA_INT8 };

// Y [tokens, rows] = X [tokens, columns] W^ [rows, columns]^T (cuda/gemm_kernel.cuh has the
// mathematics). Strides count elements, of the first dimension; the last one is contiguous.
typedef struct {
  const void* x;  // E4M3 or INT8 codes; address and stride are multiples of 16
  const float* x_scale;
  const void* codes;  // the fragment layout of quant_kernels/packing.py, as t; aligned to 16
  const void* t;
  const float* c;
  const void* bias;      // or null
  const void* residual;  // or null; may be out
  void* out;             // [tokens, rows / 2] with silu_mul, whose weight is the gate, then up
  // Both or neither, with silu_mul: out [tokens, rows / 2] quantized, with a scale a token.
  // Addresses and strides of out and out_codes are multiples of 16 then.
  void* out_codes;
  float* out_scale;
  void* workspace;  // quant_cuda_gemm_workspace bytes, aligned to 16; whatever they hold
  int64_t tokens, rows, columns;
  int64_t x_stride, x_scale_stride, residual_stride, out_stride, out_codes_stride, out_scale_stride;
  int64_t workspace_bytes;
  int kind, group_size;  // 32, 64 or 128; 128 where there are no groups
  int bias_type, residual_type, out_type, out_codes_type;
  int silu_mul;
  // Tiles of 128 rows by tile_tokens, shared by clusters of `cluster` blocks; `workers` clusters
  // take them whole, or in equal parts of K where split is 1 (cuda/schedule.h).
  int tile_tokens, cluster, workers, split;
} QuantCudaGemm;

// Whether a kernel takes these arguments, and why not: no driver is asked, no pointer followed.
QUANT_CUDA_API int quant_cuda_gemm_check(const QuantCudaGemm* gemm);

// Bytes of workspace: sums of split tiles, and maxima of a token where out is quantized.
QUANT_CUDA_API int64_t quant_cuda_gemm_workspace(const QuantCudaGemm* gemm);

// Starts the GEMM, and what quantizes its output, on a device and its stream; returns before they
// end.
QUANT_CUDA_API int quant_cuda_gemm(const QuantCudaGemm* gemm, int device, void* stream);

// Attention over the paged INT4 cache (cuda/prefill_kernel.cuh and cuda/decode_kernel.cuh have the
// mathematics). Strides count elements; dimensions without one are contiguous.
typedef struct {
  const void* q;               // [tokens, heads, head_dim] E4M3; address and strides in 16s
  const float* q_scale;        // [tokens, heads]
  const void* kv_codes;        // [2, pages, kv_heads, 64, head_dim / 2]; aligned to 16
  const void* kv_scales;       // [2, pages, kv_heads, 64, 2] FP16; aligned to 16
  const int32_t* block_table;  // [batch, table_row]
  const int32_t* kv_lens;      // [batch]
  void* out;                   // [tokens, heads, head_dim]; a vector of four is aligned
  int64_t q_token, q_head, q_scale_token, table_row, out_token, out_head;
  int64_t pages;
  float sm_scale;  // of scores, positive
  float soft_cap;  // c: scores become c tanh(score / c); 0: they stay
  int window;      // keys that a query sees, itself included; 0: all before it
  int batch, heads, kv_heads, head_dim, out_type;
} QuantCudaAttention;

// Pages are unpacked by each of the blocks that need them, or, where there is a workspace, before
// that and once; outputs have the same bits.
typedef struct {
  QuantCudaAttention attention;
  const int32_t* cu_seqlens;  // [batch + 1]
  void* workspace;            // quant_cuda_prefill_workspace bytes, aligned to 16; or null
  int64_t workspace_bytes;
  int max_query_len;  // of the longest chunk
  int table_pages;    // of a row of block_table; kv_lens need no more
  int workers;        // blocks that share the tiles where there is a workspace: multiprocessors
  // Of pages that every row of a warpgroup finds this far, in powers of two, below the largest term
  // before them, values are not read; 0: of none.
  float skip_threshold;
} QuantCudaPrefill;

// One query a sequence; a sequence of length 0 gives zeros.
typedef struct {
  QuantCudaAttention attention;
  void* workspace;  // quant_cuda_decode_workspace bytes, aligned to 16
  int64_t workspace_bytes;
  int workers;  // blocks that share the cache: quant_cuda_decode_blocks times multiprocessors
} QuantCudaDecode;

// As quant_cuda_gemm_check.
QUANT_CUDA_API int quant_cuda_prefill_check(const QuantCudaPrefill* prefill);
QUANT_CUDA_API int quant_cuda_decode_check(const QuantCudaDecode* decode);

// Blocks of the decode kernel that a multiprocessor holds at once; 0 where there is no kernel.
QUANT_CUDA_API int quant_cuda_decode_blocks(int heads, int kv_heads, int head_dim);

// Bytes of workspace of a decode step, whatever its lengths.
QUANT_CUDA_API int64_t quant_cuda_decode_workspace(const QuantCudaDecode* decode);

// Bytes of workspace of a prefill, whatever its lengths; whether they are few enough, and enough
// blocks read a page, that it should be faster with them (not where the check refuses it).
QUANT_CUDA_API int64_t quant_cuda_prefill_workspace(const QuantCudaPrefill* prefill);
QUANT_CUDA_API int quant_cuda_prefill_gains(const QuantCudaPrefill* prefill);

// Start the kernels on a device and its stream; they return before it ends.
QUANT_CUDA_API int quant_cuda_prefill_attention(const QuantCudaPrefill* prefill, int device,
                                                void* stream);
QUANT_CUDA_API int quant_cuda_decode_attention(const QuantCudaDecode* decode, int device,
                                               void* stream);

// QUANT_CUDA_ABI_VERSION of the library, as opposed to that of this header.
QUANT_CUDA_API int quant_cuda_abi_version(void);

// One English sentence for a status, CUDA's own where it is CUDA's; static storage, never null.
QUANT_CUDA_API const char* quant_cuda_error_string(int status);

// *count = the number of visible GPUs; 0 with QUANT_CUDA_NO_DRIVER, _DRIVER_TOO_OLD or _NO_DEVICE.
// Starts the driver in this process: a process forked afterwards cannot use CUDA.
QUANT_CUDA_API int quant_cuda_device_count(int* count);

// (*major, *minor) = compute capability of a visible GPU, (9, 0) for Hopper.
QUANT_CUDA_API int quant_cuda_device_capability(int device, int* major, int* minor);

#ifdef __cplusplus
}
#endif

#endif  // QUANT_CUDA_H_
