// INT8 in plain C++: a register of four lanes, as a compiler's vector type.
#include <cstdint>
#include <cstring>

namespace quant {
namespace {

typedef uint8_t V __attribute__((vector_size(16)));
typedef int8_t S8 __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef int16_t S16 __attribute__((vector_size(16)));
typedef int32_t S32 __attribute__((vector_size(16)));
typedef uint32_t U32 __attribute__((vector_size(16)));
constexpr int kBytes = 16;
constexpr int kTileTokens = 4;
constexpr int kTileVectors = 2;
constexpr int kManyColumns = 256;

V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
V splat(int32_t word) { return V(S32{word, word, word, word}); }
V and_bytes(V a, V b) { return a & b; }
V shift_nibble(V a) { return V(U16(a) >> 4); }
V multiply16(V a, V b) { return V(U16(a) * U16(b)); }
V times8(V a) { return V(U32(a) << 3); }
V widen(const void* from) {
  uint8_t bytes[8];
  std::memcpy(bytes, from, sizeof bytes);
  return V(U16{bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]});
}
V first_of_pair(V a) { return V((U32(a) & 0xFFFF) | (U32(a) << 16)); }
V second_of_pair(V a) { return V((U32(a) & 0xFFFF0000) | (U32(a) >> 16)); }
void dot16(V& sum, V a, V b) {
  const S32 low = (S32(U32(a) << 16) >> 16) * (S32(U32(b) << 16) >> 16);
  const S32 high = (S32(a) >> 16) * (S32(b) >> 16);
  sum = V(U32(sum) + U32(low) + U32(high));
}
void dot8(V& sum, V bytes, V x) {
  for (int byte = 0; byte < 4; ++byte) {
    const int up = 24 - 8 * byte;
    sum = V(U32(sum) + U32(S32(U32(bytes) << up >> 24) * (S32(U32(x) << up) >> 24)));
  }
}

}  // namespace
}  // namespace quant

#include "int8_kernels.h"

namespace quant {
const Kernels kInt8Portable = int8_kernels();
}  // namespace quant
