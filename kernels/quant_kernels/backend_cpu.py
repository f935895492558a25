"""Backend `cpu`: the ops as `ops.py` calls them, in C++ (libquant_cpu.so)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels.cpu_activation import (
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)
from quant_kernels.cpu_attention import (
    decode_attention,
    dense_decode_attention,
    dense_prefill_attention,
    dense_rope_append,
    prefill_attention,
    rope_append,
)
from quant_kernels.cpu_gemm import gemm
from quant_kernels.cpu_linear import linear
from quant_kernels.packing import BlockedWeight

NAME = "cpu"
WEIGHT = BlockedWeight

__all__ = [
    "NAME",
    "WEIGHT",
    "decode_attention",
    "dense_decode_attention",
    "dense_prefill_attention",
    "dense_rope_append",
    "gemm",
    "linear",
    "prefill_attention",
    "quantize_activation",
    "rms_norm_quantize",
    "rope_append",
    "silu_mul_quantize",
    "workspace_bytes",
]


def workspace_bytes(
    device: torch.device,
    gemms: Sequence[tuple[int, int]],
    max_tokens: int,
    attention: tuple[int, int, int, int] | None,
) -> int:
    """None is needed: the library keeps a thread's intermediate results."""
    return 0
