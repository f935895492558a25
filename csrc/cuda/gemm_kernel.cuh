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
// up to 64 tokens and behind MMAs from 128 on.
//
// `exact` adds group sums in FP32: then the MMAs of a group start at zero, and kTokens is at most
// 128, for the second accumulator. The work of blocks is in schedule.h; sums of split tiles
// meet in the L2, in the order of K.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/gemm_params.h"
#include "cuda/ring.cuh"
#include "cuda/rows.cuh"

namespace quant {

constexpr int kConsumers = 256, kThreads = 384;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kSteps = kBlockColumns / 32;  // MMAs of K = 32 in a stage

// A kernel: how codes become operands, over groups of kGroup columns (kBlockColumns: of 128, or
// where there are none), kPromote: whose sums are scaled in FP32.
template <Kind kKind_, int kGroup_, int kTokens_, int kCluster_>
struct Config {
  static constexpr Kind kKind = kKind_;
  static constexpr int kGroup = kGroup_, kTokens = kTokens_, kCluster = kCluster_;
  static constexpr bool kPromote = kKind == Kind::exact || kKind == Kind::exact_8;
  static constexpr bool kTables = kKind == Kind::lut || kKind == Kind::lut_8;
  static constexpr bool kInt8 = kKind == Kind::int8_channel || kKind == Kind::int8_group;
  static constexpr bool kGrouped = kPromote || kTables || kKind == Kind::int8_group;
  static constexpr float kUnit = kKind == Kind::int8_channel ? HighNibble::kUnit
                                 : kInt8 || kTables          ? 1.0f
                                                             : Raw::kUnit;
  using Operand = std::conditional_t<kInt8, Int8, E4M3>;
  using Sum = typename Operand::Sum;

  // A wide tile's sums leave registers for the operands of half a stage at a time.
  static constexpr int kSlice = kTokens == 256 ? 2 : kSteps, kSlices = kSteps / kSlice;
  static constexpr int kStepsOfGroup = kGroup / 32;

  // Shared memory, from its start: X, codes, t of every stage, the epilogue's rows, tables,
  // barriers.
  static constexpr int kGroups = kBlockColumns / kGroup;
  static constexpr int kScaleBytes = kGrouped ? kFragmentRows * kGroups * (kPromote ? 2 : 1) : 0;
  static constexpr int kTokenBytes = kTokens * kBlockColumns;
  static constexpr int kStageBytes = kTokenBytes + 2 * (kFragmentBytes + kScaleBytes);
  static constexpr int kChunk = kTokens < 32 ? kTokens : 32;  // tokens of the epilogue at a time
  static constexpr int kPitch = kTileRows + 4;  // so that neither side meets a bank twice
  static constexpr int kEpilogueBytes = kChunk * kPitch * 4;
  static constexpr int kTableBytes = kTables ? 128 * 16 : 0;
  static constexpr int kBarrierBytes = 1024;
  static constexpr int kFit =
      (kSharedBytes - kEpilogueBytes - kTableBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStages = kFit < 12 ? kFit : 12;
  static_assert(kStages >= 4, "too few stages");
  static_assert(!kPromote || kTokens <= 128, "two accumulators do not fit");
};

template <class C>
struct Shared {
  char *tokens, *codes, *scales, *staging;
  uint4* tables;
  Barrier *full, *empty;
  QUANT_DEVICE explicit Shared(char* base) {
    tokens = base;
    codes = tokens + C::kStages * C::kTokenBytes;
    scales = codes + C::kStages * 2 * kFragmentBytes;
    staging = scales + C::kStages * 2 * C::kScaleBytes;
    tables = reinterpret_cast<uint4*>(staging + C::kEpilogueBytes);
    full = reinterpret_cast<Barrier*>(staging + C::kEpilogueBytes + C::kTableBytes);
    empty = full + C::kStages;
  }
};

// The 64 rows of weights that a warpgroup of a tile multiplies.
QUANT_DEVICE int fragment_of(const GemmParams& p, int row_tile, int warpgroup) {
  const int half = p.fragments / 2;
  const int index = p.silu_mul ? row_tile + warpgroup * half : 2 * row_tile + warpgroup;
  // The last tile may have one fragment too many: it computes, and stores nothing.
  return index < p.fragments ? index : p.fragments - 1;
}

// --- the producer: one thread ---
template <class C>
struct Producer {
  const GemmParams& p;
  const TensorMap* x;
  const Shared<C>& shared;
  int rank;

