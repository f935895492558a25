// The attention kernels and their launchers.
#include "cuda/attention_plan.h"
#include "cuda/decode_kernel.cuh"
#include "cuda/device.h"
#include "cuda/prefill_expand.cuh"
#include "cuda/prefill_kernel.cuh"
#include "quant_cuda.h"

namespace quant {
namespace {

struct Kernel {
  const void* function = nullptr;
  int shared_bytes = 0, blocks = 0;  // blocks: on a multiprocessor
};

template <int kDim, int kOptions>
Kernel prefill_of() {
  using C = PrefillConfig<kDim, kOptions>;
  return {reinterpret_cast<const void*>(prefill_kernel<C>), C::kSharedBytes, 1};
}
template <int kOptions>
Kernel prefill_of(int head_dim) {
  return head_dim == 64    ? prefill_of<64, kOptions>()
         : head_dim == 128 ? prefill_of<128, kOptions>()
                           : prefill_of<256, kOptions>();
}
Kernel prefill_of(const QuantCudaPrefill& prefill) {
  const int head_dim = prefill.attention.head_dim;
  constexpr decltype(&prefill_of<kPlain>) kFind[] = {
      prefill_of<kPlain>,
      prefill_of<kSoftCap>,
      prefill_of<kSkips>,
      prefill_of<kSoftCap | kSkips>,
      prefill_of<kExpanded>,
      prefill_of<kExpanded | kSoftCap>,
      prefill_of<kExpanded | kSkips>,
      prefill_of<kExpanded | kSoftCap | kSkips>,
  };
  return kFind[options(prefill)](head_dim);
}
Kernel expand_of(int head_dim) {
  const auto kernel = head_dim == 64    ? expand_kernel<64>
                      : head_dim == 128 ? expand_kernel<128>
                                        : expand_kernel<256>;
  return {reinterpret_cast<const void*>(kernel), 0, 0};
}

template <int kDim, int kHeadBlocks, int kOptions>
Kernel decode_of() {
  using C = DecodeConfig<kDim, kHeadBlocks, kOptions>;
  return {reinterpret_cast<const void*>(decode_kernel<C>), C::kSharedBytes, C::kBlocksPerSm};
}
template <int kDim, int kOptions>
Kernel decode_of(int ratio) {
  return ratio <= 8 ? decode_of<kDim, 1, kOptions>() : decode_of<kDim, 2, kOptions>();
}
template <int kOptions>
Kernel decode_of(const QuantCudaAttention& a) {
  const int ratio = a.heads / a.kv_heads;
  return a.head_dim == 64    ? decode_of<64, kOptions>(ratio)
         : a.head_dim == 128 ? decode_of<128, kOptions>(ratio)
                             : decode_of<256, kOptions>(ratio);
}
Kernel decode_of(const QuantCudaDecode& d) {
  return options(d) == kSoftCap ? decode_of<kSoftCap>(d.attention) : decode_of<kPlain>(d.attention);
}

int start(const Kernel& kernel, int blocks, int threads, void* params, int device, void* stream) {
  if (const int status = allow_shared_memory(kernel.function, device, kernel.shared_bytes)) {
    return status;
  }
  void* arguments[] = {params};
  return launch(kernel.function, blocks, threads, 1, kernel.shared_bytes, arguments,
                static_cast<cudaStream_t>(stream));
}

int start(const QuantCudaPrefill& prefill, int device, void* stream) {
  if (const int status = check(prefill)) return status;
  if (const int status = require_hopper(device)) return status;
  const OnDevice on(device);
  if (on.status()) return on.status();
  PrefillParams p = plan(prefill);
  if (prefill.workspace != nullptr) {
    const Kernel expand = expand_of(prefill.attention.head_dim);
    if (const int status = start(expand, expand_blocks(p), kExpandThreads, &p, device, stream)) {
      return status;
    }
  }
  return start(prefill_of(prefill), prefill_blocks(p), kPrefillThreads, &p, device, stream);
}

int start(const QuantCudaDecode& decode, int device, void* stream) {
  if (const int status = check(decode)) return status;
  if (const int status = require_hopper(device)) return status;
  const OnDevice on(device);
  if (on.status()) return on.status();
  int status = QUANT_CUDA_OK;
  uint32_t* flags = flags_of(decode.workspace, device, &status);
  if (status) return status;
  DecodeParams p = plan(decode, flags);
  return start(decode_of(decode), p.workers, kDecodeThreads, &p, device, stream);
}

}  // namespace
}  // namespace quant

int quant_cuda_prefill_check(const QuantCudaPrefill* prefill) {
  return prefill == nullptr ? QUANT_CUDA_NULL_POINTER : quant::check(*prefill);
}

int quant_cuda_decode_check(const QuantCudaDecode* decode) {
  return decode == nullptr ? QUANT_CUDA_NULL_POINTER : quant::check(*decode);
}

int quant_cuda_decode_blocks(int heads, int kv_heads, int head_dim) {
  return quant::decode_blocks(heads, kv_heads, head_dim);
}

int64_t quant_cuda_decode_workspace(const QuantCudaDecode* decode) {
  return decode == nullptr ? 0 : quant::decode_workspace(*decode);
}

int64_t quant_cuda_prefill_workspace(const QuantCudaPrefill* prefill) {
  return prefill == nullptr ? 0 : quant::prefill_workspace(*prefill);
}

int quant_cuda_prefill_gains(const QuantCudaPrefill* prefill) {
  return quant_cuda_prefill_check(prefill) == QUANT_CUDA_OK && quant::gains(*prefill);
}

int quant_cuda_prefill_attention(const QuantCudaPrefill* prefill, int device, void* stream) {
  return prefill == nullptr ? QUANT_CUDA_NULL_POINTER : quant::start(*prefill, device, stream);
}

int quant_cuda_decode_attention(const QuantCudaDecode* decode, int device, void* stream) {
  return decode == nullptr ? QUANT_CUDA_NULL_POINTER : quant::start(*decode, device, stream);
}
