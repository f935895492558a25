"""Backend `cpu`: the ops that libquant_cpu.so has, as `ops.py` calls them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quant_kernels.cpu_gemm import gemm
from quant_kernels.packing import BlockedWeight

NAME = "cpu"
WEIGHT = BlockedWeight

__all__ = ["NAME", "WEIGHT", "gemm", "workspace_bytes"]


def workspace_bytes(
    device: torch.device,
    gemms: Sequence[tuple[int, int]],
    max_tokens: int,
    attention: tuple[int, int, int, int] | None,
) -> int:
    """None is needed: the library keeps a thread's intermediate results."""
    return 0
