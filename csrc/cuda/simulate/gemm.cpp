// The GEMM kernels in the simulator, behind a C ABI for tests.
#include <string>

#include "cuda/gemm_kernel.cuh"
#include "cuda/gemm_plan.h"

namespace quant {
namespace {

std::string failure;
uint32_t* flags;

template <Kind kKind, int kGroup, int kTokens, int kCluster>
bool simulate(const QuantCudaGemm& g, Launch launch) {
  constexpr int kind = static_cast<int>(kKind);
  if constexpr (has_kernel(kind, kGroup, kTokens, kCluster)) {
    if (g.kind != kind || g.group_size != kGroup || g.tile_tokens != kTokens ||
        g.cluster != kCluster) {
      return false;
    }
    using C = Config<kKind, kGroup, kTokens, kCluster>;
    const GemmParams p = plan(g, flags);
    const TensorMap x{static_cast<const uint8_t*>(g.x),
                      g.columns,
                      g.tokens,
                      g.x_stride,
                      kBlockColumns,
                      kTokens / kCluster};
    launch.blocks = p.schedule.workers * kCluster;
    launch.threads = kThreads;
    launch.cluster = kCluster;
    launch.shared_bytes = kSharedBytes;
    failure = run(launch, [&] { gemm_body<C>(p, &x); });
    return true;
  } else {
    return false;
  }
}
template <Kind kKind, int kGroup>
bool of_group(const QuantCudaGemm& g, const Launch& launch) {
  return simulate<kKind, kGroup, 16, 1>(g, launch) || simulate<kKind, kGroup, 32, 1>(g, launch) ||
         simulate<kKind, kGroup, 64, 1>(g, launch) || simulate<kKind, kGroup, 128, 1>(g, launch) ||
         simulate<kKind, kGroup, 128, 2>(g, launch) || simulate<kKind, kGroup, 256, 1>(g, launch) ||
         simulate<kKind, kGroup, 256, 2>(g, launch);
}
template <Kind kKind>
bool of_kind(const QuantCudaGemm& g, const Launch& launch) {
  return of_group<kKind, 128>(g, launch) || of_group<kKind, 64>(g, launch) ||
         of_group<kKind, 32>(g, launch);
}

}  // namespace
}  // namespace quant

extern "C" {

int quant_cuda_gemm_check(const QuantCudaGemm* gemm) { return quant::check(*gemm); }

// Null where all threads ended, or what went wrong; a status of the check as "status N".
const char* quant_simulate_gemm(const QuantCudaGemm* gemm, uint32_t* zeros, int resident, int late,
                                unsigned seed) {
  using namespace quant;
  flags = zeros;
  if (const int status = check(*gemm)) {
    failure = "status " + std::to_string(status);
    return failure.c_str();
  }
  Launch launch{};
  launch.resident = resident;
  launch.late = late != 0;
  launch.seed = seed;
  failure = "no kernel";
  of_kind<Kind::int8_channel>(*gemm, launch) || of_kind<Kind::int8_group>(*gemm, launch) ||
      of_kind<Kind::fp8_channel>(*gemm, launch) || of_kind<Kind::fp8_channel_8>(*gemm, launch) ||
      of_kind<Kind::lut>(*gemm, launch) || of_kind<Kind::lut_8>(*gemm, launch) ||
      of_kind<Kind::exact>(*gemm, launch) || of_kind<Kind::exact_8>(*gemm, launch);
  return failure.empty() ? nullptr : failure.c_str();
}
}
