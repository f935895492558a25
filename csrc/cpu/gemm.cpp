// Y = X W^T (csrc/include/quant_cpu.h): checks, and the split of the work.
//
// An item of work is some blocks of 64 outputs, with silu_mul of the gate and what belongs to them
// of up, and some tokens. Items are independent, and none sums over a part of K: results depend
// neither on the threads nor on how many tokens there are.
#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "parallel.h"

namespace quant {
namespace {

constexpr int64_t kSumBytes = 4 * kBlock;  // of a token
// Below so many activations the pool costs more than it saves.
constexpr int64_t kPrepareAlone = 1 << 15;
constexpr int64_t kTokensTogether = 16;  // prepared, and summed, whether they exist or not

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Work {
  const Gemm& g;
  const Kernels& kernels;
  const OpKernels& ops;
  int64_t outputs;     // of Y: N, or N / 2 with silu_mul
  int64_t together;    // blocks of outputs of an item
  int64_t range;       // tokens of an item
  int64_t item_count;  // ranges for every `together` blocks
  int64_t sums_bytes;  // of one block's sums
  const uint8_t* prepared;

  int64_t output_blocks() const { return ceil_div(outputs, kBlock); }
  int64_t groups() const { return ceil_div(output_blocks(), together); }
  int64_t ranges() const { return ceil_div(g.m, range); }
  int64_t sums() const { return g.silu_mul ? 2 * together + 1 : together; }
};

void run_item(const Work& work, int64_t item, uint8_t* scratch) {
  const Gemm& g = work.g;
  // One range after the other: a thread's tokens stay in its L2 cache.
  const int64_t begin = item % work.groups() * work.together;
  const int64_t end = std::min(begin + work.together, work.output_blocks());
  const int64_t first = item / work.groups() * work.range;
  const int tokens = static_cast<int>(std::min(work.range, g.m - first));
  Blocks blocks = {};
  for (int64_t block = begin; block < end; ++block) blocks.at[blocks.count++] = block;
  if (g.silu_mul) {
    const int64_t up = (work.outputs + begin * kBlock) / kBlock;
    const int64_t shifted = work.outputs % kBlock != 0 ? 1 : 0;
    const int64_t up_end = std::min(up + end - begin + shifted, g.blocks());
    for (int64_t block = up; block < up_end; ++block) blocks.at[blocks.count++] = block;
  }
  blocks.next = item + 1 < work.item_count ? (item + 1) % work.groups() * work.together : -1;
  uint8_t* const sums = scratch;
  uint8_t* const rest = sums + work.sums() * work.sums_bytes;
  if (g.k == 0) {
    std::memset(sums, 0, static_cast<size_t>(rest - sums));
  } else {
    work.kernels.multiply(g, blocks, first, tokens, work.prepared, rest, sums, work.sums_bytes);
  }
  for (int64_t i = 0; i < end - begin; ++i) {
    work.ops.finish_gemm(g, {(begin + i) * kBlock, first, tokens, sums + i * work.sums_bytes,
                             sums + (end - begin + i) * work.sums_bytes, work.sums_bytes});
  }
}

// Enough items for every thread, but no more passes over the weights: first blocks are parted, then
// tokens.
void divide(Work& work, int threads) {
  const int64_t m = work.g.m, blocks = work.output_blocks();
  const int64_t tile = work.kernels.tile;
  work.together = 1;
  work.range = m;
  if (m > tile) {
    const int64_t most_blocks = work.kernels.blocks / (work.g.silu_mul ? 2 : 1);
    while (2 * work.together <= most_blocks && blocks / (2 * work.together) >= 4 * threads) {
      work.together *= 2;
    }
    const int64_t wanted = std::min(ceil_div(4 * threads, work.groups()), ceil_div(m, tile));
    const int64_t most = round_up(work.kernels.most_tokens(work.g), tile);
    const int64_t ranges = std::max(wanted, ceil_div(m, most));
    work.range = round_up(ceil_div(m, ranges), tile);
  }
  work.item_count = work.groups() * work.ranges();
  work.sums_bytes = round_up(work.range, kTokensTogether) * kSumBytes;
}

int run(const Gemm& g, int threads) {
  const bool int8 = g.numerics == QUANT_CPU_INT8;
  const Kernels* kernels = kernels_for(int8, g.per_channel || g.numerics == QUANT_CPU_LUT);
  const OpKernels* ops = op_kernels();
  if (kernels == nullptr || ops == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  threads = std::max(threads, 1);
  Work work = {g, *kernels, *ops, g.silu_mul ? g.n / 2 : g.n, 0, 0, 0, 0, nullptr};
  divide(work, threads);
  const int64_t prepared_bytes = round_up(g.m, kTokensTogether) * kernels->token_bytes(g);
  const int64_t scratch_bytes =
      round_up(work.sums() * work.sums_bytes + kernels->scratch_bytes(g), 4096);
  const auto team = static_cast<int>(std::min<int64_t>(threads, work.item_count));
  thread_local Arena arena;
  uint8_t* const memory = arena.reserve(prepared_bytes + team * scratch_bytes);
  if (memory == nullptr) return QUANT_CPU_OUT_OF_MEMORY;
  work.prepared = memory;
  parallel_for(ceil_div(g.m, kernels->together), g.m * g.k > kPrepareAlone ? threads : 1,
               [&](int64_t i, int) { kernels->prepare(g, i * kernels->together, memory); });
  parallel_for(work.item_count, team, [&](int64_t item, int thread) {
    run_item(work, item, memory + prepared_bytes + thread * scratch_bytes);
  });
  return QUANT_CPU_OK;
}

bool is_type(int64_t type) { return type >= QUANT_CPU_FP32 && type <= QUANT_CPU_FP16; }

}  // namespace
}  // namespace quant

int quant_cpu_gemm(const QuantCpuGemm* call) {
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  const quant::Gemm g(*call);
  if (g.m < 0 || g.n < 0 || g.k < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (g.numerics < QUANT_CPU_INT8 || g.numerics > QUANT_CPU_EXACT || !quant::is_type(g.out_type) ||
      (g.bias != nullptr && !quant::is_type(g.bias_type)) ||
      (g.residual != nullptr && !quant::is_type(g.residual_type))) {
    return QUANT_CPU_UNKNOWN_TYPE;
  }
  const bool known =
      g.per_channel || g.group_size == 32 || g.group_size == 64 || g.group_size == 128;
  if (g.k % 8 != 0 || !known || (!g.per_channel && g.k % g.group_size != 0)) {
    return QUANT_CPU_RAGGED_GROUPS;
  }
  if (g.silu_mul != 0 && (g.n % 2 != 0 || g.residual != nullptr)) return QUANT_CPU_NOT_A_PAIR;
  if (g.m == 0 || g.n == 0) return QUANT_CPU_OK;
  if (g.x_scale == nullptr || g.c == nullptr || g.out == nullptr ||
      (g.k != 0 && (g.x == nullptr || g.codes == nullptr || (!g.per_channel && g.t == nullptr)))) {
    return QUANT_CPU_NULL_POINTER;
  }
  return quant::run(g, static_cast<int>(std::clamp<int64_t>(g.threads, 1, 1 << 16)));
}
