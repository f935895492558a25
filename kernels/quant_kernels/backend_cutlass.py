"""Backend `cutlass`: GEMMs and attention as `ops.py` calls them, for Hopper (libquant_cuda.so)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels import cuda_gemm
from quant_kernels.cuda_attention import (
    decode_attention,
    decode_workspace_bytes,
    prefill_attention,
)
from quant_kernels.cuda_gemm import gemm
from quant_kernels.fragments import FragmentWeight

NAME = "cutlass"
WEIGHT = FragmentWeight

__all__ = [
    "NAME",
    "WEIGHT",
    "decode_attention",
    "gemm",
    "prefill_attention",
    "workspace_bytes",
]


def workspace_bytes(
    device: torch.device,
    gemms: Sequence[tuple[int, int]],
    max_tokens: int,
    attention: tuple[int, int, int, int] | None,
) -> int:
    """As `ops.workspace_bytes`: what the largest of the calls needs."""
    needed = cuda_gemm.workspace_bytes(device, gemms, max_tokens)
    if attention is not None:
        needed = max(needed, decode_workspace_bytes(device, *attention))
    return needed
