"""Backend `cutlass`: the GEMMs as `ops.py` calls them, for Hopper (libquant_cuda.so)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels import cuda_gemm
from quant_kernels.cuda_gemm import gemm
from quant_kernels.fragments import FragmentWeight

NAME = "cutlass"
WEIGHT = FragmentWeight

__all__ = ["NAME", "WEIGHT", "gemm", "workspace_bytes"]


def workspace_bytes(
    device: torch.device,
    gemms: Sequence[tuple[int, int]],
    max_tokens: int,
    attention: tuple[int, int, int, int] | None,
) -> int:
    """As `ops.workspace_bytes`: what the largest of the GEMMs needs."""
    return cuda_gemm.workspace_bytes(device, gemms, max_tokens)
