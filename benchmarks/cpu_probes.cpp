// What this machine can do, as benchmarks/gemm_cpu.py measures it beside every sample: bytes read
// from memory a second, and INT8 operations a second in registers. Built by the benchmark itself.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

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

}  // namespace

// Bytes a second of `threads` threads that read their parts of `data`.
extern "C" double probe_read(const uint8_t* data, int64_t bytes, int threads) {
  const int64_t part = bytes / threads / 512 * 512;
  const double time = slowest(threads, [&](int thread) {
    const uint8_t* from = data + thread * part;
    __m512i sum[4] = {};
    for (int64_t at = 0; at < part; at += 512) {
      for (int line = 0; line < 8; ++line) {
        sum[line % 4] = _mm512_xor_si512(sum[line % 4], _mm512_loadu_si512(from + at + 64 * line));
        _mm_prefetch(reinterpret_cast<const char*>(from + at + 64 * line + 1024), _MM_HINT_T0);
      }
    }
    for (__m512i& one : sum) asm volatile("" : "+v"(one));
  });
  return static_cast<double>(threads * part) / time;
}

// INT8 operations a second: 24 independent sums, `steps` dot products of four in 16 lanes each.
extern "C" double probe_vnni(int64_t steps, int threads) {
  const double time = slowest(threads, [&](int) {
    __m512i sum[24], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) sum[i] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < 24; ++i) asm("vpdpbusd %1, %2, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
    }
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) asm volatile("" : : "v"(sum[i]));
  });
  return static_cast<double>(threads) * steps * 24 * 16 * 4 * 2 / time;
}
