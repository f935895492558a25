// Causal attention of prompts, or chunks of them, over the paged INT4 cache, on Hopper.
//
//     S_t = (s_t (Qc . q_t) + o_t sum(Qc)) a sm_scale log2(e),   M = ceil(max S),   p = 2^(S - M)
//     O   = (sum over pages of z / 256 sum_t E4M3(256 p_t s'_t / z) q'_t + sum_t p_t o'_t)
//           / sum_t p_t
//
// for keys s_t q_t + o_t and values s'_t q'_t + o'_t (quant_kernels/reference_attention.py). Codes
// are exact in E4M3, so both products are FP8 WGMMAs and no value is dequantized. A block has 128
// rows, tokens x query heads of one KV head, which share every page:
//
//     warps 0-3, 4-7   64 rows each
//     warps 8, 9       bulk copies of packed pages; K and scales unpacked for MMAs
//     warps 10, 11     V likewise, transposed on the way: FP8 MMAs want both operands K-major
//
// or, of kExpanded, warp 8 copies pages that a kernel before this one has unpacked.
//
// Three pages at a time, D = 128; a step of 64 rows:
//
//     copies    packed pages j + 2 and further, 3 or 4 stages
//     unpack    K and V^T of pages j + 1 to j + 3 in E4M3, 4 stages
//     MMA       | P V j-2, channels 0-63 | P V j-2, 64-127 |
//               |                        |              Q K j              |
//     threads   | scale S j-1            | add, M j-1      | add, P j-1      |
//
// Groups of MMAs end in the order of their issue, and a wait leaves the later ones in flight.
// head_dim 256 has registers for one S: then Q K (j + 1) runs beside P V (j), in pieces of 64
// channels, and the two warpgroups fill each other's gaps.
//
// P V starts at zero for every page and is added in FP32, O = O fade + part z / 256: accumulators
// of FP8 tensor cores have about 14 bits. Sums are scaled only where M has changed.
//
// Budget per page of 64 tokens, D = 128, per SM and clock: 4096 products, so the MMAs take 512
// clocks; 16 exponentials, so 8192 of them take 512; an instruction of a warp for each of four
// schedulers. A consumer thread's page is 350 instructions of arithmetic (104 for scores and their
// maximum, 130 for exponents and sums, 48 for P, 64 for O), 17 loads of planes, and 90 for MMAs,
// barriers, addresses and the loop: 456, and a scheduler has two. With the producers' 200, at 11
// instructions for 8 codes, issue takes 1110 clocks and bounds the kernel at 46% of the MMAs' rate.
// Where pages come expanded it is 436 and nothing: 872 clocks and 59%, in which their 17 KB are 20
// bytes a clock and SM from the L2.
//
// Hence loop bounds come from `uniform`, of which the compiler knows that all lanes have the same:
// addresses of stages are in uniform registers. Queries are in registers, as A of Q K, which also
// halves what these MMAs read of shared memory; head_dim 256 has no room. A tile's pages that all
// rows see need no mask and have a loop of their own.
//
// Blocks start with the last tiles: for whole prompts, the longest first.
//
// Instances of their own, so that the plain kernel does not pay for them:
//
//     kSoftCap   S is capped after sm_scale and before masks: two more of the instructions that
//                exponentials are, and three others, for every score
//     kSkips     a page whose largest S is below M - 1 - threshold in all 64 rows of a warpgroup
//                leaves out its exponentials and P V. The warpgroup's four warps vote: their MMAs
//                are one. p of what is left out is below 2^-threshold of the row's largest, which
//                is always kept; producers unpack its V all the same
//     kExpanded  pages come as images (prefill_expand.cuh), 8 stages of them, 4 of head_dim 256.
//                Same bits: MMAs read the same operands, V^T in rows of 64 bytes. As many blocks as
//                multiprocessors take tile after tile (prefill_schedule.cuh), and pages of the next
//                tile come in while the last ones of a tile are worked on
#pragma once

#include "cuda/prefill_consumer.cuh"
#include "cuda/prefill_producer.cuh"

namespace quant {

template <class C>
QUANT_DEVICE void prefill_body(const PrefillParams& params) {
  const PrefillShared<C> shared(shared_memory());
  previous_kernel_wait();
  if (thread_index() == 0) {
    if constexpr (C::kUnpacks) *shared.tile = prefill_tile(params, block_index());
    init_barriers<C>(shared);
  }
  block_sync();
  if (C::kUnpacks && shared.tile->tokens == 0) return;
  const int warp = warp_index(), producer_warp = warp - kPrefillConsumers / 32;
  if (producer_warp >= 0) {
    registers_shrink<40>();
    const int lane = thread_index() % 32;
    if constexpr (C::kUnpacks) {
      PrefillProducer<C>{params.shared, shared, *shared.tile, producer_warp, lane, 0}.run();
    } else if (producer_warp == 0) {
      PrefillLoader<C>{params, shared, lane}.run();
    }
  } else {
    registers_grow<232>();
    PrefillConsumer<C>(params, shared, warp / kGroupWarps, thread_index()).run();
  }
}

template <class C>
QUANT_KERNEL(kPrefillThreads)
prefill_kernel(QUANT_GRID_CONSTANT PrefillParams params) {
  prefill_body<C>(params);
}

}  // namespace quant
