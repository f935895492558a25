// What Hopper has and C++ has not: barriers with byte counts, bulk copies, warpgroup MMAs.
//
// Kernels are written with these functions and nothing else of CUDA, so that the same source also
// runs on a CPU (simulate/simulator.h has the same names; -DQUANT_SIMULATE): there every thread is
// a fiber, copies and MMAs may happen as late as the program allows, and what would be a race or a
// deadlock on a GPU is one there.
#pragma once

#ifdef QUANT_SIMULATE
#include "cuda/simulate/simulator.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define QUANT_DEVICE __device__ __forceinline__
#define QUANT_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define QUANT_KERNEL_BESIDE(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define QUANT_GRID_CONSTANT const __grid_constant__
#define QUANT_UNROLL _Pragma("unroll")
#define QUANT_LOOP _Pragma("unroll 1")

namespace quant::sm90 {

using TensorMap = CUtensorMap;

// --- where a thread is ---
QUANT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// One thread of a warp that is all here. The compiler knows that it is one; of `lane == 0` it does
// not, and puts a loop over the lanes around every copy.
QUANT_DEVICE bool elected() {
  uint32_t chosen;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(chosen));
  return chosen != 0;
}
QUANT_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
QUANT_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
// The warp's number in a register that the compiler knows to be the same in all lanes.
QUANT_DEVICE int warp_index() { return __shfl_sync(0xffffffff, thread_index() / 32, 0); }
QUANT_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
QUANT_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- barriers in shared memory ---
struct Barrier {
  uint64_t word;
};

QUANT_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
// After the inits, before anybody else touches the barriers.
QUANT_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
QUANT_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrive at the barrier in the same place of another block of the cluster. Said to release to the
// cluster, it would be a fence of the whole GPU in every stage; as it is, it says that the WGMMAs
// which read the stage are over, and only X is written there next.
QUANT_DEVICE void barrier_arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrive, and let the phase also wait for so many bytes of bulk copies.
QUANT_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is over: phases are 0, 1, 0, ..., and one has begun at init.
QUANT_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra.uni over;\n\t"
      "bra.uni again;\n\t"
      "over:\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- bulk copies from global to shared memory ---
enum class Keep : uint64_t {  // in the L2: the encoded policies of createpolicy.fractional
  first_out = 0x12F0000000000000,
  normal = 0x1000000000000000,
  last_out = 0x14F0000000000000,
};

