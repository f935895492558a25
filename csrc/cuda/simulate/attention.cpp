// The attention kernels in the simulator, behind a C ABI for tests.
#include <string>

#include "cuda/attention_plan.h"
#include "cuda/decode_kernel.cuh"
#include "cuda/prefill_kernel.cuh"

namespace quant {
namespace {

std::string failure;
uint32_t* flags;

template <int kDim, int kHeadBlocks>
bool simulate(const QuantCudaDecode& d, Launch launch) {
  using C = DecodeConfig<kDim, kHeadBlocks>;
  const DecodeParams p = plan(d, flags);
  if (d.attention.head_dim != kDim || (p.shared.ratio + 7) / 8 != kHeadBlocks) return false;
  launch.blocks = p.workers;
  launch.threads = kDecodeThreads;
  launch.shared_bytes = C::kSharedBytes;
  failure = run(launch, [&] { decode_body<C>(p); });
  return true;
}

template <int kDim>
bool simulate(const QuantCudaPrefill& prefill, Launch launch) {
  using C = PrefillConfig<kDim>;
  if (prefill.attention.head_dim != kDim) return false;
  const PrefillParams p = plan(prefill);
  launch.blocks = prefill_blocks(p);
  launch.threads = kPrefillThreads;
  launch.shared_bytes = C::kSharedBytes;
  failure = run(launch, [&] { prefill_body<C>(p); });
  return true;
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

}  // namespace
}  // namespace quant

extern "C" {

int quant_cuda_prefill_check(const QuantCudaPrefill* prefill) { return quant::check(*prefill); }
int quant_cuda_decode_check(const QuantCudaDecode* decode) { return quant::check(*decode); }
int quant_cuda_decode_blocks(int heads, int kv_heads, int head_dim) {
  return quant::decode_blocks(heads, kv_heads, head_dim);
}
int64_t quant_cuda_decode_workspace(const QuantCudaDecode* decode) {
  return quant::decode_workspace(*decode);
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
  simulate<64, 1>(*decode, launch) || simulate<128, 1>(*decode, launch) ||
      simulate<256, 1>(*decode, launch) || simulate<64, 2>(*decode, launch) ||
      simulate<128, 2>(*decode, launch) || simulate<256, 2>(*decode, launch);
  return reason();
}

const char* quant_simulate_prefill(const QuantCudaPrefill* prefill, int resident, int late,
                                   unsigned seed) {
  using namespace quant;
  if (const int status = check(*prefill)) return refused(status);
  const Launch launch = launch_of(resident, late, seed);
  failure = "no kernel";
  simulate<64>(*prefill, launch) || simulate<128>(*prefill, launch) ||
      simulate<256>(*prefill, launch);
  return reason();
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
