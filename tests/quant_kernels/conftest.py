"""Every instruction set that the CPU kernels are compiled for, any number of threads, and the CUDA
kernels on a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quant_kernels import cpu

CSRC = Path(__file__).parents[2] / "csrc"
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


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels' own source, compiled for the CPU (csrc/cuda/simulate)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the simulator needs a C++ compiler on x86-64")
    library = tmp_path_factory.mktemp("simulator") / "libquant_simulator.so"
    sources = sorted((CSRC / "cuda" / "simulate").glob("*.cpp"))
    command = [compiler, "-std=c++17", "-O1", "-w", "-DQUANT_SIMULATE", "-shared", "-fPIC"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}", *map(str, sources), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))
