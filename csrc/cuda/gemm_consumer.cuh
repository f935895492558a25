// What converts and multiplies: two warpgroups of a block, 64 rows of weights each.
#pragma once

#include "cuda/gemm_config.cuh"
#include "cuda/rows.cuh"

namespace quant {

template <class C>
struct Consumer {
  using Sum = typename C::Sum;
  static constexpr int kSums = C::kTokens / 2;
  struct Operands {
    uint32_t a[C::kSlice][4];
    float scale[C::kPromote ? C::kGroups : 1][2];
  };

  const GemmParams& p;
  const Shared<C>& shared;
  int thread, rank;  // of 256, of the cluster
  Ring<C::kStages> ring;
  int released;  // the stage that MMAs in flight still read
  Sum sum[kSums];

  QUANT_DEVICE Consumer(const GemmParams& p, const Shared<C>& shared, int thread, int rank)
      : p(p), shared(shared), thread(thread), rank(rank), released(0) {}

  QUANT_DEVICE int warpgroup() const { return thread / 128; }
  QUANT_DEVICE int row() const { return thread % 128 / 32 * 16 + thread % 32 / 4; }

  // Codes of the ring's stage as operands: steps kSlice * slice and on.
  QUANT_DEVICE void convert(Operands& to, int slice) const {
    const int fragment = 2 * ring.stage + warpgroup();
    const auto* words = reinterpret_cast<const uint4*>(shared.codes + fragment * kFragmentBytes);
    const char* scales = shared.scales + fragment * C::kScaleBytes;
    uint4 halves[C::kSlice / 2];  // of K = 64
    QUANT_UNROLL for (int i = 0; i < C::kSlice / 2; ++i) {
      halves[i] = words[(slice * (C::kSlice / 2) + i) * 128 + thread % 128];
    }
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {  // row, row + 8
      [[maybe_unused]] uint32_t t = 0, offset = 0;
      [[maybe_unused]] Table table{};
      QUANT_UNROLL for (int step = 0; step < C::kSlice; ++step) {
        if (step % C::kStepsOfGroup == 0) {
          const int group = (slice * C::kSlice + step) / C::kStepsOfGroup;
          const int at = group * kFragmentRows + row() + 8 * i;
          if constexpr (C::kKind == Kind::int8_group) {
            t = static_cast<uint8_t>(scales[at]);
            offset = TwoLevel::offset(t);
          } else if constexpr (C::kTables) {
            const uint4 found = shared.tables[static_cast<uint8_t>(scales[at])];
            table = {found.x, found.y, found.z, found.w};
          } else if constexpr (C::kPromote) {
            to.scale[group][i] = to_float(reinterpret_cast<const Bf16*>(scales)[at]);
          }
        }
        const uint4& half = halves[step / 2];
        const uint32_t word =
            step % 2 == 0 ? (i == 0 ? half.x : half.y) : (i == 0 ? half.z : half.w);
        uint32_t &low = to.a[step][i], &high = to.a[step][i + 2];
        if constexpr (C::kKind == Kind::int8_channel) {
          HighNibble::convert(word, low, high);
        } else if constexpr (C::kKind == Kind::int8_group) {
          TwoLevel::convert(word, t, offset, low, high);
        } else if constexpr (C::kKind == Kind::fp8_channel || C::kKind == Kind::exact) {
          Raw::convert(word, low, high);
        } else if constexpr (C::kKind == Kind::fp8_channel_8 || C::kKind == Kind::exact_8) {
          RawAll::convert(word, low, high);
        } else if constexpr (C::kKind == Kind::lut) {
          Lookup::convert(word, table, low, high);
        } else {
          LookupAll::convert(word, table, low, high);
        }
      }
    }
    QUANT_UNROLL for (int step = 0; step < C::kSlice; ++step) {
      QUANT_UNROLL for (int i = 0; i < 4; ++i) mma_operand(to.a[step][i]);
    }
  }

  QUANT_DEVICE void give_back(int stage) const {
    if (thread % 32 != 0) return;
    if constexpr (C::kCluster == 1) {
      barrier_arrive(shared.empty + stage);
    } else {  // X came from all blocks of the cluster, and each writes into all
      for (int other = 0; other < C::kCluster; ++other) {
        barrier_arrive_at(shared.empty + stage, other);
      }
    }
  }

