// The pool behind parallel_for.
//
// A call publishes its job and opens a gate. A worker that finds the gate open passes it, takes
// items until none is left, and leaves; the caller does the same, closes the gate, and waits for
// those inside. The gate is one word: call number, open bit, number of workers inside.
#include "parallel.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace quant {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxThreads = 256;
constexpr uint64_t kInside = 1;
constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr uint64_t kCall = uint64_t{1} << 17;
// Awake for as long as Python takes between two ops; politely after the first part of it.
constexpr auto kBusy = std::chrono::microseconds(20);
constexpr auto kAwake = std::chrono::microseconds(200);

thread_local bool in_parallel = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  sched_yield();
#endif
}

// Waits for done(), at most until `limit` has passed; whether it came true.
template <class Done>
bool spin(Clock::duration busy, Clock::duration limit, const Done& done) {
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
    const auto passed = Clock::now() - start;
    if (passed > limit) return false;
    if (passed > busy) sched_yield();
  }
}

struct alignas(64) Worker {
  std::atomic<uint64_t> call{0};  // the last one that wanted this worker
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
};

// The next item of a thread's share.
struct alignas(64) Next {
  std::atomic<int64_t> item{0};
};

class Pool {
 public:
  void run(int64_t count, int threads, Task task, const void* body) noexcept {
    const std::lock_guard<std::mutex> turn(turn_);
    threads = std::min(threads, start(threads - 1) + 1);
    count_ = count;
    task_ = task;
    body_ = body;
    shares_ = threads;
    for (int i = 0; i < threads; ++i) {
      next_[i].item.store(count * i / threads, std::memory_order_relaxed);
    }
    // Threads beyond the cores would take turns at waiting awake: they sleep at once.
    patient_.store(threads <= cores_, std::memory_order_relaxed);
    ++number_;
    gate_.store(number_ * kCall | kOpen);
    for (int i = 0; i < threads - 1; ++i) ring(workers_[i]);
    take(0);
    gate_.fetch_and(~kOpen);
    const auto empty = [this] { return gate_.load() % kOpen == 0; };
    while (!spin(kBusy, kAwake, empty)) {
    }
  }

 private:
  // As many of `wanted` workers as the system grants.
  int start(int wanted) noexcept {
    if (wanted <= started_) return wanted;
    // Signals are for the threads of the program that loaded this library.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < wanted; ++started_) {
        std::thread(&Pool::work, this, started_, number_).detach();
      }
    } catch (const std::system_error&) {  // a limit on threads: go on with those there are
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started_;
  }

  void ring(Worker& worker) {
    worker.call.store(number_);
    if (worker.asleep.load()) {
      const std::lock_guard<std::mutex> lock(worker.mutex);
      worker.wake.notify_one();
    }
  }

  void work(int index, uint64_t seen) {
    in_parallel = true;
    Worker& self = workers_[index];
    for (;;) {
      const auto called = [&] { return self.call.load() != seen; };
      const bool patient = patient_.load(std::memory_order_relaxed);
      if (!patient || !spin(kBusy, kAwake, called)) {
        std::unique_lock<std::mutex> lock(self.mutex);
        self.asleep.store(true);
        self.wake.wait(lock, called);
        self.asleep.store(false);
      }
      seen = self.call.load();
      if (enter(seen)) {
        take(index + 1);
        gate_.fetch_sub(kInside);
      }
    }
  }

  // Passes the gate if it is that of this call and still open.
  bool enter(uint64_t call) {
    uint64_t gate = gate_.load();
    while (gate / kCall == call && (gate & kOpen) != 0) {
      if (gate_.compare_exchange_weak(gate, gate + kInside)) return true;
    }
    return false;
  }

  // First the thread's own share, in order: what lies side by side in memory is read as one stream.
  // Then what others have left.
  void take(int thread) {
    for (int i = 0; i < shares_; ++i) {
      const int share = (thread + i) % shares_;
      const int64_t end = count_ * (share + 1) / shares_;
      for (;;) {
        const int64_t item = next_[share].item.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        task_(body_, item, thread);
      }
    }
  }

  std::mutex turn_;
  const int cores_ = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  int started_ = 0;
  uint64_t number_ = 0;
  int64_t count_ = 0;
  int shares_ = 0;
  Task task_ = nullptr;
  const void* body_ = nullptr;
  std::atomic<bool> patient_{true};
  alignas(64) std::atomic<uint64_t> gate_{0};
  Next next_[kMaxThreads];
  Worker workers_[kMaxThreads - 1];
};

// Never destroyed: its threads may still look at it while the process exits.
std::atomic<Pool*> shared_pool{nullptr};

Pool* pool() noexcept {
  Pool* found = shared_pool.load();
  if (found != nullptr) return found;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr || shared_pool.compare_exchange_strong(found, made)) return made;
  delete made;
  return found;
}

// A child of fork has none of the threads, and perhaps a lock that nobody will open.
const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr, std::memory_order_relaxed); });

}  // namespace

void parallel_run(int64_t count, int threads, Task task, const void* body) noexcept {
  (void)fork_handler;
  threads = static_cast<int>(std::min<int64_t>({threads, count, kMaxThreads}));
  Pool* const team = threads > 1 && !in_parallel ? pool() : nullptr;
  if (team == nullptr) {
    for (int64_t item = 0; item < count; ++item) task(body, item, 0);
    return;
  }
  in_parallel = true;
  team->run(count, threads, task, body);
  in_parallel = false;
}

}  // namespace quant
