// The C ABI: what CUTLASS leaves unchecked is checked here, then the tile's kernel is called.
#include <cuda_runtime_api.h>

#include <climits>
#include <cstdint>

#include "cuda/baseline/problem.h"
#include "cuda/status.h"
#include "quant_cutlass.h"

static_assert(QUANT_CUTLASS_NO_DRIVER == quant::kNoDriver &&
              QUANT_CUTLASS_DRIVER_TOO_OLD == quant::kDriverTooOld &&
              QUANT_CUTLASS_NO_DEVICE == quant::kNoDevice);

namespace quant_baseline {
namespace {

constexpr int64_t kTableGroup = 128;  // CUTLASS's tile of K
constexpr int64_t kBlockRows = 16, kBlockColumns = 32;
constexpr uintptr_t kAlignment = 16;

struct Functions {
  int tokens;
  bool (*accepts)(const Problem&);
  int64_t (*workspace_bytes)(const Problem&);
  int (*run)(const Problem&, void*, int, int, cudaStream_t);
};

template <int Tokens>
constexpr Functions functions() {
  return {Tokens, Tile<Tokens>::accepts, Tile<Tokens>::workspace_bytes, Tile<Tokens>::run};
}

constexpr Functions kTiles[] = {functions<16>(), functions<32>(), functions<64>(), functions<128>(),
                                functions<256>()};

const Functions* find(int tokens) {
  for (const Functions& tile : kTiles) {
    if (tile.tokens == tokens) return &tile;
  }
  return nullptr;
}

int check_sizes(int64_t m, int64_t n, int64_t k, int64_t group, int tile) {
  if (find(tile) == nullptr) return QUANT_CUTLASS_UNKNOWN_TILE;
  for (const int64_t size : {m, n, k, group}) {
    if (size < 1 || size > INT_MAX) return QUANT_CUTLASS_SIZE_OUT_OF_RANGE;
  }
  // The shuffled layout pads to its block of 16 x 32, so CUTLASS would read past the weight.
  if (n % kBlockRows != 0) return QUANT_CUTLASS_RAGGED_ROWS;
  if (k % kBlockColumns != 0 || k % group != 0) return QUANT_CUTLASS_RAGGED_GROUPS;
  if (group != k && group % kTableGroup != 0) return QUANT_CUTLASS_RAGGED_GROUPS;
  return QUANT_CUTLASS_OK;
}

// Sizes with pointers that nothing follows, for questions that are about sizes.
Problem of_sizes(int64_t m, int64_t n, int64_t k, int64_t group) {
  alignas(kAlignment) static char somewhere[kAlignment];
  Problem problem{};
  problem.x = problem.codes = problem.tables = somewhere;
  problem.x_scale = problem.c = reinterpret_cast<const float*>(somewhere);
  problem.out = somewhere;
  problem.m = static_cast<int>(m);
  problem.n = static_cast<int>(n);
  problem.k = static_cast<int>(k);
  problem.group = static_cast<int>(group);
  return problem;
}

// Makes `device` the current one for a while, once it is known that there is a driver: CUTLASS and
// cudart's other functions complain on stderr where there is none.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    int count = 0;
    status_ = quant::explain(cudaGetDeviceCount(&count));
    if (status_ == 0) status_ = quant::explain(cudaGetDevice(&before_));
    if (status_ == 0 && before_ != device) {
      status_ = quant::explain(cudaSetDevice(device));
      changed_ = status_ == 0;
    }
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  int status() const { return status_; }

 private:
  int status_ = 0;
  int before_ = 0;
  bool changed_ = false;
};

int attribute(cudaDeviceAttr which, int device, int* value) {
  return quant::explain(cudaDeviceGetAttribute(value, which, device));
}

}  // namespace
}  // namespace quant_baseline

using namespace quant_baseline;

int quant_cutlass_abi_version(void) { return QUANT_CUTLASS_ABI_VERSION; }

