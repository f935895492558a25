#include "cuda/simulate/simulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

namespace quant::sm90 {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32, kWarpgroup = 128;

struct Mma {
  int issued = 0;  // threads
  bool done = false;
  std::array<detail::MmaIssue, kWarpgroup> by{};
};
struct Warpgroup {
  std::deque<Mma> mmas;
};
struct Warp {
  int arrived = 0, generation = 0;
  uint64_t values[2][kWarp] = {};
  detail::WarpWords words[2] = {};
};
struct Meeting {  // of group_sync and cluster_sync
  int arrived = 0, generation = 0;
  bool all[2];  // of even generations, and odd ones
};
struct Block {
  int index;
  std::vector<char> memory;
  char* shared;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<int, Meeting> meetings;
  int alive;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  bool done = false;
  std::function<bool()> ready;
  const char* waits_for = nullptr;
  int issued = 0;            // MMAs
  std::vector<int> commits;  // MMAs issued before each commit
};
struct Copy {
  std::function<void()> perform;
};

struct Machine {
  Machine(const Launch& launch, const std::function<void()>& body)
      : launch(launch), body(&body), random(launch.seed) {}
  Launch launch;
  const std::function<void()>* body;
  std::mt19937 random;
  std::vector<std::unique_ptr<Block>> blocks;
  std::map<int, Meeting> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Copy> copies;
  Fiber* current = nullptr;
  ucontext_t scheduler{};
  uint64_t events = 0;
  std::string failure;
};
Machine* machine;
Votes counted;

void enter() {
  (*machine->body)();
  machine->current->done = true;
  ++machine->events;
  swapcontext(&machine->current->context, &machine->scheduler);
}

void start_block(int index) {
  const Launch& launch = machine->launch;
  auto block = std::make_unique<Block>();
  block->index = index;
  block->memory.assign(static_cast<size_t>(launch.shared_bytes) + 1024, static_cast<char>(0xFF));
  const auto address = reinterpret_cast<uintptr_t>(block->memory.data());
  block->shared = reinterpret_cast<char*>((address + 1023) / 1024 * 1024);
  block->warps.resize(static_cast<size_t>(launch.threads / kWarp));
  block->warpgroups.resize(static_cast<size_t>((launch.threads + kWarpgroup - 1) / kWarpgroup));
  block->alive = launch.threads;
  for (int thread = 0; thread < launch.threads; ++thread) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStack);
    fiber->block = block.get();
    fiber->thread = thread;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    makecontext(&fiber->context, enter, 0);
    machine->fibers.push_back(std::move(fiber));
  }
  machine->blocks.push_back(std::move(block));
}

// Half of the warps, others for every seed: they run where nothing else goes on, as if the rest
// of the block were much faster.
bool sleepy(const Fiber& fiber) {
  auto x = static_cast<uint32_t>(fiber.block->index * 64 + fiber.thread / kWarp) * 0x9E3779B9u;
  x += machine->launch.seed * 0x85EBCA6Bu;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return (x >> 16 & 1) != 0;
}

// Every thread that is awake, or every sleepy one, once, in a random order. Whether anything
// happened.
bool round_of_threads(bool asleep) {
  const uint64_t before = machine->events;
  std::vector<Fiber*> order;
  for (auto& fiber : machine->fibers) {
    if (!fiber->done && (machine->launch.late && sleepy(*fiber)) == asleep) {
      order.push_back(fiber.get());
    }
  }
  std::shuffle(order.begin(), order.end(), machine->random);
  bool ran = false;
  for (Fiber* fiber : order) {
    if (fiber->ready && !fiber->ready()) continue;
    fiber->ready = nullptr;
    machine->current = fiber;
    swapcontext(&machine->scheduler, &fiber->context);
    ran = true;
    if (fiber->done) --fiber->block->alive;
    if (!machine->failure.empty()) return false;
  }
  return ran || machine->events != before;
}

void perform_a_copy() {
  const size_t pick = machine->random() % machine->copies.size();
  const Copy copy = machine->copies[pick];
  machine->copies.erase(machine->copies.begin() + static_cast<ptrdiff_t>(pick));
  copy.perform();
}

std::string standstill() {
  std::map<std::string, int> waiting;
  for (auto& fiber : machine->fibers) {
    if (fiber->done) continue;
    std::ostringstream where;
    where << "block " << fiber->block->index << " warp " << fiber->thread / kWarp << " waits for "
          << (fiber->waits_for ? fiber->waits_for : "nothing");
    ++waiting[where.str()];
  }
  std::ostringstream text;
  text << "nothing goes on:";
  for (auto& [where, threads] : waiting) text << "\n  " << threads << " threads of " << where;
  return text.str();
}