  // A slice of a block of K: convert it while the MMAs of the slice before run.
  QUANT_DEVICE void multiply_slice(Operands& operands, int slice, bool first) {
    if (slice == 0) barrier_wait(shared.full + ring.stage, ring.parity);
    convert(operands, slice);
    const Descriptor x = describe(shared.tokens + ring.stage * C::kTokenBytes);
    mma_fence();
    QUANT_UNROLL for (int step = 0; step < C::kSlice; ++step) {
      mma<typename C::Operand, C::kTokens>(sum, operands.a[step],
                                           advance(x, 32 * (slice * C::kSlice + step)),
                                           !(first && step == 0));
    }
    mma_commit();
    mma_wait<1>();
    if (slice == 0 && !first) give_back(released);
    if (slice == C::kSlices - 1) {
      released = ring.stage;
      ring.advance();
    }
  }
  QUANT_DEVICE void multiply(int blocks) {
    Operands even, odd;  // MMAs read the one while the other is written
    multiply_slice(even, 0, true);
    if constexpr (C::kSlices == 2) {
      multiply_slice(odd, 1, false);
      for (int block = 1; block < blocks; ++block) {
        multiply_slice(even, 0, false);
        multiply_slice(odd, 1, false);
      }
    } else {
      int block = 1;
      for (; block + 1 < blocks; block += 2) {
        multiply_slice(odd, 0, false);
        multiply_slice(even, 0, false);
      }
      if (block < blocks) multiply_slice(odd, 0, false);
    }
    mma_wait<0>();
    QUANT_UNROLL for (int i = 0; i < kSums; ++i) mma_operand(sum[i]);
    give_back(released);
  }

  // The same where a group's sum is scaled in FP32 before it is added.
  QUANT_DEVICE void promote_block(Operands& operands, const Operands& before, Sum (&part)[kSums],
                                  bool first) {
    barrier_wait(shared.full + ring.stage, ring.parity);
    convert(operands, 0);
    const Descriptor x = describe(shared.tokens + ring.stage * C::kTokenBytes);
    QUANT_UNROLL for (int group = 0; group < C::kGroups; ++group) {
      if (group > 0) {
        promote(operands.scale[group - 1], part);
      } else if (!first) {
        promote(before.scale[C::kGroups - 1], part);
        give_back(released);
      }
      mma_fence();
      QUANT_UNROLL for (int i = 0; i < C::kGroup / 32; ++i) {
        const int step = group * C::kGroup / 32 + i;
        mma<typename C::Operand, C::kTokens>(part, operands.a[step], advance(x, 32 * step), i > 0);
      }
      mma_commit();
    }
    released = ring.stage;
    ring.advance();
  }
  QUANT_DEVICE void promote(const float (&scale)[2], Sum (&part)[kSums]) {
    mma_wait<0>();
    QUANT_UNROLL for (int i = 0; i < kSums; ++i) mma_operand(part[i]);
    QUANT_UNROLL for (int i = 0; i < kSums; ++i) {
      sum[i] += scale[i / 2 % 2] * part[i];
      mma_operand(part[i]);
    }
  }
  QUANT_DEVICE void multiply_promoted(int blocks) {
    Operands even, odd;
    Sum part[kSums];
    QUANT_UNROLL for (int i = 0; i < kSums; ++i) sum[i] = part[i] = 0;
    promote_block(even, odd, part, true);
    int block = 1;
    for (; block + 1 < blocks; block += 2) {
      promote_block(odd, even, part, false);
      promote_block(even, odd, part, false);
    }
    if (block < blocks) {
      promote_block(odd, even, part, false);
      promote(odd.scale[C::kGroups - 1], part);
    } else {
      promote(even.scale[C::kGroups - 1], part);
    }
    give_back(released);
  }

