"""Backend `reference`: the ops by their definitions, in plain torch on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant_kernels import reference, reference_attention, reference_dense
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import PackedWeight

NAME = "reference"
WEIGHT = PackedWeight


def quantize_activation(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    kind = "fp8" if codes.dtype == torch.float8_e4m3fn else "int8"
    found = reference.quantize_activation(x, kind)
    codes.copy_(found[0])
    scale.copy_(found[1])


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, codes: Tensor, scale: Tensor, residual: Tensor | None
) -> None:
    if residual is not None:
        x = residual.copy_(x.float() + residual.float())
    quantize_activation(reference.rms_norm(x, weight, eps), codes, scale)


def silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor) -> None:
    quantize_activation(reference.silu_mul(gate_up), codes, scale)


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: PackedWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    y = reference.gemm(x_codes, x_scale, weight, bias, torch.float32, residual)
    out.copy_(reference.silu_mul(y) if silu_mul else y)
    if codes is not None and scale is not None:
        quantize_activation(out, codes, scale)


def linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    reference.linear(x, weight, out)


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
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    symmetric: bool,
) -> None:
    rows = reference_attention.rope_quantize(
        qkv,
        positions,
        cos,
        sin,
        (q_codes.shape[1], kv_codes.shape[2]),
        KVFormat(symmetric=symmetric),
        norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
        eps=eps,
        key_transform=None if key_scale is None or key_shift is None else (key_scale, key_shift),
    )
    q_codes.copy_(rows.q_codes)
    q_scale.copy_(rows.q_scale)
    reference_attention.append_kv(rows.keys, rows.values, slots, kv_codes, kv_scales)


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
    sm_scale: float,
    window: int,
    soft_cap: float = 0.0,
    skip_threshold: float = 0.0,
) -> None:
    """skip_threshold: an approximation's, and this is the definition."""
    cache = (kv_codes, kv_scales, block_table, cu_seqlens, kv_lens)
    out.copy_(
        reference_attention.prefill_attention(
            q_codes, q_scale, *cache, sm_scale=sm_scale, window=window, soft_cap=soft_cap
        )
    )


def decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    workspace: Tensor | None,
    soft_cap: float = 0.0,
) -> None:
    cache = (kv_codes, kv_scales, block_table, kv_lens)
    out.copy_(
        reference_attention.decode_attention(
            q_codes, q_scale, *cache, sm_scale=sm_scale, window=window, soft_cap=soft_cap
        )
    )


def dense_rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    kv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    reference_dense.rope_append(qkv, positions, cos, sin, slots, q, kv, norms, eps)


def dense_prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    out.copy_(
        reference_dense.prefill_attention(q, kv, block_table, query_lens, kv_lens, sm_scale, window)
    )


def dense_decode_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
) -> None:
    out.copy_(reference_dense.decode_attention(q, kv, block_table, kv_lens, sm_scale, window))


def workspace_bytes(
    device: torch.device,
    gemms: Sequence[tuple[int, int]],
    max_tokens: int,
    attention: tuple[int, int, int, int] | None,
) -> int:
    """None is needed."""
    return 0
