// What four warps of a decode block make of a page, and how segments are added.
#pragma once

#include "cuda/decode_producer.cuh"
#include "cuda/rows.cuh"

namespace quant {

template <class C>
struct DecodeConsumer {
  static constexpr int kHeadBlocks = C::kHeadBlocks, kBlocks = C::kBlocks;
  using State = float[kHeadBlocks][2];  // of heads 2 q, 2 q + 1 of every block

  const DecodeParams& params;
  const AttentionParams& p;
  const DecodeShared<C>& shared;
  int thread, warp, g, q;  // lane 4 g + q
  Ring<C::kStages> ring;

  uint32_t query[kHeadBlocks][kBlocks][2];  // Qc as B fragments: head g of every block
  State top, total, offsets;
  State weights;  // the sum of P, whose codes are 8 too large; in units of z / 256, as sum
  float sum[kHeadBlocks][kBlocks][4];  // O^T in units of z / 256
  float z;

  QUANT_DEVICE DecodeConsumer(const DecodeParams& params, const DecodeShared<C>& shared, int thread)
      : params(params),
        p(params.shared),
        shared(shared),
        thread(thread),
        warp(thread / 32),
        g(thread % 32 / 4),
        q(thread % 4) {}

  // Which token of a warp's sixteen is row `slot` of its MMAs: so that few rows of the cache that
  // are read at once lie in the same banks.
  static QUANT_DEVICE int token_of(int slot) { return slot ^ (slot >> 1 & 1); }
  // The byte where this thread's word `w` of a row of K or Qc begins.
  QUANT_DEVICE int byte_of(int w) const {
    constexpr int kWords = C::kVector / 4;
    return w / kWords * 4 * C::kVector + q * C::kVector + w % kWords * 4;
  }

