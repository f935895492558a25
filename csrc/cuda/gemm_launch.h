// From a kind, group, tile and cluster to the kernel: gemm.cu has those of one kind.
#pragma once

#include "cuda/gemm_params.h"

namespace quant {

// Null where there is none, as gemm_plan.h's has_kernel says.
template <Kind kKind>
const void* find_kernel(int group, int tokens, int cluster);

#define QUANT_KERNELS_OF(kind) \
  template <>                  \
  const void* find_kernel<Kind::kind>(int group, int tokens, int cluster);
QUANT_KERNELS_OF(int8_channel)
QUANT_KERNELS_OF(int8_group)
QUANT_KERNELS_OF(fp8_channel)
QUANT_KERNELS_OF(fp8_channel_8)
QUANT_KERNELS_OF(lut)
QUANT_KERNELS_OF(lut_8)
QUANT_KERNELS_OF(exact)
QUANT_KERNELS_OF(exact_8)
#undef QUANT_KERNELS_OF

}  // namespace quant
