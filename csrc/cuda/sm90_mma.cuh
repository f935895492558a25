// The matrix multiplications of sm90.cuh, which includes this: of a warp, of a warpgroup.
#pragma once

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "cuda/sm90.cuh"

namespace quant::sm90 {

// --- warp MMA: sum [16, 8] += A [16, 16] B [8, 16]^T of FP16 ---
// With g = lane / 4, q = lane % 4: a0, a1 rows g, g + 8 and k = 2 q, 2 q + 1; a2, a3 the same and
// k + 8; b0, b1 row g and the same k; sum rows g, g, g + 8, g + 8, columns 2 q, 2 q + 1.
QUANT_DEVICE void warp_mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- warpgroup MMA: acc [64, kN] (+)= A [64, 32] B [kN, 32]^T, A and B of 8 bits ---
struct E4M3 {
  using Sum = float;
};
struct Int8 {
  using Sum = int32_t;
};
// Of a tile in shared memory, rows of 128 or 64 bytes, swizzled in as many; aligned to eight rows.
struct Descriptor {
  uint64_t word;
};
template <int kRow = 128>
QUANT_DEVICE Descriptor describe(const void* tile) {
  static_assert(kRow == 64 || kRow == 128, "");
  constexpr uint64_t kSwizzle = kRow == 128 ? 1 : 2;
  const uint64_t address = (shared_address(tile) & 0x3FFFF) >> 4;
  return {address | uint64_t{1} << 16 | uint64_t{8 * kRow >> 4} << 32 | kSwizzle << 62};
}
// The address is in the low half, with room to spare: no carry.
QUANT_DEVICE Descriptor advance(Descriptor tile, int bytes) {
  const uint32_t low = static_cast<uint32_t>(tile.word) + static_cast<uint32_t>(bytes >> 4);
  return {tile.word >> 32 << 32 | low};
}

// The same, from a register that the warp keeps: not made anew where it is used.
QUANT_DEVICE Descriptor keep(Descriptor tile) {
  const auto low = static_cast<uint32_t>(uniform(static_cast<int>(tile.word)));
  return {tile.word >> 32 << 32 | low};
}

template <class Type, int kN>
struct Mma;
#define QUANT_MMA(n)                                                         \
  template <>                                                                \
  struct Mma<E4M3, n> {                                                      \
    using Registers = cute::SM90::GMMA::MMA_64x##n##x32_F32E4M3E4M3_RS_TN<>; \
    using Shared = cute::SM90::GMMA::MMA_64x##n##x32_F32E4M3E4M3_SS_TN<>;    \
  };                                                                         \
  template <>                                                                \
  struct Mma<Int8, n> {                                                      \
    using Registers = cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_RS_TN;       \
    using Shared = cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_SS_TN;          \
  };
QUANT_MMA(8)
QUANT_MMA(16)
QUANT_MMA(32)
QUANT_MMA(64)
QUANT_MMA(128)
QUANT_MMA(256)
#undef QUANT_MMA

// Before the first MMA, and where registers of the next ones were written since.
QUANT_DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The value is in its register from here on: nothing that makes it moves behind the fence.
QUANT_DEVICE void mma_operand(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
QUANT_DEVICE void mma_operand(int32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
QUANT_DEVICE void mma_operand(float& x) { asm volatile("" : "+f"(x)::"memory"); }
QUANT_DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kLeft committed groups are in flight.
template <int kLeft>
QUANT_DEVICE void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
namespace detail {
using cute::SM90::GMMA::ScaleOut;
QUANT_DEVICE float& as_operand(float& x) { return x; }
QUANT_DEVICE uint32_t& as_operand(int32_t& x) { return reinterpret_cast<uint32_t&>(x); }
template <class Type, int kN, int... kI>
QUANT_DEVICE void mma(typename Type::Sum (&sum)[kN / 2], const uint32_t (&a)[4], Descriptor b,
                      ScaleOut scale, std::integer_sequence<int, kI...>) {
  Mma<Type, kN>::Registers::fma(a[0], a[1], a[2], a[3], b.word, as_operand(sum[kI])..., scale);
}
template <class Type, int kN, int... kI>
QUANT_DEVICE void mma(typename Type::Sum (&sum)[kN / 2], Descriptor a, Descriptor b, ScaleOut scale,
                      std::integer_sequence<int, kI...>) {
  Mma<Type, kN>::Shared::fma(a.word, b.word, as_operand(sum[kI])..., scale);
}
}  // namespace detail
// A: registers of this thread (the fragment is drawn in fragments.cuh), or a tile; keep false: the
// sum starts at zero.
template <class Type, int kN, class A>
QUANT_DEVICE void mma(typename Type::Sum (&sum)[kN / 2], const A& a, Descriptor b, bool keep) {
  detail::mma<Type, kN>(sum, a, b, keep ? detail::ScaleOut::One : detail::ScaleOut::Zero,
                        std::make_integer_sequence<int, kN / 2>{});
}

}  // namespace quant::sm90