  // Codes of high nibbles come out 16 times too large, so their queries are 16 times smaller.
  static QUANT_DEVICE uint32_t query_operand(uint32_t codes, int high) {
    const uint32_t halves = halves_of_e4m3(codes);
    return high ? multiply_add_halves(halves, 0x2C002C00, 0) : halves;
  }
  QUANT_DEVICE void load_queries(const DecodeSegment& segment) {
    const int64_t token = segment.sequence;
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      const int index = 8 * block + g, head = segment.head * p.ratio + index;
      const bool held = index < p.ratio;
      const uint8_t* from = p.q + token * p.q_token + head * p.q_head;
      float codes = 0;
      QUANT_UNROLL for (int w = 0; w < kBlocks / 2; ++w) {
        QUANT_UNROLL for (int high = 0; high < 2; ++high) {
          uint32_t word = 0;
          if (held) word = *reinterpret_cast<const uint32_t*>(from + byte_of(w) + high * C::kHalf);
          codes += sum_of_e4m3(word);
          const uint32_t order = permute(word, word, 0x3120);  // pairs of bytes 0, 2 and 1, 3
          query[block][2 * w + high][0] = query_operand(order, high);
          query[block][2 * w + high][1] = query_operand(order >> 16, high);
        }
      }
      codes += shuffle_xor(codes, 1);
      codes += shuffle_xor(codes, 2);
      if (q == 0) {
        row_sums()[index] = codes;
        row_units()[index] = held ? p.q_scale[token * p.q_scale_token + head] * p.scale : 1.0f;
      }
    }
    warp_sync();
  }
  // Of this warp, by head: there are few registers.
  QUANT_DEVICE float* row_sums() const { return shared.rows + warp * 2 * C::kHeads; }
  QUANT_DEVICE float* row_units() const { return row_sums() + C::kHeads; }
  QUANT_DEVICE void clear() {
    z = 0x1p-24f;
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      QUANT_UNROLL for (int i = 0; i < 2; ++i) {
        top[block][i] = kLowest;
        total[block][i] = offsets[block][i] = weights[block][i] = 0;
      }
      QUANT_UNROLL for (int b = 0; b < kBlocks; ++b) {
        QUANT_UNROLL for (int i = 0; i < 4; ++i) sum[block][b][i] = 0;
      }
    }
  }

  // score[block]: tokens of slots g, g and g + 8, g + 8; heads 2 q, 2 q + 1 by turns.
  QUANT_DEVICE void multiply_keys(const char* codes, float (&score)[kHeadBlocks][4]) const {
    constexpr int kWords = C::kVector / 4, kLoads = kBlocks / 2 / kWords;
    struct alignas(C::kVector) Words {
      uint32_t x[kWords];
    };
    const char* row = codes + (kWarpTokens * warp + token_of(g)) * C::kHalf;
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      QUANT_UNROLL for (int i = 0; i < 4; ++i) score[block][i] = 0;
    }
    QUANT_UNROLL for (int load = 0; load < kLoads; ++load) {
      const char* from = row + byte_of(load * kWords);
      const Words near = *reinterpret_cast<const Words*>(from);
      const Words far = *reinterpret_cast<const Words*>(from + 8 * C::kHalf);
      QUANT_UNROLL for (int w = 0; w < kWords; ++w) {
        const uint32_t x = near.x[w], y = far.x[w];
        const int step = 2 * (load * kWords + w);
        const uint32_t low[4] = {halves_of_low(x), halves_of_low(y), halves_of_low(x >> 8),
                                 halves_of_low(y >> 8)};
        const uint32_t high[4] = {halves_of_high(x), halves_of_high(y), halves_of_high(x >> 8),
                                  halves_of_high(y >> 8)};
        QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
          warp_mma(score[block], low, query[block][step]);
          warp_mma(score[block], high, query[block][step + 1]);
        }
      }
    }
  }

  static QUANT_DEVICE float over_tokens(float x) {
    QUANT_UNROLL for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
  }
  static QUANT_DEVICE float sum_over_tokens(float x) {
    QUANT_UNROLL for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
    return x;
  }

  // Scores to P as B fragments; M, l, z and what depends on them go on.
  QUANT_DEVICE void softmax(const char* scales, int key, int oldest, int length,
                            float (&score)[kHeadBlocks][4], uint32_t (&operand)[kHeadBlocks][2]) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(scales) + kWarpTokens * warp;
    float v_scale[2], v_offset[2];
    QUANT_UNROLL for (int i = 0; i < 2; ++i) {
      const int token = token_of(g + 8 * i), at = key + kWarpTokens * warp + token;
      const bool seen = at >= oldest && at < length;
      // What lies behind the last key may be anything, and 0 times NaN is NaN.
      const uint32_t of_key = seen ? pairs[token] : 0, of_value = seen ? pairs[kPage + token] : 0;
      const float k_scale = scale_of(of_key) * kLowUnit;
      const float k_offset = offset_of(of_key) - kCentre * scale_of(of_key);
      v_scale[i] = scale_of(of_value);
      v_offset[i] = offset_of(of_value);
      QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
        QUANT_UNROLL for (int h = 0; h < 2; ++h) {
          float& x = score[block][2 * i + h];
          x = x * k_scale + row_sums()[8 * block + 2 * q + h] * k_offset;
          if constexpr (C::kCaps) x = capped(x * row_units()[8 * block + 2 * q + h], p.cap);
          if (!seen) x = -infinity();
        }
      }
    }
    const float largest = over_tokens(fmaxf(fabsf(v_scale[0]), fabsf(v_scale[1])));
    const float new_z = fmaxf(z, power_of_two_above(largest));
    const float weight = kRangeOfP * reciprocal_of_power_of_two(new_z);
    const float of_z = z * reciprocal_of_power_of_two(new_z);
    State fade;
    uint32_t rounded[kHeadBlocks][2];
    bool changed = new_z != z;
    z = new_z;
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      QUANT_UNROLL for (int h = 0; h < 2; ++h) {
        float &near = score[block][h], &far = score[block][2 + h];
        const float u = C::kCaps ? 1 : row_units()[8 * block + 2 * q + h], old = top[block][h];
        const float now = fmaxf(old, ceilf(over_tokens(fmaxf(near, far)) * u));
        fade[block][h] = exponential2(old - now);
        changed |= now != old;
        near = exponential2(near * u - now);
        far = exponential2(far * u - now);
        top[block][h] = now;
        total[block][h] = total[block][h] * fade[block][h] + (near + far);
        offsets[block][h] =
            offsets[block][h] * fade[block][h] + (near * v_offset[0] + far * v_offset[1]);
      }
      const float w0 = v_scale[0] * weight, w1 = v_scale[1] * weight;
      const uint32_t codes = to_e4m3(score[block][0] * w0, score[block][1] * w0,
                                     score[block][2] * w1, score[block][3] * w1);
      rounded[block][0] = halves_of_e4m3(codes);
      rounded[block][1] = halves_of_e4m3(codes >> 16);
      QUANT_UNROLL for (int i = 0; i < 2; ++i) operand[block][i] = transpose(rounded[block][i]);
    }
    if (any_of_warp(changed)) {
      QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
        QUANT_UNROLL for (int h = 0; h < 2; ++h) weights[block][h] *= fade[block][h] * of_z;
        QUANT_UNROLL for (int b = 0; b < kBlocks; ++b) {
          QUANT_UNROLL for (int i = 0; i < 4; ++i) sum[block][b][i] *= fade[block][i % 2] * of_z;
        }
      }
    }
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      weights[block][0] += low_half(rounded[block][0]) + low_half(rounded[block][1]);
      weights[block][1] += high_half(rounded[block][0]) + high_half(rounded[block][1]);
    }
  }

  // Block b of the sums: channels g D/16 + b (rows g), and D/2 more (rows g + 8).
  QUANT_DEVICE void multiply_values(const char* codes, const uint32_t (&operand)[kHeadBlocks][2]) {
    constexpr int kAll = kBlocks / 4, kWords = kAll < 2 ? kAll : 2;  // of a token; in a load
    struct alignas(4 * kWords) Words {
      uint32_t x[kWords];
    };
    const char* row = codes + kWarpTokens * warp * C::kHalf + g * kBlocks;
    QUANT_UNROLL for (int load = 0; load < kAll / kWords; ++load) {
      Words of[4];
      QUANT_UNROLL for (int i = 0; i < 4; ++i) {
        const int token = token_of(2 * q + i % 2 + i / 2 * 8);
        of[i] = *reinterpret_cast<const Words*>(row + token * C::kHalf + 4 * kWords * load);
      }
      QUANT_UNROLL for (int w = 0; w < kWords; ++w) {
        const uint32_t four[4] = {of[0].x[w], of[1].x[w], of[2].x[w], of[3].x[w]};
        multiply_word(load * kWords + w, four, operand);
      }
    }
  }
  // A word of four tokens: channels 4 w .. 4 w + 3 of a row's D/16, and D/2 more.
  QUANT_DEVICE void multiply_word(int w, const uint32_t (&of)[4],
                                  const uint32_t (&operand)[kHeadBlocks][2]) {
    QUANT_UNROLL for (int half = 0; half < 2; ++half) {  // bytes 0, 1 of two tokens, then 2, 3
      uint32_t near = permute(of[0], of[1], half == 0 ? 0x5410 : 0x7632);
      uint32_t far = permute(of[2], of[3], half == 0 ? 0x5410 : 0x7632);
      QUANT_UNROLL for (int i = 0; i < 2; ++i) {
        const uint32_t a[4] = {halves_of_low(near), halves_of_high(near), halves_of_low(far),
                               halves_of_high(far)};
        QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
          warp_mma(sum[block][4 * w + 2 * half + i], a, operand[block]);
        }
        near >>= 8;
        far >>= 8;
      }
    }
  }

  QUANT_DEVICE void page(int key, int oldest, int length) {
    const char* stage = shared.stages + ring.stage * C::kStageBytes;
    float score[kHeadBlocks][4];
    uint32_t operand[kHeadBlocks][2];
    barrier_wait(shared.full + ring.stage, ring.parity);
    multiply_keys(stage, score);
    softmax(stage + 2 * C::kCodeBytes, key, oldest, length, score, operand);
    multiply_values(stage + C::kCodeBytes, operand);
    warp_sync();
    if (thread % 32 == 0) barrier_arrive(shared.empty + ring.stage);
    ring.advance();
  }

  // --- the end of a segment ---
  QUANT_DEVICE float* row_of(int of_warp, int head) const {
    return shared.sums + (of_warp * C::kHeads + head) * C::kPitch;
  }
  // Sums, M and l of every warp to shared memory.
  QUANT_DEVICE void deposit() {
    const float back = z * (1 / kRangeOfP);
    QUANT_UNROLL for (int block = 0; block < kHeadBlocks; ++block) {
      QUANT_UNROLL for (int h = 0; h < 2; ++h) {
        const float l = sum_over_tokens(total[block][h]);
        const float offset =
            sum_over_tokens(offsets[block][h] - weights[block][h] * (kCentre * back));
        float* row = row_of(warp, 8 * block + 2 * q + h);
        QUANT_UNROLL for (int b = 0; b < kBlocks; ++b) {
          row[g * kBlocks + b] = sum[block][b][h] * (back * kLowUnit) + offset;
          row[g * kBlocks + b + C::kHalf] = sum[block][b][2 + h] * (back * kHighUnit) + offset;
        }
        if (g == 0) {
          row[C::kDim] = top[block][h];
          row[C::kDim + 1] = l;
        }
      }
    }
  }

  struct alignas(16) Four {
    float x[4];
  };
  // What has been added so far of four channels of a head.
  struct Total {
    float x[4] = {0, 0, 0, 0}, top = kLowest, l = 0;
    QUANT_DEVICE void add(const float (&y)[4], float y_top, float y_l) {
      const float now = fmaxf(top, y_top);
      const float mine = exponential2(top - now), share = exponential2(y_top - now);
      QUANT_UNROLL for (int i = 0; i < 4; ++i) x[i] = x[i] * mine + y[i] * share;
      l = l * mine + y_l * share;
      top = now;
    }
  };
  QUANT_DEVICE uint4* partial(int worker, int head, int vector) const {
    const int64_t row = int64_t{1} * worker * p.ratio + head;
    return reinterpret_cast<uint4*>(params.partials + row * C::kPitch) + vector;
  }
  QUANT_DEVICE void add_warps(Total& sum_of, int head, int vector) const {
    QUANT_UNROLL for (int i = 0; i < kDecodeWarps; ++i) {
      const float* row = row_of(i, head);
      const Four four = *reinterpret_cast<const Four*>(row + 4 * vector);
      sum_of.add(four.x, row[C::kDim], row[C::kDim + 1]);
    }
  }
  QUANT_DEVICE void add_workers(Total& sum_of, int first, int worker, int head, int vector) const {
    constexpr int kAtOnce = 4;
    for (int begin = first; begin < worker; begin += kAtOnce) {
      float four[kAtOnce][4], last[kAtOnce][4];
      QUANT_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        const int other = begin + i < worker ? begin + i : begin;
        load_through(partial(other, head, vector), four[i]);
        load_through(partial(other, head, C::kDim / 4), last[i]);
      }
      QUANT_UNROLL for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < worker) sum_of.add(four[i], last[i][0], last[i][1]);
      }
    }
  }
  QUANT_DEVICE void publish(const Total& sum_of, int worker, int head, int vector) const {
    store_through(partial(worker, head, vector), sum_of.x);
    if (vector == 0) {
      const float last[4] = {sum_of.top, sum_of.l, 0, 0};
      store_through(partial(worker, head, C::kDim / 4), last);
    }
  }
  QUANT_DEVICE void store(const float (&y)[4], int sequence, int head, int vector) const {
    const int64_t at = sequence * p.out_token + head * p.out_head + 4 * vector;
    if (p.out_type == Type::bf16) {
      store_four<Bf16>(p.out, at, 4, true, y);
    } else if (p.out_type == Type::fp16) {
      store_four<Fp16>(p.out, at, 4, true, y);
    } else {
      store_four<float>(p.out, at, 4, true, y);
    }
  }

  // `first`: the first worker of the segment; this one is the last where `whole`.
  QUANT_DEVICE void finish(const DecodeSegment& segment, int first, int worker) {
    constexpr int kVectors = C::kDim / 4;
    const bool last = segment.end == segment.pages;
    deposit();
    if (last && thread == 0) {
      for (int other = first; other < worker; ++other) flag_wait(params.flags + other, 1);
    }
    group_sync(1, kDecodeConsumers);
    for (int i = thread; i < p.ratio * kVectors; i += kDecodeConsumers) {
      const int head = i / kVectors, vector = i % kVectors;
      Total total_of;
      if (last) add_workers(total_of, first, worker, head, vector);
      add_warps(total_of, head, vector);
      if (last) {
        const float share = 1.0f / (total_of.l == 0 ? 1.0f : total_of.l);
        float y[4];
        QUANT_UNROLL for (int j = 0; j < 4; ++j) y[j] = total_of.x[j] * share;
        store(y, segment.sequence, segment.head * p.ratio + head, vector);
      } else {
        publish(total_of, worker, head, vector);
      }
    }
    group_sync(1, kDecodeConsumers);
    if (thread != 0) return;
    if (!last) flag_set(params.flags + worker, 1);
    for (int other = first; last && other < worker; ++other) flag_clear(params.flags + other);
  }

  // Sequences without tokens, shared among the workers.
  QUANT_DEVICE void store_zeros(int worker) const {
    constexpr int kVectors = C::kDim / 4;
    const int vectors = p.kv_heads * p.ratio * kVectors;
    for (int sequence = worker; sequence < p.batch; sequence += params.workers) {
      if (p.kv_lens[sequence] > 0) continue;
      for (int i = thread; i < vectors; i += kDecodeConsumers) {
        store({0, 0, 0, 0}, sequence, i / kVectors, i % kVectors);
      }
    }
  }

  QUANT_DEVICE void run(const DecodeSchedule& schedule, int worker) {
    store_zeros(worker);
    DecodeSegment segment;
    for (DecodeWork work(schedule, worker); work.next(segment);) {
      const int length = p.kv_lens[segment.sequence];
      const int oldest = oldest_key(length - 1, p.window);
      const int first = first_page(length, p.window);
      load_queries(segment);
      clear();
      for (int i = segment.begin; i < segment.end; ++i) page((first + i) * kPage, oldest, length);
      finish(segment, schedule.owner(segment.start), worker);
    }
  }
};

}  // namespace quant
