// What the C ABI hands to the kernel of a tile. Free of CUTLASS, whose headers cost minutes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace quant_baseline {

// The arguments of quant_cutlass_gemm, checked.
struct Problem {
  const void* x;
  const float* x_scale;
  const void* codes;
  const void* tables;
  const float* c;
  const void* bias;
  void* out;
  int m, n, k, group;
};

// The GEMM with tiles of 128 output features x Tokens tokens.
template <int Tokens>
struct Tile {
  // Whether CUTLASS takes the problem; it looks at sizes and whether there are pointers.
  static bool accepts(const Problem& problem);
  static int64_t workspace_bytes(const Problem& problem);
  // QUANT_CUTLASS_OK, another QuantCutlassStatus, or a cudaError_t. The device is the current one.
  static int run(const Problem& problem, void* workspace, int device, int sm_count,
                 cudaStream_t stream);
};

}  // namespace quant_baseline
