// Which pages a worker of decode attention reads. Pure integers, for host and device.
//
// The pages of all sequences and KV heads form one list, and each of W workers takes an equal,
// contiguous part of it, however long the sequences are (LeanAttention, Sanovar et al. 2024):
//
//     pages   | seq 0, head 0     | seq 0, head 1     | seq 1, head 0 | seq 1, head 1 |  ...
//     worker  |      0      |      1      |      2      |      3      |      4      |   ...
//
// The list depends on lengths that only the device knows, so every worker computes it from `ends`,
// the running sum of pages over sequences: a launch of fixed size serves every step of a CUDA
// graph. As in schedule.h, a segment is finished by the worker with its last page, every worker
// begins with its last segment, and whoever is waited for has a lower index.
#pragma once

#include "cuda/schedule.h"

namespace quant {

constexpr int kPage = 64;  // tokens of a page of the cache

// The first page that the newest token of a sequence sees, and how many it sees.
QUANT_BOTH int first_page(int length, int window) {
  return window > 0 && length > window ? (length - window) / kPage : 0;
}
QUANT_BOTH int page_count(int length, int window) {
  return length > 0 ? (length + kPage - 1) / kPage - first_page(length, window) : 0;
}

// Pages [begin, end) of the `pages` that a sequence and KV head have.
struct DecodeSegment {
  int sequence, head, begin, end, pages;
  int64_t start;  // of the segment, in the list
};

struct DecodeSchedule {
  const int* ends;  // [batch]: pages of one KV head of sequences 0 .. b
  int batch, kv_heads, workers;

  QUANT_BOTH int64_t units() const { return int64_t{1} * ends[batch - 1] * kv_heads; }
  // Workers that have pages: none of these goes without.
  QUANT_BOTH int64_t active() const { return units() < workers ? units() : workers; }
  QUANT_BOTH int64_t first_unit(int worker) const {
    return worker < active() ? worker * units() / active() : units();
  }
  QUANT_BOTH int owner(int64_t unit) const {
    return static_cast<int>(((unit + 1) * active() - 1) / units());
  }
};

// The segments of one worker, from its last to its first.
class DecodeWork {
 public:
  QUANT_BOTH DecodeWork(const DecodeSchedule& schedule, int worker)
      : schedule_(schedule),
        first_(schedule.first_unit(worker)),
        end_(schedule.first_unit(worker + 1)) {}
  QUANT_BOTH bool next(DecodeSegment& segment) {
    if (end_ <= first_) return false;
    const int heads = schedule_.kv_heads, sequence = sequence_of((end_ - 1) / heads);
    const int before = sequence > 0 ? schedule_.ends[sequence - 1] : 0;
    const int pages = schedule_.ends[sequence] - before;
    const int64_t list = int64_t{1} * before * heads;
    const int head = static_cast<int>((end_ - 1 - list) / pages);
    const int64_t start = list + int64_t{1} * head * pages;
    const int64_t from = first_ > start ? first_ : start;
    segment = {sequence, head, static_cast<int>(from - start), static_cast<int>(end_ - start),
               pages,    start};
    end_ = from;
    return true;
  }

 private:
  // The first sequence whose pages end behind `page`.
  QUANT_BOTH int sequence_of(int64_t page) const {
    int low = 0, high = schedule_.batch - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (schedule_.ends[middle] > page) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  DecodeSchedule schedule_;
  int64_t first_, end_;
};

}  // namespace quant
