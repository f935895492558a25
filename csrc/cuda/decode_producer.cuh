// Shared memory of a decode block, and the warp that fetches pages ahead of the others.
#pragma once

#include "cuda/attention_codes.cuh"
#include "cuda/decode_config.h"
#include "cuda/ring.cuh"
#include "cuda/rows.cuh"

namespace quant {

template <class C>
struct DecodeShared {
  char* stages;  // codes of K, of V, scales of K, of V
  float* sums;   // [kDecodeWarps, kHeads, kPitch]
  float* rows;   // [kDecodeWarps, 2, kHeads]: sums of queries, and units of their scores
  int* ends;     // [kMostSequences]
  Barrier *full, *empty;
  QUANT_DEVICE explicit DecodeShared(char* base) {
    stages = base;
    sums = reinterpret_cast<float*>(base + C::kStages * C::kStageBytes);
    rows = sums + C::kSumBytes / 4;
    ends = reinterpret_cast<int*>(rows + C::kRowBytes / 4);
    full = reinterpret_cast<Barrier*>(ends + kMostSequences);
    empty = full + C::kStages;
  }
};

// ends[b] = pages of sequences 0 .. b, by one warp.
QUANT_DEVICE void sum_pages(const AttentionParams& p, int lane, int* ends) {
  int before = 0;
  for (int first = 0; first < p.batch; first += 32) {
    const int i = first + lane;
    int total = i < p.batch ? page_count(p.kv_lens[i], p.window) : 0, sum = total;
    QUANT_UNROLL for (int mask = 1; mask < 32; mask *= 2) {  // total: of 2 mask lanes
      const int other = shuffle_xor(total, mask);
      if (lane & mask) sum += other;
      total += other;
    }
    if (i < p.batch) ends[i] = before + sum;
    before += total;
  }
}

// --- the producer: one warp ---
template <class C>
QUANT_DEVICE void decode_producer(const AttentionParams& p, const DecodeShared<C>& shared,
                                  const DecodeSchedule& schedule, int worker, int lane) {
  Ring<C::kStages> ring;
  DecodeSegment segment;
  for (DecodeWork work(schedule, worker); work.next(segment);) {
    const int first = first_page(p.kv_lens[segment.sequence], p.window);
    const int* table = p.block_table + segment.sequence * p.table_row + first;
    int ids = 0;
    for (int i = segment.begin; i < segment.end; ++i) {
      const int place = (i - segment.begin) % 32;
      if (place == 0 && i + lane < segment.end) ids = table[i + lane];
      const int64_t row = (int64_t{1} * shuffle(ids, place) * p.kv_heads + segment.head) * kPage;
      Barrier* full = shared.full + ring.stage;
      barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
      if (lane == 0) {
        char* to = shared.stages + ring.stage * C::kStageBytes;
        barrier_expect(full, C::kStageBytes);
        QUANT_UNROLL for (int kind = 0; kind < 2; ++kind) {
          const int64_t from = row + kind * p.value_rows;
          copy_bulk(to + kind * C::kCodeBytes, p.kv + from * C::kHalf, C::kCodeBytes, full,
                    Keep::first_out);
          copy_bulk(to + 2 * C::kCodeBytes + kind * C::kScaleBytes, p.kv_scales + from,
                    C::kScaleBytes, full, Keep::first_out);
        }
      }
      ring.advance();
    }
  }
}

}  // namespace quant
