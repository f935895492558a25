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
      return "columns is 0 or exceeds 8 * words_per_row";
    case QUANT_CPU_UNKNOWN_TYPE:
      return "a number type is none of those in quant_cpu.h";
    case QUANT_CPU_RAGGED_GROUPS:
      return "groups must divide the columns; in a GEMM they are 32, 64 or 128 wide, and k a "
             "multiple of 8";
    case QUANT_CPU_NOT_A_PAIR:
      return "silu_mul takes an even n and no residual";
    case QUANT_CPU_OUT_OF_MEMORY:
      return "no memory for intermediate results";
    case QUANT_CPU_ISA_UNAVAILABLE:
      return "the instruction set that was asked for is unknown, or this machine lacks it";
    case QUANT_CPU_INDEX_OUT_OF_RANGE:
      return "a position, slot, page or sequence is out of range";
    case QUANT_CPU_BAD_HEADS:
      return "query heads do not divide among KV heads, or head_dim is no multiple of 32 up to 256";
    case QUANT_CPU_UNKNOWN_OP:
      return "a replayed call is of an unknown op";
    default:
      return "unknown status";
  }
}