uint8_t of_tile(const void* tile, int bytes, int row, int k) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(tile) + row * bytes + k;
  return *reinterpret_cast<const uint8_t*>(swizzled(place, bytes));
}

template <class Sum, class Value>
void multiply_tiles(const Mma& mma, Value value) {
  const detail::MmaIssue& first = mma.by[0];
  const int columns = first.columns;
  std::vector<Sum> a(64 * 32), b(static_cast<size_t>(columns) * 32);
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / kWarp * 16 + thread % kWarp / 4, k = thread % 4 * 4;
    for (int r = 0; r < 4 && first.a; ++r) {
      for (int byte = 0; byte < 4; ++byte) {
        a[static_cast<size_t>((row + r % 2 * 8) * 32 + k + r / 2 * 16 + byte)] =
            value(static_cast<uint8_t>(mma.by[static_cast<size_t>(thread)].a[r] >> 8 * byte));
      }
    }
  }
  for (int row = 0; row < 64 && !first.a; ++row) {
    for (int k = 0; k < 32; ++k) {
      a[static_cast<size_t>(row * 32 + k)] = value(of_tile(first.a_tile, first.a_row, row, k));
    }
  }
  for (int column = 0; column < columns; ++column) {
    for (int k = 0; k < 32; ++k) {
      b[static_cast<size_t>(column * 32 + k)] =
          value(of_tile(first.b_tile, first.b_row, column, k));
    }
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    const detail::MmaIssue& mine = mma.by[static_cast<size_t>(thread)];
    const int row = thread / kWarp * 16 + thread % kWarp / 4, column = thread % 4 * 2;
    auto* sum = static_cast<Sum*>(mine.sum);
    for (int i = 0; i < columns / 2; ++i) {
      const Sum* x = &a[static_cast<size_t>((row + i / 2 % 2 * 8) * 32)];
      const Sum* y = &b[static_cast<size_t>((i / 4 * 8 + column + i % 2) * 32)];
      using Wide = std::conditional_t<std::is_same_v<Sum, float>, double, int64_t>;
      Wide total = mine.keep ? static_cast<Wide>(sum[i]) : Wide{0};
      for (int k = 0; k < 32; ++k) total += static_cast<Wide>(x[k]) * static_cast<Wide>(y[k]);
      sum[i] = static_cast<Sum>(total);
    }
  }
}

void execute(Mma& mma) {
  if (mma.by[0].floating) {
    const auto& table = detail::e4m3_table();
    multiply_tiles<float>(mma, [&](uint8_t code) { return table[code]; });
  } else {
    multiply_tiles<int32_t>(mma, [](uint8_t code) { return static_cast<int8_t>(code); });
  }
  mma.done = true;
  ++machine->events;
}

Warpgroup& warpgroup() {
  return machine->current->block
      ->warpgroups[static_cast<size_t>(machine->current->thread / kWarpgroup)];
}

}  // namespace

namespace detail {

void wait_for(const std::function<bool()>& ready, const char* what) {
  if (ready()) return;
  Fiber* self = machine->current;
  self->ready = ready;
  self->waits_for = what;
  swapcontext(&self->context, &machine->scheduler);
}

void fail(const std::string& reason) {
  machine->failure = reason;
  swapcontext(&machine->current->context, &machine->scheduler);
}

void progress() { ++machine->events; }

void exchange(uint64_t value, int mask, uint64_t* found) {
  Fiber* self = machine->current;
  Warp& warp = self->block->warps[static_cast<size_t>(self->thread / kWarp)];
  const int generation = warp.generation, lane = self->thread % kWarp;
  warp.values[generation % 2][lane] = value;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
    progress();
  }
  wait_for([&warp, generation] { return warp.generation != generation; }, "the rest of its warp");
  *found = warp.values[generation % 2][lane ^ mask];
}

void gather(const uint32_t (&mine)[6], WarpWords* all) {
  Fiber* self = machine->current;
  Warp& warp = self->block->warps[static_cast<size_t>(self->thread / kWarp)];
  WarpWords& words = warp.words[warp.generation % 2];
  std::copy(std::begin(mine), std::end(mine), words.of[self->thread % kWarp]);
  uint64_t ignored;
  exchange(0, 0, &ignored);
  *all = words;
}

