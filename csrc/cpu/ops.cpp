// The C functions of activations, RoPE and attention: checks, and work shared out over threads.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace quant {
namespace {

// Numbers that a thread should have before it is worth waking.
constexpr int64_t NUMBERS_A_THREAD = 1 << 15;
// Tiles a thread should have before its spans need not be shared out too.
constexpr int64_t TILES_A_THREAD = 4;

int threads_for(int64_t threads, int64_t numbers) {
  const int64_t useful = std::min(threads, numbers / NUMBERS_A_THREAD);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(useful, 256)));
}

// row(index, scratch) for every row, each of `columns` numbers and with as many floats of scratch.
template <class Row>
int for_rows(const QuantCpuTokens& call, int64_t scratch_columns, const Row& row) {
  const int threads = threads_for(call.threads, call.rows * call.columns);
  // Rows of one item: several, where they are short.
  const int64_t group = std::max<int64_t>(1, NUMBERS_A_THREAD / 4 / call.columns);
  std::unique_ptr<float[]> scratch;
  if (scratch_columns > 0) {
    scratch.reset(new (std::nothrow) float[threads * scratch_columns]);
    if (scratch == nullptr) return QUANT_CPU_OUT_OF_MEMORY;
  }
  parallel_for((call.rows + group - 1) / group, threads, [&](int64_t item, int thread) {
    const int64_t end = std::min(call.rows, (item + 1) * group);
    for (int64_t i = item * group; i < end; ++i) row(i, scratch.get() + thread * scratch_columns);
  });
  return QUANT_CPU_OK;
}

