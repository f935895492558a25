// Memory of one thread that grows and is kept, so that decode allocates nothing.
#ifndef QUANT_ARENA_H_
#define QUANT_ARENA_H_

#include <cstdint>
#include <new>

namespace quant {

struct Arena {
  uint8_t* memory = nullptr;
  int64_t size = 0;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { free(); }
  void free() { ::operator delete(memory, std::align_val_t(64)); }
  // At least that many bytes, of no content; null where there is no memory.
  uint8_t* reserve(int64_t bytes) {
    if (bytes > size) {
      free();
      const auto rounded = static_cast<size_t>((bytes + 4095) / 4096 * 4096);
      memory = static_cast<uint8_t*>(::operator new(rounded, std::align_val_t(64), std::nothrow));
      size = memory == nullptr ? 0 : static_cast<int64_t>(rounded);
    }
    return memory;
  }
};

}  // namespace quant

#endif  // QUANT_ARENA_H_
