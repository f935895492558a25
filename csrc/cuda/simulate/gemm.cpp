// The GEMM kernels in the simulator, behind a C ABI for tests.
#include <array>
#include <string>

#include "cuda/gemm_kernel.cuh"
#include "cuda/gemm_plan.h"
#include "cuda/quantize_kernel.cuh"

namespace quant {
namespace {

std::string failure;
uint32_t* flags;

void simulate_quantize(const QuantCudaGemm& g, const GemmParams& p, Launch launch) {
  const QuantizeParams q = plan_quantize(g, p);
  launch.blocks = static_cast<int>(quantize_blocks(g));
  launch.threads = kQuantizeThreads;
  launch.cluster = 1;
  launch.shared_bytes = 0;
  failure = run(launch, [&] {
    if (p.out_type == Type::bf16) return quantize_body<Bf16>(q);
    if (p.out_type == Type::fp16) return quantize_body<Fp16>(q);
    quantize_body<float>(q);
  });
}

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
    if (failure.empty() && p.maxima != nullptr) simulate_quantize(g, p, launch);
    return true;
  } else {
    return false;
  }
}
template <Kind kKind, int kGroup>
bool of_group(const QuantCudaGemm& g, const Launch& launch) {
  return simulate<kKind, kGroup, 16, 1>(g, launch) || simulate<kKind, kGroup, 32, 1>(g, launch) ||
         simulate<kKind, kGroup, 64, 1>(g, launch) || simulate<kKind, kGroup, 64, 2>(g, launch) ||
         simulate<kKind, kGroup, 128, 1>(g, launch) || simulate<kKind, kGroup, 128, 2>(g, launch) ||
         simulate<kKind, kGroup, 256, 1>(g, launch) || simulate<kKind, kGroup, 256, 2>(g, launch);
}
template <Kind kKind>
bool of_kind(const QuantCudaGemm& g, const Launch& launch) {
  return of_group<kKind, 128>(g, launch) || of_group<kKind, 64>(g, launch) ||
         of_group<kKind, 32>(g, launch);
}

const Table& table_of(uint8_t t) {
  static const std::array<Table, 128> tables = [] {
    std::array<Table, 128> made{};
    for (uint32_t code = 0; code < 128; ++code) made[code] = make_table(code);
    return made;
  }();
  return tables.at(t);
}

}  // namespace
}  // namespace quant

extern "C" {

// The conversion of a kind: words -> operand registers low, high; t: the group scale's byte.
void quant_simulate_convert(int kind, const uint32_t* words, const uint8_t* t, int64_t count,
                            uint32_t* low, uint32_t* high) {
  using namespace quant;
  for (int64_t i = 0; i < count; ++i) {
    switch (kind) {
      case QUANT_CUDA_INT8_CHANNEL:
        HighNibble::convert(words[i], low[i], high[i]);
        break;
      case QUANT_CUDA_INT8_GROUP:
        TwoLevel::convert(words[i], t[i], TwoLevel::offset(t[i]), low[i], high[i]);
        break;
      case QUANT_CUDA_FP8_CHANNEL:
      case QUANT_CUDA_EXACT:
        Raw::convert(words[i], low[i], high[i]);
        break;
      case QUANT_CUDA_FP8_CHANNEL_8:
      case QUANT_CUDA_EXACT_8:
        RawAll::convert(words[i], low[i], high[i]);
        break;
      case QUANT_CUDA_LUT:
        Lookup::convert(words[i], table_of(t[i]), low[i], high[i]);
        break;
      default:
        LookupAll::convert(words[i], table_of(t[i]), low[i], high[i]);
    }
  }
}

// The segments of a worker as (tile, begin, end), at most `most`; how many there are. owner: of the
// first unit of each segment's tile.
int quant_simulate_work(int tiles, int blocks, int workers, int split, int worker, int most,
                        int* segments, int* owner) {
  const quant::Schedule schedule{tiles, 1, blocks, workers, split};
  quant::Work work(schedule, worker);
  quant::Segment segment;
  int count = 0;
  for (; count < most && work.next(segment); ++count) {
    segments[3 * count] = segment.tile;
    segments[3 * count + 1] = segment.begin;
    segments[3 * count + 2] = segment.end;
    owner[count] = split ? schedule.owner(int64_t{1} * segment.tile * blocks) : worker;
  }
  return count;
}

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