int check(const QuantCpuTokens* call) {
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  if (call->rows < 0 || call->columns < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (call->rows == 0) return QUANT_CPU_OK;
  if (call->columns == 0) return QUANT_CPU_COLUMNS_OUT_OF_RANGE;
  const bool missing = call->x == nullptr || call->codes == nullptr || call->scale == nullptr;
  return missing ? QUANT_CPU_NULL_POINTER : QUANT_CPU_OK;
}

int check_heads(int64_t heads, int64_t kv_heads, int64_t dim) {
  if (heads < 0 || kv_heads < 0 || dim < 0) return QUANT_CPU_NEGATIVE_SIZE;
  const bool fits = kv_heads > 0 && heads % kv_heads == 0 && dim > 0 && dim % 32 == 0;
  return fits && dim <= MAX_HEAD_DIM ? QUANT_CPU_OK : QUANT_CPU_BAD_HEADS;
}

int64_t index_at(const void* p, int64_t wide, int64_t i) {
  return wide != 0 ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// What a sequence's queries see, and how they are cut into tiles.
struct Sequence {
  int64_t queries, kv_len, tiles;  // tiles: of each KV head

  Sequence(const QuantCpuAttention& call, int64_t b) {
    const int32_t* bounds = call.cu_seqlens;
    queries = bounds == nullptr ? 1 : bounds[b + 1] - bounds[b];
    kv_len = call.kv_lens[b];
    tiles = (queries * (call.heads / call.kv_heads) + TILE_ROWS - 1) / TILE_ROWS;
  }
};

struct TileWork {
  Tile tile;
  int64_t first_span, spans;
};

TileWork work_of(const QuantCpuAttention& call, int64_t b, int64_t kv_head, int64_t index) {
  const Sequence it(call, b);
  const int64_t ratio = call.heads / call.kv_heads, first = index * TILE_ROWS;
  const int64_t count = std::min<int64_t>(TILE_ROWS, it.queries * ratio - first);
  // Keys that the first row sees first and that the last row sees last.
  const int64_t begin = it.kv_len - it.queries + first / ratio + 1 - call.window;
  const int64_t end = it.kv_len - it.queries + (first + count - 1) / ratio + 1;
  constexpr int64_t SPAN = SPAN_PAGES * PAGE;
  const int64_t first_span = call.window > 0 && begin > 0 ? begin / SPAN : 0;
  const int64_t last_span = end > 0 ? (end + SPAN - 1) / SPAN : 0;
  return {{b, kv_head, first, count}, first_span, std::max<int64_t>(0, last_span - first_span)};
}

int check(const QuantCpuAttention& call) {
  const int status = check_heads(call.heads, call.kv_heads, call.head_dim);
  if (status != QUANT_CPU_OK) return status;
  if (call.batch < 0 || call.tokens < 0 || call.pages < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (call.batch == 0 || call.tokens == 0 || call.heads == 0) return QUANT_CPU_OK;
  if (call.kv_type < QUANT_CPU_FP32 || call.kv_type > QUANT_CPU_INT4) return QUANT_CPU_UNKNOWN_TYPE;
  const bool dense = call.kv_type != QUANT_CPU_INT4;
  if (call.kv_lens == nullptr || call.q == nullptr || call.out == nullptr ||
      (!dense && call.q_scale == nullptr)) {
    return QUANT_CPU_NULL_POINTER;
  }
  const int32_t* bounds = call.cu_seqlens;
  if (bounds != nullptr ? bounds[0] < 0 || bounds[call.batch] > call.tokens
                        : call.batch > call.tokens) {
    return QUANT_CPU_INDEX_OUT_OF_RANGE;
  }
  for (int64_t b = 0; b < call.batch; ++b) {
    const Sequence it(call, b);
    if (it.queries < 0 || it.kv_len < 0) return QUANT_CPU_NEGATIVE_SIZE;
    const int64_t needed = (it.kv_len + PAGE - 1) / PAGE;
    if (it.queries == 0 || needed == 0) continue;
    if (needed > call.table_columns) return QUANT_CPU_INDEX_OUT_OF_RANGE;
    if (call.block_table == nullptr || call.kv == nullptr ||
        (!dense && call.kv_scales == nullptr)) {
      return QUANT_CPU_NULL_POINTER;
    }
    const int32_t* table = call.block_table + b * call.table_row;
    for (int64_t i = 0; i < needed; ++i) {
      if (table[i] < 0 || table[i] >= call.pages) return QUANT_CPU_INDEX_OUT_OF_RANGE;
    }
  }
  return QUANT_CPU_OK;
}

// Every span of every tile is an item; what spans come to is added in a second round.
int attend_in_parts(const QuantCpuAttention& call, const OpKernels& run,
                    const std::vector<TileWork>& work, int threads) {
  std::vector<int64_t> first(work.size() + 1, 0);
  for (size_t i = 0; i < work.size(); ++i) first[i + 1] = first[i] + work[i].spans;
  const int64_t rows = std::max_element(work.begin(), work.end(), [](auto& a, auto& b) {
                         return a.tile.count < b.tile.count;
                       })->tile.count;
  const int64_t stride = run.state_floats(rows, call.head_dim);
  const std::unique_ptr<float[]> states(new (std::nothrow) float[first.back() * stride]);
  if (states == nullptr) return QUANT_CPU_OUT_OF_MEMORY;
  parallel_for(first.back(), threads, [&](int64_t item, int) {
    const size_t i = std::upper_bound(first.begin(), first.end(), item) - first.begin() - 1;
    const TileWork& it = work[i];
    run.attend_span(call, it.tile, it.first_span + item - first[i], states.get() + item * stride);
  });
  parallel_for(static_cast<int64_t>(work.size()), threads, [&](int64_t i, int) {
    run.combine(call, work[i].tile, states.get() + first[i] * stride, work[i].spans, stride);
  });
  return QUANT_CPU_OK;
}

int attend(const QuantCpuAttention& call, const OpKernels& run) {
  std::vector<TileWork> work;
  int64_t most_tiles = 0, spans = 0, keys = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    const Sequence it(call, b);
    most_tiles = std::max(most_tiles, it.tiles);
    keys += it.queries * it.kv_len;
  }
  // The last queries see most keys: their tiles come first, so that no long one is left for the
  // end.
  for (int64_t index = most_tiles - 1; index >= 0; --index) {
    for (int64_t b = 0; b < call.batch; ++b) {
      if (index >= Sequence(call, b).tiles) continue;
      for (int64_t h = 0; h < call.kv_heads; ++h) {
        work.push_back(work_of(call, b, h, index));
        spans = std::max(spans, work.back().spans);
      }
    }
  }
  if (work.empty()) return QUANT_CPU_OK;
  const int threads = threads_for(call.threads, keys * call.heads * call.head_dim / 8);
  const bool few = static_cast<int64_t>(work.size()) < TILES_A_THREAD * threads;
  if (threads > 1 && few && spans > 1) return attend_in_parts(call, run, work, threads);
  parallel_for(static_cast<int64_t>(work.size()), threads, [&](int64_t i, int) {
    run.attend(call, work[i].tile, work[i].first_span, work[i].spans);
  });
  return QUANT_CPU_OK;
}

int replay(const QuantCpuCall& call) {
  const void* const arguments = call.arguments;
  switch (call.op) {
    case QUANT_CPU_OP_QUANTIZE_ACTIVATION:
      return quant_cpu_quantize_activation(static_cast<const QuantCpuTokens*>(arguments));
    case QUANT_CPU_OP_RMS_NORM_QUANTIZE:
      return quant_cpu_rms_norm_quantize(static_cast<const QuantCpuNorm*>(arguments));
    case QUANT_CPU_OP_SILU_MUL_QUANTIZE:
      return quant_cpu_silu_mul_quantize(static_cast<const QuantCpuTokens*>(arguments));
    case QUANT_CPU_OP_GEMM:
      return quant_cpu_gemm(static_cast<const QuantCpuGemm*>(arguments));
    case QUANT_CPU_OP_ROPE_APPEND:
      return quant_cpu_rope_append(static_cast<const QuantCpuRope*>(arguments));
    case QUANT_CPU_OP_ATTENTION:
      return quant_cpu_attention(static_cast<const QuantCpuAttention*>(arguments));
    case QUANT_CPU_OP_LINEAR:
      return quant_cpu_linear(static_cast<const QuantCpuLinear*>(arguments));
    default:
      return QUANT_CPU_UNKNOWN_OP;
  }
}

}  // namespace
}  // namespace quant