// bytes and both addresses: multiples of 16.
QUANT_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, Keep keep) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(keep))
      : "memory");
}
// The map's box whose first element is (x, y), x along rows; what lies outside becomes zeros.
QUANT_DEVICE void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier,
                           Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "l"(static_cast<uint64_t>(keep))
      : "memory");
}
// The same into the same place of every block of the cluster whose bit is set in `blocks`.
QUANT_DEVICE void copy_box_to(void* to, const TensorMap* map, int x, int y, Barrier* barrier,
                              uint16_t blocks, Keep keep) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks),
      "l"(static_cast<uint64_t>(keep))
      : "memory");
}
QUANT_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// What threads wrote to shared memory becomes visible to MMAs and bulk copies.
QUANT_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// What they wrote to global memory, or what they see there, becomes visible to bulk copies.
QUANT_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- threads with each other ---
QUANT_DEVICE void block_sync() { __syncthreads(); }
// Of `threads` threads of the block; id 1 to 15.
QUANT_DEVICE void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same, and whether all of them say so.
QUANT_DEVICE bool all_of_group(int id, int threads, bool value) {
  uint32_t all;
  asm volatile(
      "{\n\t.reg .pred mine, all;\n\t"
      "setp.ne.u32 mine, %3, 0;\n\t"
      "bar.red.and.pred all, %1, %2, mine;\n\t"
      "selp.u32 %0, 1, 0, all;\n\t}"
      : "=r"(all)
      : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(value))
      : "memory");
  return all != 0;
}
// The first meeting: only barriers were written, and barrier_init_fence is for those.
QUANT_DEVICE void cluster_start() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
QUANT_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
QUANT_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
QUANT_DEVICE void warp_sync() { __syncwarp(); }
template <class T>
QUANT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}
template <class T>
QUANT_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}
// Of all lanes the same number, which the compiler then knows.
QUANT_DEVICE int uniform(int x) { return __reduce_max_sync(0xffffffff, x); }
QUANT_DEVICE int sum_of_warp(int x) { return __reduce_add_sync(0xffffffff, x); }
QUANT_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffff, value); }
QUANT_DEVICE int bits_set(uint32_t x) { return __popc(x); }
QUANT_DEVICE bool any_of_warp(bool value) { return __any_sync(0xffffffff, value) != 0; }
// Among all threads of the launch. What this thread wrote, and what it knows by a barrier that
// others wrote, is seen by whoever waits for the flag.
QUANT_DEVICE void flag_set(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// For the next launch, which waits for the whole of this one.
QUANT_DEVICE void flag_clear(uint32_t* flag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(0) : "memory");
}
QUANT_DEVICE void flag_wait(const uint32_t* flag, uint32_t value) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  } while (found != value);
}
// Past the L1, which may hold what another block has since written over.
QUANT_DEVICE uint4 load_l2(const uint4* from) { return __ldcg(from); }
// The compiler takes x for another number from here on: it does not keep what it has made of it.
QUANT_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }
// Registers of a thread of this warpgroup from here on; a multiple of 8.
template <int kCount>
QUANT_DEVICE void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
QUANT_DEVICE void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// --- kernels with each other (programmatic dependent launch) ---
// Until the kernels before this one have ended and what they wrote is seen.
QUANT_DEVICE void previous_kernel_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel's blocks may start where there is room.
QUANT_DEVICE void next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// --- integer instructions ---
// Bitwise: bit (4 a + 2 b + c) of kTable is the result for bits a, b, c.
template <int kTable>
QUANT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
// Byte i is byte (selector >> 4 i) & 7 of b:a, or its sign eight times where bit 3 is set.
QUANT_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// a >> 16, by what multiplies: the compiler shifts where it is told to.
QUANT_DEVICE uint32_t upper_half(uint32_t a) { return __umulhi(a, 0x10000); }
QUANT_DEVICE uint32_t rotate_right(uint32_t a, int bits) { return __funnelshift_r(a, a, bits); }

// --- numbers ---
QUANT_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }  // never fused
QUANT_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
QUANT_DEVICE float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
QUANT_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }  // rounded correctly
// Within 2^-23 of itself.
QUANT_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Four numbers to E4M3, to nearest and saturating; the first in the lowest byte.
QUANT_DEVICE uint32_t to_e4m3(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(low) : "f"(a), "f"(b));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(high) : "f"(c), "f"(d));
  return low | static_cast<uint32_t>(high) << 16;
}
// To nearest, ties to even; saturating, and 0 for NaN.
QUANT_DEVICE int to_integer(float x) { return __float2int_rn(x); }
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
QUANT_DEVICE float to_float(float x) { return x; }
QUANT_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
QUANT_DEVICE float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
QUANT_DEVICE void from_float(float x, float& y) { y = x; }
QUANT_DEVICE void from_float(float x, Bf16& y) {
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
QUANT_DEVICE void from_float(float x, Fp16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

// --- pairs of FP16 in a register, the first in the lower half ---
QUANT_DEVICE uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// The two E4M3 codes in the lower half of x.
QUANT_DEVICE uint32_t halves_of_e4m3(uint32_t x) {
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<uint16_t>(x)));
  return y;
}
// Of a matrix [8, 8] of FP16 a warp has row lane / 4, columns 2 (lane % 4) and the next of its
// transpose for those of itself.
QUANT_DEVICE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace quant::sm90

#include "cuda/sm90_mma.cuh"

#endif  // QUANT_SIMULATE
