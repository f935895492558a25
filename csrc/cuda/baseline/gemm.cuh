// CUTLASS's INT4 x FP8 GEMM with a lookup table, for one tile.
//
//   D^T[n, m] = BF16(a[m] (c[n] sum_k P[n, k] x[m, k]) + bias[n]),  P = E4M3(q t)
//
// Weights are the operand that CUTLASS calls A: WGMMA reads it from registers, where the codes have
// become E4M3, and its other operand, here the tokens, may be as few as 16. So CUTLASS's M is our
// N, its N our M, and its result, column-major, our row-major one.
#pragma once

// clang-format off: cute's tensors need cutlass.h first
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
// clang-format on

#include "cuda/baseline/problem.h"
#include "cuda/baseline/weight_layout.cuh"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "quant_cutlass.h"

namespace quant_baseline {

namespace fusion = cutlass::epilogue::fusion;

constexpr int kRows = 128;
// With tables for FP8, CUTLASS compiles for no shorter tile of K.
constexpr int kDepth = 128;

using Code = cutlass::int4b_t;
using Operand = cutlass::float_e4m3_t;
using Table = cutlass::Array<Operand, 8>;
using Output = cutlass::bfloat16_t;

template <int Tokens>
struct Kernel {
  using Shape = cute::Shape<cute::Int<kRows>, cute::Int<Tokens>, cute::Int<kDepth>>;
  // Two blocks share the tokens they both multiply where a tile of tokens is the larger operand.
  using Cluster = cute::Shape<cute::Int<Tokens == 256 ? 2 : 1>, cute::_1, cute::_1>;

  template <class Element>
  using PerFeature = fusion::Sm90ColBroadcast<0, Shape, Element, float,
                                              cute::Stride<cute::_1, cute::_0, cute::_0>>;
  using PerToken =
      fusion::Sm90RowBroadcast<0, Shape, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;
  template <template <class> class Function, class Result>
  using Compute =
      fusion::Sm90Compute<Function, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;
  using RowScaled =
      fusion::Sm90EVT<Compute<cutlass::multiplies, float>, PerFeature<float>, fusion::Sm90AccFetch>;
  using Epilogue = fusion::Sm90EVT<Compute<cutlass::homogeneous_multiply_add, Output>, PerToken,
                                   RowScaled, PerFeature<Output>>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::ColumnMajor, 8, Output, cutlass::layout::ColumnMajor, 8,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cute::tuple<Code, Table>, WeightLayout,
      32, Operand, cutlass::layout::ColumnMajor, 16, float, Shape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>>;

  static typename Gemm::Arguments arguments(const Problem& p) {
    // Every operand is dense and unbatched.
    typename Gemm::GemmKernel::StrideB x_stride{p.k, {}, 0};
    typename Gemm::GemmKernel::StrideD out_stride{{}, p.n, 0};
    typename CollectiveMainloop::StrideScale table_stride{{}, p.n, 0};
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {p.n, p.m, p.k, 1},
            {static_cast<const Code*>(p.codes), weight_layout(p.n, p.k),
             static_cast<const Operand*>(p.x), x_stride, static_cast<const Table*>(p.tables),
             table_stride, p.group},
            {{{p.x_scale, 0.0f, {}},      // a
              {{p.c, 0.0f, {}}, {}, {}},  // c, accumulator, their product
              {static_cast<const Output*>(p.bias), Output(0.0f), {}},
              {}},
             nullptr,
             {},
             static_cast<Output*>(p.out),
             out_stride}};
  }
};

// What CUDA says went wrong, or else a status of ours.
inline int failed(int status) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? status : static_cast<int>(error);
}

template <int Tokens>
bool Tile<Tokens>::accepts(const Problem& problem) {
  return Kernel<Tokens>::Gemm::can_implement(Kernel<Tokens>::arguments(problem)) ==
         cutlass::Status::kSuccess;
}

template <int Tokens>
int64_t Tile<Tokens>::workspace_bytes(const Problem& problem) {
  return static_cast<int64_t>(
      Kernel<Tokens>::Gemm::get_workspace_size(Kernel<Tokens>::arguments(problem)));
}

template <int Tokens>
int Tile<Tokens>::run(const Problem& problem, void* workspace, int device, int sm_count,
                      cudaStream_t stream) {
  auto arguments = Kernel<Tokens>::arguments(problem);
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = sm_count;
  typename Kernel<Tokens>::Gemm gemm;
  if (gemm.initialize(arguments, workspace, stream) != cutlass::Status::kSuccess) {
    return failed(QUANT_CUTLASS_REFUSED);
  }
  if (gemm.run(stream) != cutlass::Status::kSuccess) return failed(QUANT_CUTLASS_LAUNCH_FAILED);
  return QUANT_CUTLASS_OK;
}

}  // namespace quant_baseline
