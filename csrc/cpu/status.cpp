#include "quant_cpu.h"

int quant_cpu_abi_version(void) { return QUANT_CPU_ABI_VERSION; }

const char* quant_cpu_error_string(int status) {
  switch (status) {
    case QUANT_CPU_OK:
      return "no error";
    case QUANT_CPU_NULL_POINTER:
      return "a pointer is null";
    case QUANT_CPU_NEGATIVE_SIZE:
      return "a size is negative";
    case QUANT_CPU_COLUMNS_OUT_OF_RANGE:
      return "columns exceeds 8 * words_per_row";
    default:
      return "unknown status";
  }
}
