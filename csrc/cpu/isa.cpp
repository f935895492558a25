// Which kernels run: the widest that this machine has, or those that somebody asked for by name.
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "gemm.h"
#include "kernels.h"

namespace quant {
namespace portable {
extern const OpKernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const OpKernels table;
}
namespace avx512 {
extern const OpKernels table;
}
namespace amx {
extern const OpKernels table;
}
#endif

namespace {

#if defined(__x86_64__)
// Linux keeps tile registers for processes that asked for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Isa {
  const char* name;
  bool present;
  const OpKernels* ops;  // all but GEMMs
  const Kernels* int8;   // GEMMs of INT8
  const Kernels* bf16;   // of FP8 whose operands are BF16 numbers
  const Kernels* fp32;   // of FP8 otherwise
};

// Best first.
struct Isas {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx_vnni = avx2 && __builtin_cpu_supports("avxvnni");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool amx = avx512 && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
                   may_use_tiles();
  // Where it was measured, on Intel's Xeons, vdpbf16ps takes four times as long as an FMA in FP32,
  // for twice the products; on AMD's Zen 5 both take the same time.
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
  const Kernels* const wide = bf16 ? &kBf16Avx512 : &kFp32Avx512;
  const Isa all[5] = {
      {"amx", amx, &amx::table, &kInt8Amx, &kBf16Amx, &kFp32Avx512},
      {"avx512_vnni", avx512, &avx512::table, &kInt8Avx512, wide, &kFp32Avx512},
      {"avx_vnni", avx_vnni, &avx2::table, &kInt8AvxVnni, &kFp32Avx2, &kFp32Avx2},
      {"avx2", avx2, &avx2::table, &kInt8Avx2, &kFp32Avx2, &kFp32Avx2},
      {"portable", true, &portable::table, &kInt8Portable, &kFp32Portable, &kFp32Portable}};
#else
  const Isa all[1] = {
      {"portable", true, &portable::table, &kInt8Portable, &kFp32Portable, &kFp32Portable}};
#endif
  std::string names;

  Isas() {
    for (const Isa& isa : all) {
      if (isa.present) names += (names.empty() ? "" : " ") + std::string(isa.name);
    }
  }

  const Isa* find(const char* name) const {
    for (const Isa& isa : all) {
      if (isa.present && (name == nullptr || *name == 0 || std::strcmp(name, isa.name) == 0)) {
        return &isa;
      }
    }
    return nullptr;
  }
};

const Isas& isas() {
  static const Isas found;
  return found;
}

std::atomic<const Isa*> forced{nullptr};

const Isa* current() {
  const Isa* isa = forced.load(std::memory_order_relaxed);
  if (isa != nullptr) return isa;
  static const Isa* const first = isas().find(std::getenv("QUANT_CPU_ISA"));
  return first;
}

}  // namespace

const Kernels* kernels_for(bool int8, bool exact_in_bf16) {
  const Isa* isa = current();
  if (isa == nullptr) return nullptr;
  return int8 ? isa->int8 : exact_in_bf16 ? isa->bf16 : isa->fp32;
}

const OpKernels* op_kernels() {
  const Isa* isa = current();
  return isa == nullptr ? nullptr : isa->ops;
}

}  // namespace quant

const char* quant_cpu_isas(void) { return quant::isas().names.c_str(); }

const char* quant_cpu_isa(void) {
  const quant::Isa* isa = quant::current();
  return isa == nullptr ? "" : isa->name;
}

int quant_cpu_set_isa(const char* name) {
  const quant::Isa* isa = nullptr;
  if (name != nullptr && *name != 0) {
    isa = quant::isas().find(name);
    if (isa == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  }
  quant::forced.store(isa, std::memory_order_relaxed);
  return QUANT_CPU_OK;
}
