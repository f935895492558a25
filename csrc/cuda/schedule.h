// Which blocks of K a worker multiplies, and in which order. Pure integers, for host and device.
//
// Y^T is cut into tiles of weight rows by tokens, a tile into `blocks` of K: tiles * blocks units.
//
//   whole tiles    worker w takes tiles w, w + workers, ...: many tokens, where tiles abound
//   split (stream-K, Osama et al. 2023)  worker w takes the units floor(w U / W) .. floor((w+1) U /
//   W),
//                  which differ by at most one: few tokens, where every worker must stream weights
//
//        units  | tile 0          | tile 1          | tile 2          |
//        worker | 0        | 1        | 2        | 3        | 4       |
//
// A tile that several workers share is finished by the one with its last unit, which adds their
// sums in the order of K. It waits for workers of lower indices only, and every worker begins with
// its last tile, where others wait for it: hardware starts blocks in order, so whoever is waited
// for has been started, however few multiprocessors there are, and mostly is already done.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUANT_BOTH __host__ __device__ inline
#else
#define QUANT_BOTH inline
#endif

namespace quant {

// Blocks of a launch that may wait for each other.
constexpr int kMostFlags = 640;

// Units [begin, end) of a tile's K.
struct Segment {
  int tile, begin, end;
};

struct Schedule {
  int row_tiles, token_tiles, blocks, workers;
  int split;  // 0 or 1

  QUANT_BOTH int tiles() const { return row_tiles * token_tiles; }
  QUANT_BOTH int64_t units() const { return int64_t{1} * tiles() * blocks; }
  QUANT_BOTH int64_t first_unit(int worker) const { return worker * units() / workers; }
  // Who has a unit, where tiles are split.
  QUANT_BOTH int owner(int64_t unit) const {
    return static_cast<int>(((unit + 1) * workers - 1) / units());
  }
};

// The segments of one worker, from its last to its first.
class Work {
 public:
  QUANT_BOTH Work(const Schedule& schedule, int worker) : schedule_(schedule), tile_(worker) {
    if (schedule.split) {
      first_ = schedule.first_unit(worker);
      end_ = schedule.first_unit(worker + 1);
    }
  }
  QUANT_BOTH bool next(Segment& segment) {
    if (!schedule_.split) {
      segment = {tile_, 0, schedule_.blocks};
      tile_ += schedule_.workers;
      return segment.tile < schedule_.tiles();
    }
    if (end_ <= first_) return false;
    const int tile = static_cast<int>((end_ - 1) / schedule_.blocks);
    const int64_t start = int64_t{1} * tile * schedule_.blocks;
    const int64_t from = first_ > start ? first_ : start;
    segment = {tile, static_cast<int>(from - start), static_cast<int>(end_ - start)};
    end_ = from;
    return true;
  }

 private:
  Schedule schedule_;
  int tile_;
  int64_t first_ = 0, end_ = 0;
};

// The same, unit by unit.
class Units {
 public:
  QUANT_BOTH Units(const Schedule& schedule, int worker) : work_(schedule, worker) {}
  QUANT_BOTH bool next(int& tile, int& block) {
    if (segment_.begin >= segment_.end && !work_.next(segment_)) return false;
    tile = segment_.tile;
    block = segment_.begin++;
    return true;
  }

 private:
  Work work_;
  Segment segment_{0, 0, 0};
};

}  // namespace quant
