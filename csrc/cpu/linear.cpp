// Y = X W^T with a dense weight (csrc/include/quant_cpu.h): checks, and the split of the work.
//
// An item is one block of rows of the weight and some tokens, as many as stay in the L2 cache.
// Ranges of tokens come one after the other, and every one of them reads the weight once.
#include <algorithm>

#include "arena.h"
#include "kernels.h"
#include "parallel.h"

namespace quant {
namespace {

constexpr int64_t TOKEN_BYTES = 1 << 20;  // of prepared tokens
// Below so many numbers the pool costs more than it saves.
constexpr int64_t PREPARE_ALONE = 1 << 15;

int run(const QuantCpuLinear& call, const OpKernels& kernels) {
  const int64_t together =
      linear_bytes(call.k);  // of LINEAR_TOKENS, and half of a thread's scratch
  const int64_t groups = (call.m + LINEAR_TOKENS - 1) / LINEAR_TOKENS;
  const int64_t range = std::max<int64_t>(2, TOKEN_BYTES / together) * LINEAR_TOKENS;
  const int64_t blocks = (call.n + LINEAR_ROWS - 1) / LINEAR_ROWS;
  const int64_t items = blocks * ((call.m + range - 1) / range);
  const auto threads = static_cast<int>(std::clamp<int64_t>(call.threads, 1, items));
  thread_local Arena arena;
  uint8_t* const memory = arena.reserve((groups + 2 * threads) * together);
  if (memory == nullptr) return QUANT_CPU_OUT_OF_MEMORY;
  parallel_for(groups, call.m * call.k > PREPARE_ALONE ? threads : 1, [&](int64_t group, int) {
    kernels.linear_prepare(call, group * LINEAR_TOKENS, memory + group * together);
  });
  parallel_for(items, threads, [&](int64_t item, int thread) {
    const int64_t first = item / blocks * range;
    const LinearPart part = {item % blocks * LINEAR_ROWS, first, std::min(range, call.m - first)};
    kernels.linear(call, part, memory + first / LINEAR_TOKENS * together,
                   memory + (groups + 2 * thread) * together);
  });
  return QUANT_CPU_OK;
}

}  // namespace
}  // namespace quant

int quant_cpu_linear(const QuantCpuLinear* call) {
  const quant::OpKernels* kernels = quant::op_kernels();
  if (kernels == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  if (call->m < 0 || call->n < 0 || call->k < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (call->type < QUANT_CPU_FP32 || call->type > QUANT_CPU_FP16) return QUANT_CPU_UNKNOWN_TYPE;
  if (call->m == 0 || call->n == 0) return QUANT_CPU_OK;
  if (call->out == nullptr || (call->k != 0 && (call->x == nullptr || call->weight == nullptr))) {
    return QUANT_CPU_NULL_POINTER;
  }
  return quant::run(*call, *kernels);
}
