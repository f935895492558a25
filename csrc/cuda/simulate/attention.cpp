// The attention kernels in the simulator, behind a C ABI for tests.
#include <string>

#include "cuda/attention_plan.h"
#include "cuda/decode_kernel.cuh"
#include "cuda/prefill_expand.cuh"
#include "cuda/prefill_kernel.cuh"

namespace quant {
namespace {

std::string failure;
uint32_t* flags;

template <int kDim, int kHeadBlocks, int kOptions>
bool simulate(const QuantCudaDecode& d, Launch launch) {
  using C = DecodeConfig<kDim, kHeadBlocks, kOptions>;
  const DecodeParams p = plan(d, flags);
  if (options(d) != kOptions) return false;
  if (d.attention.head_dim != kDim || (p.shared.ratio + 7) / 8 != kHeadBlocks) return false;
  launch.blocks = p.workers;
  launch.threads = kDecodeThreads;
  launch.shared_bytes = C::kSharedBytes;
  failure = run(launch, [&] { decode_body<C>(p); });
  return true;
}

template <int kDim, int kOptions>
bool simulate(const QuantCudaPrefill& prefill, Launch launch) {
  using C = PrefillConfig<kDim, kOptions>;
  if (prefill.attention.head_dim != kDim || options(prefill) != kOptions) return false;
  const PrefillParams p = plan(prefill);
  if constexpr (!C::kUnpacks) {
    launch.blocks = expand_blocks(p);
    launch.threads = kExpandThreads;
    failure = run(launch, [&] { expand_body<kDim>(p); });
    if (!failure.empty()) return true;
  }
  launch.blocks = prefill_blocks(p);
  launch.threads = kPrefillThreads;
  launch.shared_bytes = C::kSharedBytes;
  failure = run(launch, [&] { prefill_body<C>(p); });
  return true;
}

template <int kOptions>
bool simulate_dims(const QuantCudaDecode& d, const Launch& launch) {
  return simulate<64, 1, kOptions>(d, launch) || simulate<128, 1, kOptions>(d, launch) ||
         simulate<256, 1, kOptions>(d, launch) || simulate<64, 2, kOptions>(d, launch) ||
         simulate<128, 2, kOptions>(d, launch) || simulate<256, 2, kOptions>(d, launch);
}
template <int kOptions>
bool simulate_dims(const QuantCudaPrefill& prefill, const Launch& launch) {
  return simulate<64, kOptions>(prefill, launch) || simulate<128, kOptions>(prefill, launch) ||
         simulate<256, kOptions>(prefill, launch);
}

Launch launch_of(int resident, int late, unsigned seed) {
  Launch launch{};
  launch.cluster = 1;
  launch.resident = resident;
  launch.late = late != 0;
  launch.seed = seed;
  return launch;
}
const char* reason() { return failure.empty() ? nullptr : failure.c_str(); }
const char* refused(int status) {
  failure = "status " + std::to_string(status);
  return failure.c_str();
}

template <int kDim>
void layout(int* chunks, int* words) {
  for (int i = 0; i < kPage * kDim / 32; ++i) {
    const KeyChunk at = key_chunk<kDim>(i);
    chunks[2 * i] = at.token;
    chunks[2 * i + 1] = at.chunk;
  }
  for (int i = 0; i < kDim / 64 * 32; ++i) words[i] = value_word<kDim>(i % 32, i / 32);
}

}  // namespace
}  // namespace quant

