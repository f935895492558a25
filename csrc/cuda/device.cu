#include <cuda_runtime_api.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include "cuda/device.h"
#include "cuda/gemm_plan.h"
#include "cuda/status.h"
#include "quant_cuda.h"

namespace quant {
namespace {

constexpr int kWorkspaces = 1024;  // that may be in flight at a time
__device__ uint32_t flags[kWorkspaces][kMostFlags];

std::mutex guard;

// Which row of `flags` a workspace has: the one it had, or that of the longest unused workspace.
class Rows {
 public:
  int of(const void* workspace) {
    if (const auto known = rows_.find(workspace); known != rows_.end()) {
      used_.splice(used_.begin(), used_, known->second);
      return known->second->second;
    }
    int row = static_cast<int>(rows_.size());
    if (row == kWorkspaces) {
      row = used_.back().second;
      rows_.erase(used_.back().first);
      used_.pop_back();
    }
    used_.emplace_front(workspace, row);
    rows_[workspace] = used_.begin();
    return row;
  }

 private:
  using Used = std::list<std::pair<const void*, int>>;
  Used used_;
  std::unordered_map<const void*, Used::iterator> rows_;
};

}  // namespace

OnDevice::OnDevice(int device) {
  int current = 0;
  status_ = explain(cudaGetDevice(&current));
  if (status_ == QUANT_CUDA_OK && current != device) {
    status_ = explain(cudaSetDevice(device));
    before_ = current;
  }
}
OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

int require_hopper(int device) {
  int major = 0, minor = 0;
  const int status = quant_cuda_device_capability(device, &major, &minor);
  if (status != QUANT_CUDA_OK) return status;
  return major == 9 && minor == 0 ? QUANT_CUDA_OK : QUANT_CUDA_NOT_HOPPER;
}

int allow_shared_memory(const void* kernel, int device, int bytes) {
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(guard);
  if (allowed.count({kernel, device})) return QUANT_CUDA_OK;
  const int status =
      explain(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (status == QUANT_CUDA_OK) allowed.insert({kernel, device});
  return status;
}

int make_tensor_map(CUtensorMap* map, const void* base, int64_t width, int64_t height,
                    int64_t stride, int box_width, int box_height) {
  static const auto encode = [] {  // no -lcuda: the library loads where there is no driver
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? found : nullptr);
  }();
  if (encode == nullptr) return QUANT_CUDA_TENSOR_MAP;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_width),
                            static_cast<cuuint32_t>(box_height)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(base), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? QUANT_CUDA_OK : QUANT_CUDA_TENSOR_MAP;
}

uint32_t* flags_of(const void* workspace, int device, int* status) {
  static std::unordered_map<int, std::pair<uint32_t*, Rows>> devices;
  const std::lock_guard<std::mutex> lock(guard);
  auto& [base, rows] = devices[device];
  if (base == nullptr) {
    void* address = nullptr;
    *status = explain(cudaGetSymbolAddress(&address, flags));
    if (*status != QUANT_CUDA_OK) return nullptr;
    base = static_cast<uint32_t*>(address);
  }
  return base + rows.of(workspace) * kMostFlags;
}

int launch(const void* kernel, int blocks, int threads, int cluster, int shared_bytes,
           void** arguments, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  // To find out whether a wrong result is of a kernel that begins too early.
  static const bool dependent_launch = std::getenv("QUANT_CUDA_NO_PDL") == nullptr;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = dependent_launch ? 2 : 1;
  return explain(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace quant

using quant::explain;

static_assert(QUANT_CUDA_NO_DRIVER == quant::kNoDriver &&
              QUANT_CUDA_DRIVER_TOO_OLD == quant::kDriverTooOld &&
              QUANT_CUDA_NO_DEVICE == quant::kNoDevice);

int quant_cuda_abi_version(void) { return QUANT_CUDA_ABI_VERSION; }

const char* quant_cuda_error_string(int status) {
  switch (status) {
    case QUANT_CUDA_NULL_POINTER:
      return "a pointer is null";
    case QUANT_CUDA_BAD_SHAPE:
      return "no kernel takes this shape or these types";
    case QUANT_CUDA_BAD_ALIGNMENT:
      return "an address or a stride is not a multiple of 16";
    case QUANT_CUDA_NO_KERNEL:
      return "no kernel has this kind, group size, tile and cluster";
    case QUANT_CUDA_SMALL_WORKSPACE:
      return "the workspace is too small";
    case QUANT_CUDA_NOT_HOPPER:
      return "the kernels are for Hopper (compute capability 9.0), and this GPU is another";
    case QUANT_CUDA_TENSOR_MAP:
      return "the driver made no tensor map of the activations";
    default:
      return quant::sentence(status);
  }
}

int quant_cuda_device_count(int* count) {
  if (count == nullptr) return QUANT_CUDA_NULL_POINTER;
  *count = 0;
  int found = 0;
  const int status = explain(cudaGetDeviceCount(&found));
  if (status == QUANT_CUDA_OK) *count = found;
  return status;
}

int quant_cuda_device_capability(int device, int* major, int* minor) {
  if (major == nullptr || minor == nullptr) return QUANT_CUDA_NULL_POINTER;
  const int status =
      explain(cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device));
  if (status != QUANT_CUDA_OK) return status;
  return explain(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
}
