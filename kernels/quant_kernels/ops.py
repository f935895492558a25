"""The ops: one contract each, registered with torch as `torch.ops.fourbyeight.*`.

An op writes into tensors it is given, allocates nothing that outlives it, and does not wait for the
GPU, so it can be captured in a CUDA graph; torch.compile sees it as one node. What it computes is
defined in `reference.py` and `reference_attention.py`; which backend runs it is said in
`dispatch.py`. Arguments that do not fit raise OpError with the shapes found and wanted.

Notation: M tokens, H hidden size, F intermediate size, N / K out / in features, T query tokens of B
sequences, Hq / Hk query / KV heads, D head_dim. x is BF16, FP16 or FP32 with the last dimension
contiguous; codes are float8_e4m3fn or int8, and their dtype says which activation is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant_kernels import dispatch
from quant_kernels.fragments import fragment_weight
from quant_kernels.packing import PackedWeight, block_weight, split_weight
from quant_kernels.registration import OpError, Weight, backend_for, call

__all__ = [
    "OpError",
    "Weight",
    "decode_attention",
    "dense_decode_attention",
    "dense_prefill_attention",
    "dense_rope_append",
    "gemm",
    "linear",
    "prefill_attention",
    "prepare",
    "quantize_activation",
    "rms_norm_quantize",
    "rope_append",
    "silu_mul_quantize",
    "workspace_bytes",
]


def quantize_activation(x: Tensor, codes: Tensor, scale: Tensor, *, backend: str = "") -> None:
    """x [M, K] -> codes [M, K], scale [M, 1] FP32 (`reference.quantize_activation`)."""
    call("quantize_activation", x, codes, scale, backend)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    *,
    residual: Tensor | None = None,
    backend: str = "",
) -> None:
    """RMSNorm of x [M, H] with weight [H], in x's dtype, then `quantize_activation`.

    residual [M, H], x's dtype: becomes x + residual, rounded, and is what is normed.
    """
    call("rms_norm_quantize", x, weight, eps, codes, scale, residual, backend)


def silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor, *, backend: str = "") -> None:
    """gate_up [M, 2 F], gate first: silu(gate) * up in its dtype, then `quantize_activation`."""
    call("silu_mul_quantize", gate_up, codes, scale, backend)


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str = "",
) -> None:
    """Y = X W^T of the weight's scheme: `gemm_w4afp8` or `gemm_w4a8` (`reference.gemm`).

    x_codes [M, K], x_scale [M, 1] FP32; weight [N, K] in the backend's layout (`prepare`); bias
    [N]; residual [M, N], which may be `out`. silu_mul: the weight's first half of rows is the gate,
    the second up, and out [M, N / 2] is silu(gate) * up, both FP32 before it; no residual then.
    codes [M, N / 2], scale [M, 1] FP32, both or neither, with silu_mul: they become what
    `quantize_activation` makes of out, bit for bit. workspace: see `workspace_bytes`.
    """
    fmt = weight.fmt
    if isinstance(weight, PackedWeight):
        parts = (weight.words, weight.scales, weight.scales.new_empty(0, dtype=torch.float32))
    else:
        parts = (weight.codes, weight.t, weight.c)
    call(
        f"gemm_{fmt.scheme}", x_codes, x_scale, *parts, fmt.group_size, fmt.numerics, out,
        bias, residual, silu_mul, codes, scale, workspace, backend,
    )  # fmt: skip


def linear(x: Tensor, weight: Tensor, out: Tensor, *, backend: str = "") -> None:
    """Y = X W^T with a weight in 16 or 32 bits: x [M, H], weight [N, H], out [M, N], of one dtype.

    A sum is FP32 and rounded once (`reference.linear`). Rows of each may lie apart. Backend `cpu`:
    with up to `cpu_linear.MOST_TOKENS` tokens, bits that depend neither on M nor on the threads.
    """
    call("linear", x, weight, out, backend)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    key_transform: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    backend: str = "",
) -> None:
    """RoPE, the key transform, Q to FP8, K and V to INT4 into the cache, in one pass.

    qkv [T, (Hq + 2 Hk) D]; positions, slots [T] int32 or int64; cos, sin [positions, D / 2] FP32.
    Writes q_codes [T, Hq, D] float8_e4m3fn, q_scale [T, Hq] FP32, and rows `slots` of kv_codes
    [2, pages, Hk, KV_PAGE, D / 2] uint8 and kv_scales [2, pages, Hk, KV_PAGE, 2] FP16; slot s is
    place s % KV_PAGE of page s // KV_PAGE, and a negative one stores nothing. Definition and the
    other arguments: `reference_attention.rope_quantize`, `append_kv`.
    """
    call(
        "rope_append", qkv, positions, cos, sin, slots, q_codes, q_scale, kv_codes, kv_scales,
        *(norms or (None, None)), eps, *(key_transform or (None, None)), symmetric, backend,
    )  # fmt: skip


def prefill_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    skip_threshold: float = 0.0,
    backend: str = "",
) -> None:
    """Causal attention of packed prompts or chunks over the cache (`reference_attention`).

    block_table [B, P], cu_seqlens [B + 1], kv_lens [B], all int32; max_query_len: of the longest
    chunk, known on the host. out [T, Hq, D] BF16, FP16 or FP32. soft_cap: 0 for none.

    skip_threshold > 0 lets a backend leave out keys whose p_t is below 2^-skip_threshold of the
    largest one of the query: n of them move an output by less than n 2^-skip_threshold times what
    its channel's values are apart. Backend cutlass does so for pages of keys and 64 rows at once,
    backend reference never; the others refuse both options.
    """
    call(
        "prefill_attention", q_codes, q_scale, kv_codes, kv_scales, block_table, cu_seqlens,
        kv_lens, max_query_len, out, sm_scale, window, soft_cap, skip_threshold, backend,
    )  # fmt: skip


def decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    workspace: Tensor | None = None,
    backend: str = "",
) -> None:
    """Attention of one token a sequence, q_codes [B, Hq, D] -> out [B, Hq, D]; kv_lens [B] int32.

    Length 0 (a padded place) gives zeros. workspace: see `workspace_bytes`; soft_cap: see
    `prefill_attention`.
    """
    call(
        "decode_attention", q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out,
        sm_scale, window, soft_cap, workspace, backend,
    )  # fmt: skip


def dense_rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    kv: Tensor,
    *,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "",
) -> None:
    """`rope_append` for a dense cache: q, k and v stay in qkv's dtype (`reference_dense`).

    Writes q [T, Hq, D] and rows `slots` of kv [2, pages, Hk, KV_PAGE, D]. A negative slot is -1 and
    stores nothing that is read: a backend may write the last place of the last page for it.
    """
    call(
        "dense_rope_append", qkv, positions, cos, sin, slots, q, kv, *(norms or (None, None)), eps,
        backend,
    )  # fmt: skip


def dense_prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    out: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    backend: str = "",
) -> None:
    """Causal attention of packed prompts or chunks over a dense cache, q and out [T, Hq, D].

    block_table [B, P] int32; query_lens, kv_lens [B]: known on the host, 1 <= query <= kv.
    """
    call(
        "dense_prefill_attention", q, kv, block_table, list(query_lens), list(kv_lens), out,
        sm_scale, window, backend,
    )  # fmt: skip


def dense_decode_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    *,
    sm_scale: float,
    window: int = 0,
    backend: str = "",
) -> None:
    """Attention of one token a sequence over a dense cache, q [B, Hq, D] -> out [B, Hq, D].

    kv_lens [B] int32. What length 0 (a padded place) gives is finite and means nothing.
    """
    call(
        "dense_decode_attention", q, kv, block_table, kv_lens, out, sm_scale, window, backend
    )  # fmt: skip


def prepare(weight: PackedWeight, *, backend: str = "") -> Weight:
    """The weight in the layout of the backend that will run its GEMM on its device.

    Raises FormatError where that layout cannot hold it.
    """
    op = f"gemm_{weight.fmt.scheme}"
    layouts: dict[str, Callable[[PackedWeight], Weight]] = {
        "triton": split_weight,
        "cutlass": fragment_weight,
        "cpu": block_weight,
    }
    layout = layouts.get(dispatch.choose(op, weight.words.device, backend))
    return weight if layout is None else layout(weight)


def workspace_bytes(
    device: torch.device,
    *,
    gemms: Sequence[tuple[int, int]] = (),
    max_tokens: int = 0,
    attention: tuple[int, int, int, int] | None = None,
    backend: str = "",
) -> int:
    """Bytes of a uint8 tensor that serves as workspace for these calls, one after the other.

    gemms: (N, K) of the weights, with up to max_tokens tokens; attention: (B, Hq, Hk, D) of decode
    steps. 0 where the backend needs none. Ops on different streams need workspaces of their own.
    """
    needed = [0]
    for op in ("gemm_w4a8", "gemm_w4afp8") if gemms else ():
        module = backend_for(op, device, backend)
        needed.append(module.workspace_bytes(device, gemms, max_tokens, None))
    if attention is not None:
        module = backend_for("decode_attention", device, backend)
        needed.append(module.workspace_bytes(device, (), max_tokens, attention))
    return max(needed)
