// Attention of one new token a sequence over the paged INT4 cache, on Hopper.
//
//     S_t = (s_t (Qc . q_t) + o_t sum(Qc)) a sm_scale log2(e),   M = ceil(max S),   p = 2^(S - M)
//     O   = (z / 256 sum_t E4M3(256 p_t s'_t / z) q'_t + sum_t p_t o'_t) / sum_t p_t
//
// for keys s_t q_t + o_t and values s'_t q'_t + o'_t (quant_kernels/reference_attention.py). A page
// is read once, for all query heads of its KV head. They are the columns of FP16 warp MMAs
// [16, 16] x [16, 8], whose rows are tokens, then channels, so that up to 8 heads waste nothing:
//
//     S^T [16 tokens, 8 heads]  = K [16, D] Qc^T [D, 8]      P^T: C fragment -> movmatrix -> B
//     O^T [D, 8 heads]         += V^T [D, 16 tokens] P^T [16, 8]
//
// FP16 holds E4M3 queries, E4M3 P and codes exactly: a code is q + 8 in the mantissa of a subnormal
// number, one instruction for two, and 8 sum(Qc) and 8 sum(P) are taken off in FP32. FP8 warp MMAs
// gain nothing: on sm_90 they are FP16 ones after a conversion. WGMMA would fill 8 of 64 rows and
// wants V transposed first.
//
//     warp 4       pages to a ring of S stages: bulk copies of K, V, and of both's scales
//     warps 0-3    16 tokens of every page each, with an M, l and O^T of their own; no warp waits
//                  for another one before the segment's end, where the four are added
//
//     time    ------------------------------------------------------------->
//     copy       [ j+S-1 ][ j+S ][ j+S+1 ]
//     warp 0     [K Q, softmax, P V of j][ j + 1 ]...       two to four blocks share an SM and
//     warp 1      [     j     ][     j + 1     ]...         fill each other's gaps
//
// Budget, H200, D = 128, per SM: a page is 8.7 KB, 435 clocks at 20 bytes of DRAM a clock, in which
// 1740 instructions issue. Four warps take 290 each: 90 for codes (5 for 8 of K, 6 for 8 of V), 16
// MMAs of 2 clocks, the rest for scores, M and P. D = 64 has half the bytes and 230 a warp: there
// issue is as short as DRAM.
//
// z is a running power of two like M: sums are scaled when one of them changes, which is rare.
// Workers split the cache evenly (decode_schedule.h); a segment that several share is added in
// the order of its pages by its last one, through the L2.
#pragma once

#include "cuda/decode_consumer.cuh"

namespace quant {

template <class C>
QUANT_DEVICE void decode_body(const DecodeParams& params) {
  const DecodeShared<C> shared(shared_memory());
  const int warp = warp_index(), lane = thread_index() % 32, worker = block_index();
  if (thread_index() == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared.full + stage, 1);
      barrier_init(shared.empty + stage, kDecodeWarps);
    }
    barrier_init_fence();
  }
  previous_kernel_wait();
  if (warp == kDecodeWarps) sum_pages(params.shared, lane, shared.ends);
  block_sync();
  const DecodeSchedule schedule{shared.ends, params.shared.batch, params.shared.kv_heads,
                                params.workers};
  if (warp == kDecodeWarps) {
    decode_producer<C>(params.shared, shared, schedule, worker, lane);
    next_kernel_start();
  } else {
    DecodeConsumer<C>(params, shared, thread_index()).run(schedule, worker);
  }
}

template <class C>
QUANT_KERNEL_BESIDE(kDecodeThreads, C::kBlocksPerSm)
decode_kernel(QUANT_GRID_CONSTANT DecodeParams params) {
  decode_body<C>(params);
}

}  // namespace quant
