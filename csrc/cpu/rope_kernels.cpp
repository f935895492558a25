// From the fused q, k, v projection to what attention reads, one token at a time:
//
//   q, k   QK-norm (optional, rounded to x's type), RoPE (rounded to x's type), the key transform
//          k' = scale (k - shift), q' = q / scale
//   Q      FP8 codes and a scale per head, as quantize_activation
//   K, V   INT4 codes, scale s and offset o per head (kv4.py), into place slot % PAGE of its page:
//            s = F((max - min) / 15.5), o = F((max + min) / 2 + s / 2)      F: to FP16
//            s = F(-extreme / 8),       o = 0                               symmetric
//            code = clamp(round((x - o) / s), -8, 7), NaN: 0
//
// A dense cache takes q, k and v as they are after RoPE.
//
// Every step rounds as the definition does, so products and sums are not fused.
#include "activation_kernels.h"

namespace quant {
namespace QUANT_ISA {
namespace {

int64_t index_at(const void* p, int64_t wide, int64_t i) {
  return wide != 0 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

F32 load_any(const void* p, int64_t type, int64_t i) {
  switch (type) {
    case QUANT_CPU_BF16:
      return load(static_cast<const Bf16*>(p) + i);
    case QUANT_CPU_FP16:
      return load(static_cast<const Fp16*>(p) + i);
    default:
      return load(static_cast<const float*>(p) + i);
  }
}

template <class T>
void norm_head(float* x, int64_t dim, const void* weight, int64_t type, float eps) {
  F32 squares = {};
  for (int64_t i = 0; i < dim; i += LANES) {
    const F32 value = load(x + i);
    squares = fma(value, value, squares);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(dim) + eps);
  for (int64_t i = 0; i < dim; i += LANES) {
    store(x + i, round_to<T>(load(x + i) * factor * load_any(weight, type, i)));
  }
}

template <class T>
void rotate_head(float* x, int64_t half, const float* cos, const float* sin) {
  for (int64_t i = 0; i < half; i += LANES) {
    const F32 a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, round_to<T>(a * c + -b * s));
    store(x + half + i, round_to<T>(b * c + a * s));
  }
}

float to_half_and_back(float x, uint16_t* half) {
  const U16 bits = to_half(splat(x));
  *half = bits[0];
  return from_half(bits)[0];
}

// x [dim] -> bytes [dim / 2], channel j in the low and j + dim / 2 in the high nibble.
void store_row(const float* x, int64_t dim, bool symmetric, uint8_t* bytes, uint16_t* scales) {
  F32 low = load(x), high = low;
  I32 magnitudes = {};
  for (int64_t i = 0; i < dim; i += LANES) {
    const F32 value = load(x + i);
    low = min(low, value);
    high = max(high, value);
    magnitudes = max(magnitudes, bits_as<I32>(abs(value)));
  }
  float least = -largest(-low), most = largest(high);
  if (largest(magnitudes) > 0x7F800000) least = most = __builtin_nanf("");
  float s, o = 0.0f;
  scales[1] = 0;
  if (symmetric) {
    s = to_half_and_back(-(most > -least ? most : least) / 8.0f, scales);
  } else {
    s = to_half_and_back((most - least) / 15.5f, scales);
    o = to_half_and_back((most + least) / 2.0f + 0.5f * s, scales + 1);
  }
  const float step = s == 0.0f ? 1.0f : s;
  const auto code = [&](int64_t i) {
    const F32 y = (load(x + i) - o) / step;
    return nearest_integers(select(y == y, min(splat(7.0f), max(splat(-8.0f), y)), F32{}));
  };
  for (int64_t j = 0; j < dim / 2; j += LANES) {
    store_low_bytes(bytes + j, (code(j) & 15) | (code(dim / 2 + j) << 4));
  }
}

template <class T>
void rope(const QuantCpuRope& call, int64_t token) {
  const int64_t dim = call.head_dim, half = dim / 2, ratio = call.heads / call.kv_heads;
  const int64_t position = index_at(call.positions, call.wide_positions, token);
  const int64_t slot = index_at(call.slots, call.wide_slots, token);
  const float* cos = call.cos + position * call.cos_row;
  const float* sin = call.sin + position * call.sin_row;
  const T* head = static_cast<const T*>(call.qkv) + token * call.qkv_row;
  float x[MAX_HEAD_DIM];

  const auto turned = [&](const void* norm, int64_t norm_type) {
    for (int64_t i = 0; i < dim; i += LANES) store(x + i, load(head + i));
    head += dim;
    if (norm != nullptr) norm_head<T>(x, dim, norm, norm_type, call.eps);
    rotate_head<T>(x, half, cos, sin);
  };
  const bool dense = call.kv_type != QUANT_CPU_INT4;
  const auto store_as_is = [&](void* to, int64_t at) {
    for (int64_t i = 0; i < dim; i += LANES) store(static_cast<T*>(to) + at + i, load(x + i));
  };
  // kind 0: keys, 1: values.
  const auto append = [&](int64_t kind, int64_t kv_head) {
    const int64_t page = kind * call.pages + slot / PAGE;
    const int64_t place = (page * call.kv_heads + kv_head) * PAGE + slot % PAGE;
    if (dense) return store_as_is(call.kv, place * dim);
    store_row(x, dim, call.symmetric != 0, static_cast<uint8_t*>(call.kv) + place * half,
              call.kv_scales + place * 2);
  };

  for (int64_t h = 0; h < call.heads; ++h) {
    turned(call.q_norm, call.q_norm_type);
    const int64_t at = token * call.q_token + h * call.q_head;
    if (dense) {
      store_as_is(call.q, at);
      continue;
    }
    I32 magnitudes = {};
    for (int64_t i = 0; i < dim; i += LANES) {
      F32 value = load(x + i);
      if (call.key_scale != nullptr) {
        value = value / load(call.key_scale + h / ratio * call.key_scale_row + i);
        store(x + i, value);
      }
      magnitudes = max(magnitudes, bits_as<I32>(abs(value)));
    }
    const float a = scale_of(largest(magnitudes), 448.0f);
    call.q_scale[token * call.q_scale_token + h] = a;
    quantize_row(x, dim, a, true, static_cast<uint8_t*>(call.q) + at);
  }
  if (slot < 0) return;
  for (int64_t h = 0; h < call.kv_heads; ++h) {
    turned(call.k_norm, call.k_norm_type);
    for (int64_t i = 0; i < dim && call.key_scale != nullptr; i += LANES) {
      const F32 shift = load(call.key_shift + h * call.key_shift_row + i);
      store(x + i, (load(x + i) - shift) * load(call.key_scale + h * call.key_scale_row + i));
    }
    append(0, h);
  }
  for (int64_t h = 0; h < call.kv_heads; ++h) {
    for (int64_t i = 0; i < dim; i += LANES) store(x + i, load(head + i));
    head += dim;
    append(1, h);
  }
}

}  // namespace

void rope_token(const QuantCpuRope& call, int64_t token) {
  const DefaultRounding guard;
  switch (call.qkv_type) {
    case QUANT_CPU_BF16:
      return rope<Bf16>(call, token);
    case QUANT_CPU_FP16:
      return rope<Fp16>(call, token);
    default:
      return rope<float>(call, token);
  }
}

}  // namespace QUANT_ISA
}  // namespace quant