int quant_cpu_quantize_activation(const QuantCpuTokens* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  const int status = quant::check(call);
  if (status != QUANT_CPU_OK || call->rows == 0) return status;
  return quant::for_rows(*call, 0, [&](int64_t i, float*) { run->quantize(*call, i); });
}

int quant_cpu_rms_norm_quantize(const QuantCpuNorm* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  const int status = quant::check(&call->tokens);
  if (status != QUANT_CPU_OK || call->tokens.rows == 0) return status;
  if (call->weight == nullptr) return QUANT_CPU_NULL_POINTER;
  return quant::for_rows(call->tokens, call->tokens.columns,
                         [&](int64_t i, float* scratch) { run->rms_norm(*call, i, scratch); });
}

int quant_cpu_silu_mul_quantize(const QuantCpuTokens* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  const int status = quant::check(call);
  if (status != QUANT_CPU_OK || call->rows == 0) return status;
  return quant::for_rows(*call, call->columns,
                         [&](int64_t i, float* scratch) { run->silu_mul(*call, i, scratch); });
}

int quant_cpu_rope_append(const QuantCpuRope* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  const int status = quant::check_heads(call->heads, call->kv_heads, call->head_dim);
  if (status != QUANT_CPU_OK) return status;
  if (call->tokens < 0 || call->pages < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (call->tokens == 0) return QUANT_CPU_OK;
  if (call->kv_type != QUANT_CPU_INT4 && call->kv_type != call->qkv_type) {
    return QUANT_CPU_UNKNOWN_TYPE;
  }
  const bool dense = call->kv_type != QUANT_CPU_INT4;
  const void* const q_scale = dense ? call->q : call->q_scale;  // which a dense cache has not
  const void* const kv_scales = dense ? call->kv : call->kv_scales;
  const void* needed[] = {call->qkv, call->positions, call->slots, call->cos,
                          call->sin, call->q,         q_scale};
  if (std::find(std::begin(needed), std::end(needed), nullptr) != std::end(needed)) {
    return QUANT_CPU_NULL_POINTER;
  }
  for (int64_t t = 0; t < call->tokens; ++t) {
    const int64_t position = quant::index_at(call->positions, call->wide_positions, t);
    const int64_t slot = quant::index_at(call->slots, call->wide_slots, t);
    if (position < 0 || position >= call->table_rows || slot >= call->pages * quant::PAGE) {
      return QUANT_CPU_INDEX_OUT_OF_RANGE;
    }
    if (slot >= 0 && (call->kv == nullptr || kv_scales == nullptr)) {
      return QUANT_CPU_NULL_POINTER;
    }
  }
  const int64_t numbers = (call->heads + 2 * call->kv_heads) * call->head_dim * call->tokens;
  quant::parallel_for(call->tokens, quant::threads_for(call->threads, numbers),
                      [&](int64_t t, int) { run->rope(*call, t); });
  return QUANT_CPU_OK;
}

int quant_cpu_attention(const QuantCpuAttention* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  const int status = quant::check(*call);
  if (status != QUANT_CPU_OK) return status;
  if (call->batch == 0 || call->tokens == 0 || call->heads == 0) return QUANT_CPU_OK;
  return quant::attend(*call, *run);
}

int quant_cpu_group_errors(const QuantCpuGroupErrors* call) {
  const quant::OpKernels* run = quant::op_kernels();
  if (run == nullptr) return QUANT_CPU_ISA_UNAVAILABLE;
  if (call == nullptr) return QUANT_CPU_NULL_POINTER;
  if (call->rows < 0 || call->columns < 0 || call->groups < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (call->rows == 0 || call->groups == 0) return QUANT_CPU_OK;
  if (call->columns % call->groups != 0) return QUANT_CPU_RAGGED_GROUPS;
  const void* const needed[] = {call->w, call->h, call->units, call->errors};
  if (std::find(std::begin(needed), std::end(needed), nullptr) != std::end(needed)) {
    return QUANT_CPU_NULL_POINTER;
  }
  quant::parallel_for(call->rows, quant::threads_for(call->threads, call->rows * call->columns),
                      [&](int64_t row, int) { run->group_errors(*call, row); });
  return QUANT_CPU_OK;
}

int quant_cpu_replay(const QuantCpuCall* calls, int64_t count) {
  if (count < 0) return QUANT_CPU_NEGATIVE_SIZE;
  if (count > 0 && calls == nullptr) return QUANT_CPU_NULL_POINTER;
  for (int64_t i = 0; i < count; ++i) {
    const int status = quant::replay(calls[i]);
    if (status != QUANT_CPU_OK) return status;
  }
  return QUANT_CPU_OK;
}