const char* quant_cutlass_error_string(int status) {
  switch (status) {
    case QUANT_CUTLASS_NULL_POINTER:
      return "a pointer is null";
    case QUANT_CUTLASS_UNKNOWN_TILE:
      return "a tile has 16, 32, 64, 128 or 256 tokens";
    case QUANT_CUTLASS_SIZE_OUT_OF_RANGE:
      return "a size is below 1 or does not fit 32 bits";
    case QUANT_CUTLASS_RAGGED_ROWS:
      return "out_features must be a multiple of 16";
    case QUANT_CUTLASS_RAGGED_GROUPS:
      return "in_features must be a multiple of 32, and of a group size that is a multiple of 128 "
             "or all of in_features";
    case QUANT_CUTLASS_MISALIGNED:
      return "a pointer is not aligned to 16 bytes";
    case QUANT_CUTLASS_WORKSPACE_TOO_SMALL:
      return "the workspace is too small";
    case QUANT_CUTLASS_NOT_HOPPER:
      return "the kernel runs on compute capability 9.0 alone";
    case QUANT_CUTLASS_REFUSED:
      return "CUTLASS refuses the problem";
    case QUANT_CUTLASS_LAUNCH_FAILED:
      return "CUTLASS could not launch the kernel";
    default:
      return quant::sentence(status);
  }
}

int quant_cutlass_can_run(int64_t m, int64_t n, int64_t k, int64_t group, int tile) {
  const int status = check_sizes(m, n, k, group, tile);
  if (status != QUANT_CUTLASS_OK) return status;
  return find(tile)->accepts(of_sizes(m, n, k, group)) ? QUANT_CUTLASS_OK : QUANT_CUTLASS_REFUSED;
}

int quant_cutlass_workspace_bytes(int64_t m, int64_t n, int64_t k, int64_t group, int tile,
                                  int64_t* bytes) {
  if (bytes == nullptr) return QUANT_CUTLASS_NULL_POINTER;
  *bytes = 0;
  const int status = quant_cutlass_can_run(m, n, k, group, tile);
  if (status != QUANT_CUTLASS_OK) return status;
  *bytes = find(tile)->workspace_bytes(of_sizes(m, n, k, group));
  return QUANT_CUTLASS_OK;
}

int quant_cutlass_gemm(const void* x, const float* x_scale, const void* codes, const void* tables,
                       const float* c, const void* bias, void* out, int64_t m, int64_t n, int64_t k,
                       int64_t group, int tile, void* workspace, int64_t workspace_bytes,
                       int device, void* stream) {
  int64_t needed = 0;
  int status = quant_cutlass_workspace_bytes(m, n, k, group, tile, &needed);
  if (status != QUANT_CUTLASS_OK) return status;
  for (const void* pointer : {x, static_cast<const void*>(x_scale), codes, tables,
                              static_cast<const void*>(c), static_cast<const void*>(out)}) {
    if (pointer == nullptr) return QUANT_CUTLASS_NULL_POINTER;
  }
  for (const void* pointer :
       {x, static_cast<const void*>(x_scale), codes, tables, static_cast<const void*>(c), bias,
        static_cast<const void*>(out), static_cast<const void*>(workspace)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % kAlignment != 0) return QUANT_CUTLASS_MISALIGNED;
  }
  if (workspace_bytes < needed || (needed > 0 && workspace == nullptr)) {
    return QUANT_CUTLASS_WORKSPACE_TOO_SMALL;
  }

  const DeviceScope scope(device);
  if (scope.status() != QUANT_CUTLASS_OK) return scope.status();
  int major = 0, minor = 0, sm_count = 0;
  status = attribute(cudaDevAttrComputeCapabilityMajor, device, &major);
  if (status == 0) status = attribute(cudaDevAttrComputeCapabilityMinor, device, &minor);
  if (status == 0) status = attribute(cudaDevAttrMultiProcessorCount, device, &sm_count);
  if (status != QUANT_CUTLASS_OK) return status;
  if (major != 9 || minor != 0) return QUANT_CUTLASS_NOT_HOPPER;

  Problem problem = of_sizes(m, n, k, group);
  problem.x = x;
  problem.x_scale = x_scale;
  problem.codes = codes;
  problem.tables = tables;
  problem.c = c;
  problem.bias = bias;
  problem.out = out;
  return find(tile)->run(problem, workspace, device, sm_count, static_cast<cudaStream_t>(stream));
}
