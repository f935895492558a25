// What this machine can do, as benchmarks/gemm_cpu.py measures it beside every sample: bytes read
// from memory a second, and INT8 operations a second in registers. Built by the benchmark itself.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if !defined(__AVX2__)
#error "the probes need AVX2"
#endif

namespace {

#if defined(__AVX512VNNI__)
using Vector = __m512i;
constexpr int kSums = 24;
Vector splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
Vector load(const uint8_t* from) { return _mm512_loadu_si512(from); }
Vector exclusive_or(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
void dot(Vector& sum, Vector a, Vector b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#else
using Vector = __m256i;
constexpr int kSums = 12;
Vector splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
Vector load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const Vector*>(from));
}
Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
#if defined(__AVXVNNI__)
void dot(Vector& sum, Vector a, Vector b) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
#else
// The least that bytes cost: pairs of products, added in INT16. To widen them now and then is more.
void dot(Vector& sum, Vector a, Vector b) {
  Vector pairs;
  asm volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
               : "+x"(sum), "=&x"(pairs)
               : "x"(a), "x"(b));
}
#endif
#endif

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The longest of the threads' own times: their start does not count.
template <class Body>
double slowest(int threads, const Body& body) {
  std::vector<double> taken(threads);
  const auto timed = [&](int thread) {
    const double start = seconds();
    body(thread);
    taken[thread] = seconds() - start;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(timed, thread);
  timed(0);
  for (std::thread& other : others) other.join();
  double longest = 0;
  for (double time : taken) longest = time > longest ? time : longest;
  return longest;
}

// Reads `bytes`, some of them ahead of their turn where that is asked for.
template <bool Ahead>
void read(const uint8_t* from, int64_t bytes) {
  constexpr int kBytes = sizeof(Vector), kVectors = 512 / kBytes;
  Vector sum[4] = {splat(0), splat(0), splat(0), splat(0)};
  for (int64_t at = 0; at < bytes; at += 512) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      sum[i % 4] = exclusive_or(sum[i % 4], load(from + at + kBytes * i));
      if (Ahead && kBytes * i % 64 == 0) __builtin_prefetch(from + at + kBytes * i + 1024);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) asm volatile("" : : "x"(sum[i]));
}

// A loop of its own: inlined into a thread's function, GCC 12 keeps the sums in memory.
__attribute__((noinline)) void multiply(int64_t steps) {
  Vector sum[kSums], a = splat(3), b = splat(5);
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sum[i] = splat(0);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) dot(sum[i], a, b);
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) asm volatile("" : : "x"(sum[i]));
}

}  // namespace

// Bytes a second of `threads` threads that read their parts of `data`: with prefetches, which some
// machines gain a sixth from, or without, which others do, whichever is faster.
extern "C" double probe_read(const uint8_t* data, int64_t bytes, int threads) {
  const int64_t part = bytes / 2 / threads / 512 * 512;
  const double with = slowest(threads, [&](int i) { read<true>(data + i * part, part); });
  const uint8_t* rest = data + threads * part;
  const double without = slowest(threads, [&](int i) { read<false>(rest + i * part, part); });
  return static_cast<double>(threads * part) / (with < without ? with : without);
}

// INT8 operations a second: independent sums, `steps` products of a vector of bytes to each.
extern "C" double probe_products(int64_t steps, int threads) {
  const double time = slowest(threads, [&](int) { multiply(steps); });
  return static_cast<double>(threads) * steps * kSums * sizeof(Vector) * 2 / time;
}
