"""Which backend runs an op: a table, printable, and overridable. Nothing falls back in silence.

The first rule that fits (op, device, capability) names the backend; a rule for `cpu` fits where
libquant_cpu.so is built, and `quantize doctor` prints whether it is. It is overridden, in this
order, by the op's argument `backend` and by $FOURBYEIGHT_BACKEND: one backend for all ops (those
in 16 bits only where it has them), or `op=backend` pairs:

    FOURBYEIGHT_BACKEND=reference
    FOURBYEIGHT_BACKEND=gemm_w4a8=cutlass,gemm_w4afp8=cutlass

`cutlass`, CUDA C++ for Hopper, runs where it is asked for: no rule names it before it has been
measured on one. A backend that was asked for and cannot run here is an error that says why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from quant_kernels import cpu, cuda

OPS = (
    "quantize_activation",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "gemm_w4afp8",
    "gemm_w4a8",
    "linear",
    "rope_append",
    "prefill_attention",
    "decode_attention",
    "dense_rope_append",
    "dense_prefill_attention",
    "dense_decode_attention",
)
BACKENDS = ("cpu", "triton", "cutlass", "reference")
VARIABLE = "FOURBYEIGHT_BACKEND"
CUTLASS_OPS = ("gemm_w4afp8", "gemm_w4a8", "prefill_attention", "decode_attention")
# Ops in 16 bits: on a GPU they are torch's, and nothing of ours stands beside it.
DENSE_OPS = ("linear", "dense_rope_append", "dense_prefill_attention", "dense_decode_attention")
NO_DENSE_OPS = ("triton", "cutlass")
HOPPER = (9, 0)
FP8_CAPABILITY = (8, 9)  # the first with FP8 tensor cores
TRITON_CAPABILITY = (8, 0)


class BackendUnavailable(RuntimeError):
    """The backend that a call names, or that the table gives, cannot run it here."""


@dataclass(frozen=True)
class Rule:
    """ops run by backend on a device ("cuda", "cpu") of at least this capability."""

    ops: tuple[str, ...]
    device: str
    capability: tuple[int, int] | None
    backend: str
    why: str


_INT8_MMA = ("gemm_w4a8",)
_FP8_MMA = ("gemm_w4afp8", "prefill_attention")
_FP16_MMA = ("decode_attention",)
_NO_MMA = ("quantize_activation", "rms_norm_quantize", "silu_mul_quantize", "rope_append")
RULES = (
    Rule(_NO_MMA, "cuda", TRITON_CAPABILITY, "triton", "one pass"),
    Rule(_INT8_MMA, "cuda", TRITON_CAPABILITY, "triton", "INT8 tensor cores"),
    Rule(_FP8_MMA, "cuda", FP8_CAPABILITY, "triton", "FP8 tensor cores"),
    Rule(_FP8_MMA, "cuda", TRITON_CAPABILITY, "triton", "FP16 tensor cores: FP8 codes are exact"),
    Rule(_FP16_MMA, "cuda", TRITON_CAPABILITY, "triton", "FP16 tensor cores: codes are exact"),
    Rule(DENSE_OPS, "cuda", TRITON_CAPABILITY, "reference", "torch: cuBLAS, and its attention"),
    Rule(OPS, "cpu", None, "cpu", "C++ for the machine's vector instructions"),
    Rule(OPS, "cpu", None, "reference", "plain torch, where libquant_cpu.so is not built"),
)


def choose(op: str, device: torch.device, asked: str = "") -> str:
    """The backend that runs `op` on tensors of `device`; asked: the call's own wish, or "".

    Raises BackendUnavailable where that backend cannot, and ValueError for an unknown name.
    """
    backend = asked or _overrides(os.environ.get(VARIABLE, "")).get(op) or by_table(op, device)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    reason = _why_not(op, backend, device)
    if reason is not None:
        raise BackendUnavailable(f"{op} on {device}: backend {backend!r} cannot run: {reason}")
    return backend


def by_table(op: str, device: torch.device) -> str:
    """The backend of the first rule that fits; BackendUnavailable where none does."""
    found = capability(device)
    backend = _first_rule(op, device.type, found, device.type == "cpu" and cpu.usable())
    if backend is not None:
        return backend
    raise BackendUnavailable(
        f"{op}: no backend runs on {device} (sm_{found[0]}{found[1]}); Triton's kernels need sm_80 "
        f"or newer. Pass backend='reference' (slow) or move the model to the CPU"
    )


@functools.cache
def _first_rule(op: str, device: str, found: tuple[int, int], has_cpu_library: bool) -> str | None:
    for rule in RULES:
        fits = op in rule.ops and rule.device == device and (rule.capability or (0, 0)) <= found
        if fits and (rule.backend != "cpu" or has_cpu_library):
            return rule.backend
    return None


def table() -> list[tuple[str, str, str, str]]:
    """(op, device, backend, why) of every op under every rule that names it, for people."""
    rows = []
    for op in OPS:
        for rule in RULES:
            if op in rule.ops:
                least = rule.capability
                device = rule.device if least is None else f"sm_{least[0]}{least[1]} and newer"
                rows.append((op, device, rule.backend, rule.why))
    return rows


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a GPU; (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_triton(device: str = "cuda", found: tuple[int, int] = FP8_CAPABILITY) -> str | None:
    """Why Triton's kernels cannot run on a device of this type; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fourbyeight[gpu]'"
    if device == "cpu" and not interpreted():
        return "Triton needs a GPU (or TRITON_INTERPRET=1, its interpreter, to look at numbers)"
    if device == "cuda" and found < TRITON_CAPABILITY:
        return f"this GPU is sm_{found[0]}{found[1]}, and the kernels need sm_80 or newer"
    return None


def _why_not(op: str, backend: str, device: torch.device) -> str | None:
    if op in DENSE_OPS and backend in NO_DENSE_OPS:
        return "it has none; on a GPU it is torch's, backend 'reference'"
    if backend == "cutlass":
        return _why_no_cutlass(op, device)
    if backend == "cpu":
        if device.type != "cpu":
            return "its kernels read the memory of the CPU"
        return cpu.why_unavailable()
    if backend != "triton":
        return None
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return (
            f"kernels start on the current device, cuda:{torch.cuda.current_device()}; call it "
            f"under torch.cuda.device({str(device)!r})"
        )
    return why_no_triton(device.type, capability(device))


def _why_no_cutlass(op: str, device: torch.device) -> str | None:
    if op not in CUTLASS_OPS:
        return f"it has {', '.join(CUTLASS_OPS)}"
    if device.type != "cuda":
        return "its kernels run on a GPU"
    if (found := capability(device)) != HOPPER:
        return f"its kernels are for Hopper, sm_90, and this GPU is sm_{found[0]}{found[1]}"
    return cuda.why_unavailable()


@functools.cache
def _overrides(text: str) -> dict[str, str]:
    """$FOURBYEIGHT_BACKEND as {op: backend}; ValueError names what is wrong in it."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, given, backend = part.rpartition("=")
        if (given and op not in OPS) or backend not in BACKENDS:
            raise ValueError(
                f"${VARIABLE}={text!r}: {part!r} is neither a backend ({', '.join(BACKENDS)}) nor "
                f"op=backend with one of {', '.join(OPS)}"
            )
        all_ops = (op for op in OPS if op not in DENSE_OPS or backend not in NO_DENSE_OPS)
        found.update({op: backend} if given else dict.fromkeys(all_ops, backend))
    return found
