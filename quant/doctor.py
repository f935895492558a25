"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from quant import __version__
from quant.schemes import SCHEMES
from quant_kernels import cpu, cuda

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "gguf", "datasets")


@dataclass(frozen=True)
class Check:
    """One thing that may or may not work here. detail: what was found, or what is missing."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str]
    libraries: tuple[Check, ...]
    schemes: tuple[Check, ...]


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
        _library("CPU library", cpu, "decodes INT4, E4M3"),
        _cuda_library(),
        _torch_gpu(),
    )
    schemes = tuple(
        Check(
            f"{scheme} on {backend}",
            backend == "reference",
            meaning if backend == "reference" else "this version has no kernels for this backend",
        )
        for scheme, meaning in SCHEMES.items()
        for backend in ("reference", "cpu", "triton", "cutlass")
    )
    return Diagnosis(versions, libraries, schemes)


def _library(name: str, module: Any, role: str) -> Check:
    reason = module.why_unavailable()
    return Check(name, reason is None, reason or f"loaded ({role})")


def _cuda_library() -> Check:
    reason = cuda.why_unavailable()
    if reason is not None:
        return Check("CUDA library", False, reason)
    found = ", ".join(f"GPU {i}: sm_{major}{minor}" for i, (major, minor) in cuda.devices())
    return Check("CUDA library", True, f"loaded; {found}")


def _torch_gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("torch CUDA", True, torch.cuda.get_device_name())
    built = torch.version.cuda
    reason = "sees no GPU" if built else "is a CPU build"
    return Check("torch CUDA", False, f"torch {torch.__version__} {reason}")
