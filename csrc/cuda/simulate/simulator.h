// The functions of sm90.cuh on a CPU: the kernels' own source runs in fibers, one a thread.
//
// A GPU does not say when an asynchronous copy or MMA happens; it may be at once or as late as the
// program lets it. Launch::late takes the second: a copy's destination holds 0xFF until nothing
// else can go on, half of the warps, others for every seed, run only then, and an MMA reads its
// registers and tiles when its issuer waits for it. A kernel that reads too early, or writes over
// what is still needed, computes other numbers then; one whose barriers do not add up stops, and
// `run` says where every thread stands. Blocks start in the order of their indices, at most
// Launch::resident at a time.
//
// Not simulated: memory order among threads (fences do nothing), bank conflicts, time.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define QUANT_DEVICE inline
#define QUANT_KERNEL(threads) inline void
#define QUANT_KERNEL_BESIDE(threads, blocks) inline void
#define QUANT_GRID_CONSTANT const
#define QUANT_UNROLL
#define QUANT_LOOP

namespace quant::sm90 {

// --- the machine (simulator.cpp) ---
struct Launch {
  int blocks, threads, cluster, shared_bytes;
  int resident;  // blocks at a time; at least a cluster's
  bool late;
  uint32_t seed;  // of the order in which threads run and copies arrive
};
// Of the last `run`: how often groups were asked, and how often all agreed.
struct Votes {
  int64_t held, unanimous;
};
Votes votes();
// Runs `body` in every thread. Empty where all ended; otherwise what went wrong.
std::string run(const Launch& launch, const std::function<void()>& body);

namespace detail {
// Lets others run until `ready`; `what` is printed where that never happens.
void wait_for(const std::function<bool()>& ready, const char* what);
void fail(const std::string& reason);
void exchange(uint64_t value, int mask, uint64_t* found);
// What every lane of the warp gives: six words each.
struct WarpWords {
  uint32_t of[32][6];
};
void gather(const uint32_t (&mine)[6], WarpWords* all);
void synchronize(int group, int threads, const char* what);
bool all_of(int group, int threads, bool value);
void schedule_copy(std::function<void()> copy, void* to, size_t bytes);
void* at_rank(void* pointer, int rank);
struct MmaIssue {
  bool floating;
  int columns;
  void* sum;          // float or int32_t [columns / 2] of this thread
  const uint32_t* a;  // four registers, or null
  const void *a_tile, *b_tile;
  int a_row, b_row;  // bytes
  bool keep;
};
void issue_mma(const MmaIssue& issue);
void commit_mma();
void await_mma(int left);
void progress();
const std::array<float, 256>& e4m3_table();
}  // namespace detail

int thread_index();
int block_index();
int grid_size();
char* shared_memory();
int cluster_rank();
inline int warp_index() { return thread_index() / 32; }

// Of a matrix of bytes in global memory, for boxes that land swizzled in 128 bytes.
struct TensorMap {
  const uint8_t* base;
  int64_t width, height, stride;
  int box_width, box_height;
};

// --- barriers ---
struct Barrier {
  int expected, pending, phase;
  int64_t bytes;
};
inline void barrier_settle(Barrier* barrier) {
  if (barrier->pending < 0) detail::fail("a barrier got more arrivals than it was made for");
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->phase ^= 1;
    barrier->pending = barrier->expected;
  }
  detail::progress();
}
inline void barrier_init(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier) {
  --barrier->pending;
  barrier_settle(barrier);
}
inline void barrier_arrive_at(Barrier* barrier, int rank) {
  barrier_arrive(static_cast<Barrier*>(detail::at_rank(barrier, rank)));
}
inline void barrier_expect(Barrier* barrier, int bytes) {
  barrier->bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier* barrier, int parity) {
  detail::wait_for([=] { return barrier->phase != parity; }, "a barrier in shared memory");
}

// --- copies ---
enum class Keep : uint64_t { first_out, normal, last_out };

inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier, Keep) {
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (bytes % 16 != 0 || misaligned(to) || misaligned(from)) {
    detail::fail("a bulk copy is not aligned to 16 bytes");
  }
  detail::schedule_copy(
      [=] {
        std::memcpy(to, from, static_cast<size_t>(bytes));
        barrier->bytes -= bytes;
        barrier_settle(barrier);
      },
      to, static_cast<size_t>(bytes));
}
// In rows of 128 bytes, or of 64.
inline uintptr_t swizzled(uintptr_t address, int row = 128) {
  return address ^ ((address >> 7) & (row == 128 ? 7 : 3)) << 4;
}
inline void copy_box(void* to, const TensorMap* map, int x, int y, Barrier* barrier, Keep) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) detail::fail("a box is not aligned to 1024");
  const TensorMap from = *map;
  const size_t bytes = static_cast<size_t>(from.box_width) * from.box_height;
  detail::schedule_copy(
      [=] {
        for (int row = 0; row < from.box_height; ++row) {
          for (int column = 0; column < from.box_width; ++column) {
            const bool inside = y + row < from.height && x + column < from.width;
            const uintptr_t place = reinterpret_cast<uintptr_t>(to) + row * 128 + column;
            *reinterpret_cast<uint8_t*>(swizzled(place)) =
                inside ? from.base[(y + row) * from.stride + x + column] : uint8_t{0};
          }
        }
        barrier->bytes -= static_cast<int64_t>(bytes);
        barrier_settle(barrier);
      },
      to, bytes);
}
inline void copy_box_to(void* to, const TensorMap* map, int x, int y, Barrier* barrier,
                        uint16_t blocks, Keep keep) {
  for (int rank = 0; rank < 16; ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    copy_box(detail::at_rank(to, rank), map, x, y,
             static_cast<Barrier*>(detail::at_rank(barrier, rank)), keep);
  }
}
inline bool elected() { return thread_index() % 32 == 0; }
inline void prefetch_map(const TensorMap*) {}
inline void fence_async() {}
inline void fence_async_global() {}

