// Y^T [N, M] = W^ [N, K] X^T [K, M] with INT4 weights and 8-bit activations, on Hopper.
//
//     Y[m, n] = a[m] c[n] sum_k x[m, k] P(q[n, k], t[n, k / g])  (+ bias[n]) (+ residual[m, n])
//
// in the numerics of quant_kernels/formats.py; x E4M3 or INT8 codes with a scale a token. Weights
// are the MMA's first operand, which may come from registers: they are read packed, converted
// there (convert.cuh) and never written back. A block has 128 rows of weights by kTokens tokens:
//
//     warp 8, a thread    for every 128 columns of K: wait until a stage is empty, then
//                         bulk copies of the codes (8 KB), of t, and of X (128 kTokens bytes)
//     warps 0-3, 4-7      64 rows each. With codes of block i: convert(i) while the MMAs of i - 1
//                         run, issue MMA(i), wait for i - 1, give its stage back
//
//     time  ------------------------------------------------------------------>
//     copy     [ i+S-1 ][ i+S ][ i+S+1 ]                 S stages, 5 to 12
//     convert  [  i  ]     [ i+1 ]     [ i+2 ]
//     MMA      [  i - 1  ] [    i    ] [   i+1   ]
//
// Budget, H200, per SM and clock: 20 bytes of DRAM, so 8 KB of codes take 410 clocks; 64 integer
// lanes, so converting them takes 16384 a / 64 = 256 a clocks at a instructions a weight; 4096
// products, so the MMAs take 4 kTokens clocks. Lookup has a = 0.9: 230 clocks, hidden behind DRAM
// up to 64 tokens and behind MMAs from 128 on. So are LookupAll's 300, a = 1.17.
//
// `exact` adds group sums in FP32: then the MMAs of a group start at zero, and kTokens is at most
// 128, for the second accumulator. The work of blocks is in schedule.h; sums of split tiles
// meet in the L2, in the order of K. Behind it may run what quantizes silu(gate) * up
// (quantize_kernel.cuh).
#pragma once

#include "cuda/gemm_consumer.cuh"
#include "cuda/gemm_producer.cuh"

namespace quant {

template <class C>
QUANT_DEVICE void gemm_body(const GemmParams& p, const TensorMap* x) {
  const Shared<C> shared(shared_memory());
  const int warp = warp_index(), rank = C::kCluster == 1 ? 0 : cluster_rank();
  const int worker = block_index() / C::kCluster;
  if (thread_index() == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared.full + stage, 1);
      barrier_init(shared.empty + stage, kConsumerWarps * C::kCluster);
    }
    barrier_init_fence();
  }
  if constexpr (C::kTables) {
    for (int code = thread_index(); code < 128; code += kThreads) {
      const Table table = make_table(static_cast<uint32_t>(code));
      shared.tables[code] = {table.from_0, table.from_4, table.from_minus_8,
                             table.flipped_from_minus_4};
    }
  }
  block_sync();
  if constexpr (C::kCluster > 1) cluster_start();
  if (warp >= kConsumerWarps) {
    registers_shrink<40>();
    if (warp == kConsumerWarps && elected()) {
      prefetch_map(x);
      Producer<C>{p, x, shared, rank}.run(worker);
    }
    warp_sync();  // what follows wants whole warps
  } else {
    registers_grow<232>();
    Consumer<C>(p, shared, thread_index(), rank).run(worker);
  }
  // Nobody ends while another block of the cluster may still signal it.
  if constexpr (C::kCluster > 1) cluster_sync();
}

template <class C>
QUANT_KERNEL(kThreads)
gemm_kernel(QUANT_GRID_CONSTANT GemmParams p, QUANT_GRID_CONSTANT TensorMap x) {
  gemm_body<C>(p, &x);
}

}  // namespace quant
