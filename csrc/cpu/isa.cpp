// Which instruction set's kernels run: the best of the CPU, or the one that is named.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace quant {

namespace portable {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

// The kernels of that name, or for null the best; null where the CPU has not got them.
const Kernels* find(const char* name) {
  const auto wanted = [&](const Kernels& it) { return name == nullptr || !strcmp(name, it.name); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && wanted(avx512::table)) return &avx512::table;
  if (has_avx2 && wanted(avx2::table)) return &avx2::table;
#endif
  return wanted(portable::table) ? &portable::table : nullptr;
}

const Kernels* from_environment() {
  const char* name = getenv("QUANT_CPU_ISA");
  return find(name != nullptr && *name != '\0' ? name : nullptr);
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> it{from_environment()};
  return it;
}

}  // namespace

const Kernels* kernels() { return chosen().load(std::memory_order_relaxed); }

}  // namespace quant

const char* quant_cpu_isa(void) {
  const quant::Kernels* it = quant::kernels();
  return it == nullptr ? nullptr : it->name;
}

int quant_cpu_use_isa(const char* name) {
  const quant::Kernels* it = name == nullptr ? quant::from_environment() : quant::find(name);
  if (it == nullptr) return QUANT_CPU_NO_SUCH_ISA;
  quant::chosen().store(it, std::memory_order_relaxed);
  return QUANT_CPU_OK;
}
