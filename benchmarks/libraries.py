"""Whether the libraries are there that a benchmark is about, said before anything else is done."""

from __future__ import annotations

import sys

import torch

from benchmarks import humming_peer
from quant_kernels import cutlass_baseline, dispatch, native

ALLOW_MISSING = "go on where a Hopper GPU has no libquant_cuda.so to run"
MISSING = 2  # exit code


def unavailable(device: torch.device) -> dict[str, str]:
    """Why the Hopper kernels cannot run; empty where they can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return {"cutlass": "torch sees no GPU"}
    try:
        dispatch.choose(dispatch.CUTLASS_OPS[0], device, "cutlass")
    except dispatch.BackendUnavailable as error:
        return {"cutlass": str(error)}
    return {}


def require_cutlass(device: torch.device, allow_missing: bool = False) -> dict[str, str]:
    """`unavailable`, printed at once; on a Hopper GPU it ends the process with MISSING.

    A library that was not built, or is another version's, would otherwise show as rows that are
    not in a table.
    """
    reasons = unavailable(device)
    if not reasons:
        print(f"cutlass: {native.find('quant_cuda')}", flush=True)
        why = cutlass_baseline.why_unavailable()
        print(f"baseline: {why or native.find('quant_cutlass')}", flush=True)
        print(f"humming: {humming_peer.why_unavailable(device) or 'installed'}", flush=True)
    for backend, reason in reasons.items():
        print(f"{backend} unavailable: {reason}", flush=True)
    if reasons and device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(MISSING)
    if reasons and not allow_missing and dispatch.capability(device) == dispatch.HOPPER:
        print("stopped; --allow-missing goes on without", flush=True)
        sys.exit(MISSING)
    return reasons


def need_cutlass(device: torch.device) -> None:
    """End the process with MISSING, and say why, where the Hopper kernels cannot run."""
    for backend, reason in unavailable(device).items():
        print(f"{backend} unavailable: {reason}", flush=True)
        sys.exit(MISSING)
