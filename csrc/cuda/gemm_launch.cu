#include "cuda/device.h"
#include "cuda/gemm_launch.h"
#include "cuda/gemm_plan.h"
#include "quant_cuda.h"

namespace quant {
namespace {

constexpr int kGemmThreads = 384, kGemmSharedBytes = 227 * 1024;

const void* kernel_of(const QuantCudaGemm& g) {
  constexpr decltype(&find_kernel<Kind::lut>) kFind[] = {
      find_kernel<Kind::int8_channel>, find_kernel<Kind::int8_group>,
      find_kernel<Kind::fp8_channel>,  find_kernel<Kind::fp8_channel_8>,
      find_kernel<Kind::lut>,          find_kernel<Kind::lut_8>,
      find_kernel<Kind::exact>,        find_kernel<Kind::exact_8>};
  return kFind[g.kind](g.group_size, g.tile_tokens, g.cluster);
}

int start(const QuantCudaGemm& g, int device, cudaStream_t stream) {
  if (const int status = check(g)) return status;
  if (const int status = require_hopper(device)) return status;
  const OnDevice on(device);
  if (on.status()) return on.status();
  uint32_t* flags = nullptr;
  if (g.split) {
    int status = QUANT_CUDA_OK;
    flags = flags_of(g.workspace, device, &status);
    if (status) return status;
  }
  GemmParams p = plan(g, flags);
  CUtensorMap x;
  if (const int status = make_tensor_map(&x, g.x, g.columns, g.tokens, g.x_stride, kBlockColumns,
                                         g.tile_tokens / g.cluster)) {
    return status;
  }
  const void* kernel = kernel_of(g);
  if (kernel == nullptr) return QUANT_CUDA_NO_KERNEL;
  if (const int status = allow_shared_memory(kernel, device, kGemmSharedBytes)) return status;
  void* arguments[] = {&p, &x};
  return launch(kernel, p.schedule.workers * g.cluster, kGemmThreads, g.cluster, kGemmSharedBytes,
                arguments, stream);
}

}  // namespace
}  // namespace quant

int quant_cuda_gemm_check(const QuantCudaGemm* gemm) {
  return gemm == nullptr ? QUANT_CUDA_NULL_POINTER : quant::check(*gemm);
}

int64_t quant_cuda_gemm_workspace(const QuantCudaGemm* gemm) {
  return gemm == nullptr ? 0 : quant::partial_bytes(*gemm);
}

int quant_cuda_gemm(const QuantCudaGemm* gemm, int device, void* stream) {
  if (gemm == nullptr) return QUANT_CUDA_NULL_POINTER;
  return quant::start(*gemm, device, static_cast<cudaStream_t>(stream));
}
