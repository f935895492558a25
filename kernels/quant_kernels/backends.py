"""The modules of the backends, by the name that `dispatch.py` gives."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from quant_kernels import dispatch

_MODULES = {
    "reference": "quant_kernels.backend_reference",
    "cpu": "quant_kernels.backend_cpu",
    "triton": "quant_kernels.triton.backend",
    "cutlass": "quant_kernels.backend_cutlass",
}


def backend_for(op: str, device: torch.device, asked: str) -> ModuleType:
    """The module of the backend that `dispatch.choose` names."""
    return _module(dispatch.choose(op, device, asked))


@functools.cache
def _module(backend: str) -> ModuleType:
    # Triton's is imported where it runs: it may not be installed.
    return importlib.import_module(_MODULES[backend])
