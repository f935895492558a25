"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from quant import __version__
from quant.schemes import SCHEMES
from quant_kernels import cpu, cuda, dispatch

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "gguf",
    "datasets",
    "triton",
)


@dataclass(frozen=True)
class Check:
    """One thing that may or may not work here. detail: what was found, or what is missing."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Kernel:
    """A row of the dispatch table: the backend of an op on a kind of device.

    missing: why it cannot run here; None where it can. how: what the backend does there.
    """

    op: str
    device: str
    backend: str
    missing: str | None
    how: str


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str]
    libraries: tuple[Check, ...]
    schemes: tuple[Check, ...]
    ops: tuple[Kernel, ...]


def diagnose() -> Diagnosis:
    """Look at the interpreter, packages, shared libraries and GPUs. Never raises over a lack."""
    versions = {
        "fourbyeight": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    libraries = (
        _cpu_library(),
        _cuda_library(),
        _torch_gpu(),
    )
    no_library = cpu.why_unavailable() or _why_no_isa()
    no_gpu = dispatch.why_no_triton() or _why_no_gpu()
    backends = {
        "reference": None,
        "cpu": no_library,
        "triton": no_gpu,
        "cutlass": _why_no_gpu() or cuda.why_unavailable(),
    }
    schemes = tuple(
        Check(f"{scheme} on {backend}", reason is None, reason or meaning)
        for scheme, meaning in SCHEMES.items()
        for backend, reason in backends.items()
    )
    lacks = {"triton": no_gpu, "cpu": no_library}
    ops = tuple(
        Kernel(op, device, backend, lacks.get(backend), why)
        for op, device, backend, why in dispatch.table()
    )
    return Diagnosis(versions, libraries, schemes, ops)


def _cpu_library() -> Check:
    reason = cpu.why_unavailable() or _why_no_isa()
    if reason is not None:
        return Check("CPU library", False, reason)
    import torch

    threads = torch.get_num_threads()
    found = f"loaded; uses {cpu.isa()} (of {', '.join(cpu.isas())}) on {threads} threads"
    return Check("CPU library", True, found)


def _why_no_isa() -> str | None:
    """What is wrong with $QUANT_CPU_ISA, for a library that loads; None where nothing is."""
    if cpu.isa():
        return None
    named = os.environ.get("QUANT_CPU_ISA")
    return f"QUANT_CPU_ISA={named}: this machine lacks it, and has {', '.join(cpu.isas())}"


def _cuda_library() -> Check:
    reason = cuda.why_unavailable()
    if reason is not None:
        return Check("CUDA library", False, reason)
    found = ", ".join(f"GPU {i}: sm_{major}{minor}" for i, (major, minor) in cuda.devices())
    return Check("CUDA library", True, f"loaded; {found}")


def _torch_gpu() -> Check:
    import torch

    reason = _why_no_gpu()
    return Check("torch CUDA", reason is None, reason or torch.cuda.get_device_name())


def _why_no_gpu() -> str | None:
    """Why torch cannot compute on a GPU here; None where it can."""
    import torch

    if torch.cuda.is_available():
        return None
    reason = "sees no GPU" if torch.version.cuda else "is a CPU build"
    return f"torch {torch.__version__} {reason}"
