"""Every instruction set that the CPU kernels are compiled for, and any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quant_kernels import cpu

ISAS = ("portable", "avx2", "avx512_vnni", "amx")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of one instruction set after the other; skipped where the CPU lacks it."""
    if request.param not in cpu.isas():
        pytest.skip(f"this machine has no {request.param}")
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(None)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets how many threads torch, and so the kernels, may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
