"""Where and in which type things are computed, from the names that users type."""

from __future__ import annotations

import torch

from quant.errors import RequestError

DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def select_dtype(dtype: str) -> torch.dtype | None:
    """A torch dtype by name; None for "auto", which means: as stored."""
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def select_device(device: str) -> torch.device:
    """A torch device by name; "auto" is the first GPU, or the CPU where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise RequestError(
            f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {device!r}: torch {torch.__version__} sees no CUDA GPU here")
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    return found