  QUANT_DEVICE int row_tile(int tile) const {
    return tile % p.schedule.row_tiles * C::kCluster + rank;
  }
  QUANT_DEVICE void weights(int stage, int tile, int block) const {
    Barrier* full = shared.full + stage;
    barrier_expect(full, C::kStageBytes);
    for (int i = 0; i < 2; ++i) {
      const int64_t at = int64_t{1} * fragment_of(p, row_tile(tile), i) * p.schedule.blocks + block;
      copy_bulk(shared.codes + (2 * stage + i) * kFragmentBytes, p.codes + at * kFragmentBytes,
                kFragmentBytes, full, Keep::first_out);
      if constexpr (C::kGrouped) {
        copy_bulk(shared.scales + (2 * stage + i) * C::kScaleBytes, p.t + at * C::kScaleBytes,
                  C::kScaleBytes, full, Keep::first_out);
      }
    }
  }
  QUANT_DEVICE void tokens(int stage, int tile, int block) const {
    const int token = tile / p.schedule.row_tiles * C::kTokens, k = block * kBlockColumns;
    char* to = shared.tokens + stage * C::kTokenBytes;
    if constexpr (C::kCluster == 1) {
      copy_box(to, x, k, token, shared.full + stage, Keep::last_out);
    } else {  // each block fetches its part for all
      constexpr int kPart = C::kTokens / C::kCluster;
      copy_box_to(to + rank * kPart * kBlockColumns, x, k, token + rank * kPart,
                  shared.full + stage, (1 << C::kCluster) - 1, Keep::last_out);
    }
  }
  QUANT_DEVICE void run(int worker) const {
    Ring<C::kStages> ring;
    int tile = 0, block = 0, filled = 0;
    // Weights do not depend on the kernel before this one.
    for (Units ahead(p.schedule, worker); filled < C::kStages && ahead.next(tile, block);) {
      weights(filled++, tile, block);
    }
    previous_kernel_wait();
    Units units(p.schedule, worker);
    for (int i = 0; i < filled; ++i) {
      units.next(tile, block);
      tokens(ring.stage, tile, block);
      ring.advance();
    }
    while (units.next(tile, block)) {
      barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
      weights(ring.stage, tile, block);
      tokens(ring.stage, tile, block);
      ring.advance();
    }
    next_kernel_start();
  }
};

// --- the consumers: two warpgroups ---
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
      [[maybe_unused]] Table table = kCodes;
      QUANT_UNROLL for (int step = 0; step < C::kSlice; ++step) {
        if (step % C::kStepsOfGroup == 0) {
          const int group = (slice * C::kSlice + step) / C::kStepsOfGroup;
          const int at = group * kFragmentRows + row() + 8 * i;
          if constexpr (C::kKind == Kind::int8_group) {
            t = static_cast<uint8_t>(scales[at]);
            offset = TwoLevel::offset(t);
          } else if constexpr (C::kTables) {
            const uint4 found = shared.tables[static_cast<uint8_t>(scales[at])];
            table = {found.x, found.y, found.z};
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
    fence_global();
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
    if (thread == 0) {  // for the next launch
      for (int other = first; other < worker; ++other) flag_set(p.flags + slot(other), 0);
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
        if (token < p.tokens) {
          store_rows(p, C::kUnit, staging + i / vectors * C::kPitch + row, row_tile, row, token);
        }
      }
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
      shared.tables[code] = {table.t0, table.t1, table.eight, 0};
    }
  }
  block_sync();
  if constexpr (C::kCluster > 1) cluster_sync();
  if (warp >= kConsumerWarps) {
    registers_shrink<40>();
    if (warp == kConsumerWarps && thread_index() % 32 == 0) {
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