  // --- sums of split tiles ---
  QUANT_DEVICE int slot(int worker) const { return worker * C::kCluster + rank; }
  QUANT_DEVICE uint4* partial(int worker) const {
    return static_cast<uint4*>(p.partials) + int64_t{1} * slot(worker) * (kSums / 4) * kConsumers +
           thread;
  }
  QUANT_DEVICE void publish(int worker) const {
    uint4* to = partial(worker);
    QUANT_UNROLL for (int i = 0; i < kSums / 4; ++i) {
      store_through(to + i * kConsumers, sum + 4 * i);
    }
    group_sync(1, kConsumers);
    if (thread == 0) flag_set(p.flags + slot(worker), 1);
  }
  // What the workers before this one have of its tile, and then its own.
  QUANT_DEVICE void collect(int first, int worker) {
    if (thread == 0) {
      for (int other = first; other < worker; ++other) flag_wait(p.flags + slot(other), 1);
    }
    group_sync(1, kConsumers);
    QUANT_UNROLL for (int i = 0; i < kSums / 4; ++i) {
      Sum total[4], four[4];
      load_through(partial(first) + i * kConsumers, total);
      for (int other = first + 1; other < worker; ++other) {
        load_through(partial(other) + i * kConsumers, four);
        QUANT_UNROLL for (int j = 0; j < 4; ++j) total[j] += four[j];
      }
      QUANT_UNROLL for (int j = 0; j < 4; ++j) sum[4 * i + j] = total[j] + sum[4 * i + j];
    }
    group_sync(1, kConsumers);
    if (thread == 0) {
      QUANT_LOOP for (int other = first; other < worker; ++other) {
        flag_clear(p.flags + slot(other));
      }
    }
  }

  // --- epilogue: sums to rows of Y, kChunk tokens at a time through shared memory ---
  QUANT_DEVICE void store(int row_tile, int token_tile) const {
    auto* staging = reinterpret_cast<Sum*>(shared.staging);
    QUANT_UNROLL for (int chunk = 0; chunk < C::kTokens / C::kChunk; ++chunk) {
      const int first_token = token_tile * C::kTokens + chunk * C::kChunk;
      group_sync(1, kConsumers);
      QUANT_UNROLL for (int j = 0; j < C::kChunk / 8; ++j) {
        QUANT_UNROLL for (int i = 0; i < 4; ++i) {
          const int token = 8 * j + thread % 4 * 2 + i % 2;
          staging[token * C::kPitch + warpgroup() * kFragmentRows + row() + i / 2 * 8] =
              sum[(chunk * C::kChunk / 8 + j) * 4 + i];
        }
      }
      group_sync(1, kConsumers);
      const int vectors = p.silu_mul ? kFragmentRows / 4 : kTileRows / 4;
      for (int i = thread; i < C::kChunk * vectors; i += kConsumers) {
        const int token = first_token + i / vectors, row = i % vectors * 4;
        uint32_t top = 0;
        if (token < p.tokens) {
          const Sum* sums = staging + i / vectors * C::kPitch + row;
          top = store_rows(p, C::kUnit, sums, row_tile, row, token);
        }
        if (p.maxima != nullptr) store_maximum(top, row_tile, token);
      }
    }
  }
  // Half a warp has the rows of a token.
  QUANT_DEVICE void store_maximum(uint32_t top, int row_tile, int token) const {
    constexpr int kLanes = kFragmentRows / 4;
    QUANT_UNROLL for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      top = larger(top, shuffle_xor(top, mask));
    }
    const int tiles = p.fragments / 2;  // a cluster's last one may have no rows
    if (thread % kLanes == 0 && token < p.tokens && row_tile < tiles) {
      p.maxima[int64_t{1} * token * tiles + row_tile] = top;
    }
  }

  QUANT_DEVICE void run(int worker) {
    Segment segment;
    for (Work work(p.schedule, worker); work.next(segment);) {
      if constexpr (C::kPromote) {
        multiply_promoted(segment.end - segment.begin);
      } else {
        multiply(segment.end - segment.begin);
      }
      if (segment.end < p.schedule.blocks) {
        publish(worker);
        continue;
      }
      if (segment.begin > 0) {
        collect(p.schedule.owner(int64_t{1} * segment.tile * p.schedule.blocks), worker);
      }
      store(segment.tile % p.schedule.row_tiles * C::kCluster + rank,
            segment.tile / p.schedule.row_tiles);
    }
  }
};

}  // namespace quant