extern "C" {

// prefill_layout.h as tables: tokens, columns [64] of slots; (token, chunk) of every piece of keys;
// words [rounds, 32] of values.
void quant_prefill_layout(int head_dim, int* tokens, int* columns, int* chunks, int* words) {
  using namespace quant;
  for (int slot = 0; slot < kPage; ++slot) {
    tokens[slot] = token_of_slot(slot);
    columns[slot] = column_of_slot(slot);
  }
  head_dim == 64    ? layout<64>(chunks, words)
  : head_dim == 128 ? layout<128>(chunks, words)
                    : layout<256>(chunks, words);
}

// E4M3 and FP16 of the codes of four bytes: low nibbles, then high ones.
void quant_attention_codes(const uint32_t* bytes, int64_t count, uint32_t* e4m3, uint32_t* halves) {
  using namespace quant;
  for (int64_t i = 0; i < count; ++i) {
    e4m3[2 * i] = e4m3_of_low(bytes[i]);
    e4m3[2 * i + 1] = e4m3_of_high(bytes[i]);
    halves[2 * i] = halves_of_low(bytes[i]);
    halves[2 * i + 1] = halves_of_high(bytes[i]);
  }
}

int quant_cuda_prefill_check(const QuantCudaPrefill* prefill) { return quant::check(*prefill); }
int quant_cuda_decode_check(const QuantCudaDecode* decode) { return quant::check(*decode); }
int quant_cuda_decode_blocks(int heads, int kv_heads, int head_dim) {
  return quant::decode_blocks(heads, kv_heads, head_dim);
}
int64_t quant_cuda_decode_workspace(const QuantCudaDecode* decode) {
  return quant::decode_workspace(*decode);
}
int64_t quant_cuda_prefill_workspace(const QuantCudaPrefill* prefill) {
  return quant::prefill_workspace(*prefill);
}
int quant_cuda_prefill_gains(const QuantCudaPrefill* prefill) {
  return quant::check(*prefill) == QUANT_CUDA_OK && quant::gains(*prefill);
}

// Null where all threads ended, or what went wrong; a status of the check as "status N".
// zeros: one a worker, zeros again after.
const char* quant_simulate_decode(const QuantCudaDecode* decode, uint32_t* zeros, int resident,
                                  int late, unsigned seed) {
  using namespace quant;
  flags = zeros;
  if (const int status = check(*decode)) return refused(status);
  const Launch launch = launch_of(resident, late, seed);
  failure = "no kernel";
  simulate_dims<kPlain>(*decode, launch) || simulate_dims<kSoftCap>(*decode, launch);
  return reason();
}

const char* quant_simulate_prefill(const QuantCudaPrefill* prefill, int resident, int late,
                                   unsigned seed) {
  using namespace quant;
  if (const int status = check(*prefill)) return refused(status);
  const Launch launch = launch_of(resident, late, seed);
  failure = "no kernel";
  constexpr int kBoth = kSoftCap | kSkips;
  simulate_dims<kPlain>(*prefill, launch) || simulate_dims<kSoftCap>(*prefill, launch) ||
      simulate_dims<kSkips>(*prefill, launch) || simulate_dims<kBoth>(*prefill, launch) ||
      simulate_dims<kExpanded>(*prefill, launch) ||
      simulate_dims<kExpanded | kSoftCap>(*prefill, launch) ||
      simulate_dims<kExpanded | kSkips>(*prefill, launch) ||
      simulate_dims<kExpanded | kBoth>(*prefill, launch);
  return reason();
}

// The tiles of every block, in its order, as rows (block, sequence, head, start, tokens, end); null
// where all threads ended. *count: how many there are.
const char* quant_simulate_prefill_tiles(const QuantCudaPrefill* prefill, int* rows, int room,
                                         int* count) {
  using namespace quant;
  const PrefillParams p = plan(*prefill);
  Launch launch = launch_of(1, 0, 0);
  launch.blocks = prefill_blocks(p);
  launch.threads = 32;
  *count = 0;
  failure = run(launch, [&] {
    const PrefillSchedule schedule{p, thread_index()};
    for (int round = 0;; ++round) {
      const PrefillTile tile = schedule.tile_of_round(round);
      if (tile.tokens == 0) break;
      if (thread_index() != 0 || *count == room) continue;
      const int row[] = {block_index(), tile.sequence, tile.head,
                         tile.start,    tile.tokens,   tile.end};
      std::copy(std::begin(row), std::end(row), rows + 6 * (*count)++);
    }
  });
  return reason();
}

// Of the last launch: pages that warpgroups might have skipped, and those that they did.
void quant_simulate_skipped(int64_t* pages, int64_t* skipped) {
  *pages = quant::votes().held;
  *skipped = quant::votes().unanimous;
}

// The pages of a worker as rows (sequence, head, first, end); how many there are.
int quant_decode_work(const int* ends, int batch, int kv_heads, int workers, int worker, int* rows,
                      int room) {
  using namespace quant;
  const DecodeSchedule schedule{ends, batch, kv_heads, workers};
  DecodeSegment segment;
  int count = 0;
  for (DecodeWork work(schedule, worker); work.next(segment) && count < room; ++count) {
    const int row[] = {segment.sequence, segment.head, segment.begin, segment.end};
    std::copy(std::begin(row), std::end(row), rows + 4 * count);
  }
  return count;
}
}