// --- threads with each other ---
inline void block_sync() { detail::synchronize(0, 0, "block_sync"); }
inline void group_sync(int id, int threads) { detail::synchronize(id, threads, "group_sync"); }
inline bool all_of_group(int id, int threads, bool value) {
  return detail::all_of(id, threads, value);
}
inline void cluster_sync() { detail::synchronize(-1, 0, "cluster_sync"); }
inline void cluster_start() { cluster_sync(); }
inline void warp_sync() {
  uint64_t ignored;
  detail::exchange(0, 0, &ignored);
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  uint64_t bits = 0, found;
  std::memcpy(&bits, &value, sizeof value);
  detail::exchange(bits, mask, &found);
  std::memcpy(&value, &found, sizeof value);
  return value;
}
template <class T>
inline T shuffle(T value, int lane) {
  return shuffle_xor(value, thread_index() % 32 ^ lane);
}
inline int sum_of_warp(int x) {
  for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
inline uint32_t ballot(bool value) {
  return static_cast<uint32_t>(
      sum_of_warp(static_cast<int>(uint32_t{value} << thread_index() % 32)));
}
inline int bits_set(uint32_t x) { return __builtin_popcount(x); }
inline int uniform(int x) {
  for (int mask = 1; mask < 32; mask *= 2) {
    if (shuffle_xor(x, mask) != x) detail::fail("lanes of a warp differ in what is uniform");
  }
  return x;
}
inline bool any_of_warp(bool value) {
  int any = value;
  for (int mask = 1; mask < 32; mask *= 2) any |= shuffle_xor(any, mask);
  return any != 0;
}
inline void flag_set(uint32_t* flag, uint32_t value) {
  *flag = value;
  detail::progress();
}
inline void flag_clear(uint32_t* flag) { flag_set(flag, 0); }
inline void flag_wait(const uint32_t* flag, uint32_t value) {
  detail::wait_for([=] { return *flag == value; }, "another block's flag");
}
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 load_l2(const uint4* from) { return *from; }
inline void forget(int&) {}
template <int kCount>
inline void registers_grow() {}
template <int kCount>
inline void registers_shrink() {}
inline void previous_kernel_wait() {}
inline void next_kernel_start() {}

// --- integer instructions ---
template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int bits = 0; bits < 8; ++bits) {
    if ((kTable >> bits & 1) == 0) continue;
    d |= (bits & 4 ? a : ~a) & (bits & 2 ? b : ~b) & (bits & 1 ? c : ~c);
  }
  return d;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> 4 * i;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (pick & 7)) & 0xFF;
    if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
    d |= byte << 8 * i;
  }
  return d;
}
inline uint32_t upper_half(uint32_t a) { return a >> 16; }
inline uint32_t rotate_right(uint32_t a, int bits) { return a >> bits | a << (32 - bits); }

// --- numbers ---
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
float exponential2(float x);
inline float divide(float a, float b) { return a / b; }
inline float reciprocal(float x) { return 1 / x; }
uint32_t to_e4m3(float a, float b, float c, float d);
int to_integer(float x);
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
inline float to_float(float x) { return x; }
float to_float(Bf16 x);
float to_float(Fp16 x);
inline void from_float(float x, float& y) { y = x; }
void from_float(float x, Bf16& y);
void from_float(float x, Fp16& y);

uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c);
uint32_t halves_of_e4m3(uint32_t x);
uint32_t transpose(uint32_t x);
void warp_mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// --- MMAs ---
struct E4M3 {
  using Sum = float;
};
struct Int8 {
  using Sum = int32_t;
};
struct Descriptor {
  const char* tile;
  int row;  // bytes
};
template <int kRow = 128>
inline Descriptor describe(const void* tile) {
  if (reinterpret_cast<uintptr_t>(tile) % (8 * kRow) != 0) detail::fail("a tile is not aligned");
  return {static_cast<const char*>(tile), kRow};
}
inline Descriptor advance(Descriptor tile, int bytes) { return {tile.tile + bytes, tile.row}; }
inline Descriptor keep(Descriptor tile) { return tile; }
inline void mma_fence() {}
template <class T>
inline void mma_operand(T&) {}
inline void mma_commit() { detail::commit_mma(); }
template <int kLeft>
inline void mma_wait() {
  detail::await_mma(kLeft);
}
template <class Type, int kN>
inline void mma(typename Type::Sum (&sum)[kN / 2], const uint32_t (&a)[4], Descriptor b,
                bool keep) {
  detail::issue_mma(
      {std::is_same_v<typename Type::Sum, float>, kN, sum, a, nullptr, b.tile, 0, b.row, keep});
}
template <class Type, int kN>
inline void mma(typename Type::Sum (&sum)[kN / 2], Descriptor a, Descriptor b, bool keep) {
  detail::issue_mma({std::is_same_v<typename Type::Sum, float>, kN, sum, nullptr, a.tile, b.tile,
                     a.row, b.row, keep});
}

}  // namespace quant::sm90
