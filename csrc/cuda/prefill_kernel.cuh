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
// clocks; 16 exponentials, so 8192 of them take 512; 128 lanes, and a thread's page is 470
// instructions (192 for scores, 130 for exponents and sums, 64 for P, 64 for O), so 256 of them
// take 940, and the producers, at 11 instructions for 8 codes, another 200. Issue bounds the
// kernel, at 45% of the MMAs' rate.
//
// Blocks start with the last tiles: for whole prompts, the longest first. A tile's pages that all
// rows see need no mask.
//
// Instances of their own, so that the plain kernel does not pay for them:
//
//     kSoftCap   S is capped after sm_scale and before masks: two more of the instructions that
//                exponentials are, and three others, for every score
//     kSkips     a page whose largest S is below M - 1 - threshold in all 64 rows of a warpgroup
//                leaves out its exponentials and P V. The warpgroup's four warps vote: their MMAs
//                are one. p of what is left out is below 2^-threshold of the row's largest, which
//                is always kept; producers unpack its V all the same
//     kExpanded  pages come unpacked (prefill_expand.cuh), and a thread copies them into 8 stages,
//                4 of head_dim 256. Same bits: MMAs read the same operands, V^T in rows of 64 bytes
#pragma once

#include "cuda/prefill_consumer.cuh"
#include "cuda/prefill_producer.cuh"

namespace quant {

template <class C>
QUANT_DEVICE void prefill_body(const PrefillParams& params) {
  const PrefillShared<C> shared(shared_memory());
  previous_kernel_wait();
  if (thread_index() == 0) {
    *shared.tile = prefill_tile(params, block_index());
    init_barriers<C>(shared);
  }
  block_sync();
  const PrefillTile& tile = *shared.tile;
  if (tile.tokens == 0) return;
  const int warp = warp_index(), producer_warp = warp - kPrefillConsumers / 32;
  if (producer_warp >= 0) {
    registers_shrink<C::kProducerRegisters>();
    const int lane = thread_index() % 32;
    if constexpr (C::kUnpacks) {
      PrefillProducer<C>{params.shared, shared, tile, producer_warp, lane, 0}.run();
    } else if (producer_warp == 0 && lane == 0) {
      PrefillLoader<C>{params, shared, tile}.run();
    }
  } else {
    registers_grow<C::kConsumerRegisters>();
    PrefillConsumer<C>(params, shared, tile, warp / kGroupWarps, thread_index()).run();
  }
}

template <class C>
QUANT_KERNEL(kPrefillThreads)
prefill_kernel(QUANT_GRID_CONSTANT PrefillParams params) {
  prefill_body<C>(params);
}

}  // namespace quant
