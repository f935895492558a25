// parallel_for(count, threads, body): body(item, thread) for every item in [0, count).
//
// Every thread has a share of the items, side by side, and takes them one by one, in order; who is
// done takes from the others' shares, so that a thread which the machine does not run holds nobody
// up. The caller takes part, and waits only for threads that have begun.
// Results must not depend on which thread runs an item. `thread`, in [0, threads), tells scratch
// memory apart; the caller is thread 0.
//
// The pool is made by the first call and lives as long as the process. Between calls its threads
// wait awake for a moment, since waking one costs more than a layer of a small model, then sleep.
// Calls from several threads take turns; a call from within a body runs on the thread it is on.
// After a fork the child makes a pool of its own.
#ifndef QUANT_PARALLEL_H_
#define QUANT_PARALLEL_H_

#include <cstdint>

namespace quant {

using Task = void (*)(const void* body, int64_t item, int thread);

void parallel_run(int64_t count, int threads, Task task, const void* body) noexcept;

// `body` must not throw. threads <= 1: everything runs here. No two items may write to one place.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  parallel_run(
      count, threads,
      [](const void* call, int64_t item, int thread) {
        (*static_cast<const Body*>(call))(item, thread);
      },
      &body);
}

}  // namespace quant

#endif  // QUANT_PARALLEL_H_
