#include "cuda/device.h"
#include "cuda/gemm_launch.h"
#include "cuda/gemm_plan.h"
#include "cuda/quantize_kernel.cuh"
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

const void* quantize_kernel_of(Type type) {
  return type == Type::bf16   ? reinterpret_cast<const void*>(quantize_kernel<Bf16>)
         : type == Type::fp16 ? reinterpret_cast<const void*>(quantize_kernel<Fp16>)
                              : reinterpret_cast<const void*>(quantize_kernel<float>);
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
  const int blocks = p.schedule.workers * g.cluster;
  const int status =
      launch(kernel, blocks, kGemmThreads, g.cluster, kGemmSharedBytes, arguments, stream);
  if (status || p.maxima == nullptr) return status;
  QuantizeParams q = plan_quantize(g, p);
  void* its_arguments[] = {&q};
  return launch(quantize_kernel_of(p.out_type), static_cast<int>(quantize_blocks(g)),
                kQuantizeThreads, 1, 0, its_arguments, stream);
}

}  // namespace
}  // namespace quant

int quant_cuda_gemm_check(const QuantCudaGemm* gemm) {
  return gemm == nullptr ? QUANT_CUDA_NULL_POINTER : quant::check(*gemm);
}

int64_t quant_cuda_gemm_workspace(const QuantCudaGemm* gemm) {
  return gemm == nullptr ? 0 : quant::workspace_bytes(*gemm);
}

int quant_cuda_gemm(const QuantCudaGemm* gemm, int device, void* stream) {
  if (gemm == nullptr) return QUANT_CUDA_NULL_POINTER;
  return quant::start(*gemm, device, static_cast<cudaStream_t>(stream));
}