void synchronize(int group, int threads, const char* what) {
  Block* block = machine->current->block;
  Meeting& meeting = group < 0 ? machine->clusters[block->index / machine->launch.cluster]
                               : block->meetings[group];
  if (group <= 0) threads = machine->launch.threads * (group < 0 ? machine->launch.cluster : 1);
  const int generation = meeting.generation;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.generation;
    progress();
  }
  wait_for([&meeting, generation] { return meeting.generation != generation; }, what);
}

bool all_of(int group, int threads, bool value) {
  Meeting& meeting = machine->current->block->meetings[group];
  bool& all = meeting.all[meeting.generation % 2];
  all = value && (meeting.arrived == 0 || all);
  if (meeting.arrived + 1 == threads) {
    ++counted.held;
    counted.unanimous += all;
  }
  synchronize(group, threads, "all_of_group");
  return all;
}

void schedule_copy(std::function<void()> copy, void* to, size_t bytes) {
  if (!machine->launch.late) {
    copy();
    return;
  }
  std::memset(to, 0xFF, bytes);
  machine->copies.push_back({std::move(copy)});
}

void* at_rank(void* pointer, int rank) {
  const Block* block = machine->current->block;
  const int cluster = machine->launch.cluster;
  const int index = block->index / cluster * cluster + rank;
  for (auto& other : machine->blocks) {
    if (other->index == index) {
      return other->shared + (static_cast<char*>(pointer) - block->shared);
    }
  }
  fail("a block of the cluster is not there");
  return nullptr;
}

void issue_mma(const MmaIssue& issue) {
  Fiber* self = machine->current;
  auto& mmas = warpgroup().mmas;
  const auto index = static_cast<size_t>(self->issued++);
  if (mmas.size() <= index) mmas.resize(index + 1);
  Mma& mma = mmas[index];
  mma.by[static_cast<size_t>(self->thread % kWarpgroup)] = issue;
  ++mma.issued;
  progress();
  if (mma.issued == kWarpgroup && !machine->launch.late) execute(mma);
}

void commit_mma() { machine->current->commits.push_back(machine->current->issued); }

void await_mma(int left) {
  Fiber* self = machine->current;
  const int groups = static_cast<int>(self->commits.size()) - left;
  if (groups <= 0) return;
  auto& mmas = warpgroup().mmas;
  const int until = self->commits[static_cast<size_t>(groups - 1)];
  for (int i = 0; i < until; ++i) {
    if (mmas[static_cast<size_t>(i)].done) continue;
    wait_for([&mmas, i] { return mmas[static_cast<size_t>(i)].issued == kWarpgroup; },
             "its warpgroup to issue an MMA");
    if (!mmas[static_cast<size_t>(i)].done) execute(mmas[static_cast<size_t>(i)]);
  }
}

}  // namespace detail

int thread_index() { return machine->current->thread; }
int block_index() { return machine->current->block->index; }
int grid_size() { return machine->launch.blocks; }
char* shared_memory() { return machine->current->block->shared; }
int cluster_rank() { return machine->current->block->index % machine->launch.cluster; }

Votes votes() { return counted; }
std::string run(const Launch& launch, const std::function<void()>& body) {
  Machine local(launch, body);
  machine = &local;
  counted = {};
  int next = 0;
  while (local.failure.empty()) {
    int alive = 0;
    for (auto& block : local.blocks) alive += block->alive > 0;
    while (next < launch.blocks && next % launch.cluster + alive < launch.resident) {
      const int group = std::min(launch.cluster, launch.blocks - next);
      if (alive + group > launch.resident) break;
      for (int i = 0; i < group; ++i, ++alive) start_block(next++);
    }
    if (alive == 0) break;
    if (round_of_threads(false)) {
      // Some copies arrive in between.
      if (!local.copies.empty() && local.random() % 8 == 0) perform_a_copy();
      continue;
    }
    if (!local.failure.empty()) break;
    if (!local.copies.empty() && (local.random() % 2 == 0 || !round_of_threads(true))) {
      if (local.failure.empty()) perform_a_copy();
    } else if (local.copies.empty() && !round_of_threads(true) && local.failure.empty()) {
      local.failure = standstill();
    }
  }
  if (local.failure.empty() && !local.copies.empty()) {
    local.failure = "the kernel ended before its copies did";
  }
  machine = nullptr;
  return local.failure;
}

}  // namespace quant::sm90
