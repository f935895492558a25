// The GEMM kernels of one kind, QUANT_KIND: this file is compiled once for each.
#include "cuda/gemm_kernel.cuh"
#include "cuda/gemm_launch.h"
#include "cuda/gemm_plan.h"

namespace quant {
namespace {

template <Kind kKind, int kGroup, int kTokens, int kCluster>
const void* kernel(int group, int tokens, int cluster) {
  if constexpr (has_kernel(static_cast<int>(kKind), kGroup, kTokens, kCluster)) {
    if (group == kGroup && tokens == kTokens && cluster == kCluster) {
      return reinterpret_cast<const void*>(gemm_kernel<Config<kKind, kGroup, kTokens, kCluster>>);
    }
  }
  return nullptr;
}
template <Kind kKind, int kGroup>
const void* of_group(int group, int tokens, int cluster) {
  for (const auto find :
       {kernel<kKind, kGroup, 16, 1>, kernel<kKind, kGroup, 32, 1>, kernel<kKind, kGroup, 64, 1>,
        kernel<kKind, kGroup, 64, 2>, kernel<kKind, kGroup, 128, 1>, kernel<kKind, kGroup, 128, 2>,
        kernel<kKind, kGroup, 256, 1>, kernel<kKind, kGroup, 256, 2>}) {
    if (const void* found = find(group, tokens, cluster)) return found;
  }
  return nullptr;
}

}  // namespace

template <>
const void* find_kernel<Kind::QUANT_KIND>(int group, int tokens, int cluster) {
  for (const auto find : {of_group<Kind::QUANT_KIND, 128>, of_group<Kind::QUANT_KIND, 64>,
                          of_group<Kind::QUANT_KIND, 32>}) {
    if (const void* found = find(group, tokens, cluster)) return found;
  }
  return nullptr;
}

}  // namespace quant
