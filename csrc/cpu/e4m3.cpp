// E4M3 codes to FP32.
//
// By a table, because arithmetic on the bits passes through FP32 subnormals, which a process may
// have told its CPU to flush to zero.
#include "gemm.h"

int quant_cpu_e4m3_to_float(const uint8_t* __restrict codes, int64_t count,
                            float* __restrict values) {
  if (count < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (count == 0) return QUANT_CPU_OK;
  if (codes == nullptr || values == nullptr) return QUANT_CPU_NULL_POINTER;
  for (int64_t i = 0; i < count; ++i) values[i] = quant::kFp8Tables.value[codes[i]];
  return QUANT_CPU_OK;
}
