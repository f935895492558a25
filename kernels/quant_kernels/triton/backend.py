"""Backend `triton`: the ops as `ops.py` calls them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels.packing import SplitWeight
from quant_kernels.triton.activation import (
    quantize_activation,
    rms_norm_quantize,
    silu_mul_quantize,
)
from quant_kernels.triton.decode_attention import decode_attention, decode_workspace_bytes
from quant_kernels.triton.gemm import gemm, gemm_workspace_bytes
from quant_kernels.triton.kv_append import rope_append
from quant_kernels.triton.prefill_attention import prefill_attention

NAME = "triton"
WEIGHT = SplitWeight

__all__ = [
    "NAME",
    "WEIGHT",
    "decode_attention",
    "gemm",
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
    """As `ops.workspace_bytes`: what the largest of the calls needs."""
    needed = [gemm_workspace_bytes(device, max_tokens, n, k) for n, k in gemms]
    if attention is not None:
        needed.append(decode_workspace_bytes(device, *attention))
    return max(needed, default=0)
