"""The bytes of a safetensors file, for as long as it is the file that its header describes.

Files are read with `preadv` into memory of our own and never mapped: a mapped file that another
process truncates kills this one (SIGBUS) where a read reports it, and mapped pages count as
resident memory and as address space, against the limits that people set for a job.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from quant.checkpoint.headers import Header, TensorInfo
from quant.errors import RequestError, WorkFailed

# What can be read. F4 and F6 are not: torch has no tensors of their shapes.
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# The bits of the exponent, all of them ones in NaN and Inf and in nothing else.
EXPONENTS = {
    "BF16": (torch.int16, 0x7F80),
    "F16": (torch.int16, 0x7C00),
    "F32": (torch.int32, 0x7F800000),
}

# Small enough to stay in a core's cache between reading, hashing and looking for NaN: 1.3 GB/s of
# BF16 on one core of an AMD EPYC, of which SHA-256 alone does 1.7; 1.1 GB/s with 64 MiB.
INSPECT_BYTES = 1 << 20


@contextmanager
def opened(header: Header, name: str) -> Iterator[int]:
    """A descriptor of the file; WorkFailed, naming the tensor, where the file has changed.

    Opened anew for each tensor, so that a thousand shards hold no thousand descriptors. What was
    read counts only after the last check, at the end.
    """
    try:
        file = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise WorkFailed(f"{header.path}: tensor {name}: {error.strerror}") from error
    try:
        yield file
        after = os.fstat(file)
    finally:
        os.close(file)
    if (after.st_size, after.st_mtime_ns) != (header.size, header.mtime_ns):
        raise _changed(header, name)


def _changed(header: Header, name: str) -> WorkFailed:
    return WorkFailed(
        f"{header.path}: tensor {name}: the file was changed or truncated while it was being read; "
        "start again from a checkpoint that nothing writes to"
    )


def fill(file: int, header: Header, name: str, view: memoryview, start: int) -> None:
    """Read the bytes from start on into the whole view. One call gives at most 2 GB."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], start + done)
        except OSError as error:
            raise WorkFailed(f"{header.path}: tensor {name}: {error.strerror}") from error
        if count == 0:
            raise _changed(header, name)
        done += count


def read_tensor(header: Header, name: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """The bytes [start, stop) of a file as a tensor of this shape."""
    stored = header.tensors[name].dtype
    if stored not in TORCH_DTYPES:
        raise RequestError(f"{header.path}: tensor {name} has type {stored}, which is not read")
    memory = torch.empty(stop - start, dtype=torch.uint8)
    with opened(header, name) as file:
        fill(file, header, name, _view(memory), start)
    return memory.view(TORCH_DTYPES[stored]).view(shape)


def _view(memory: Tensor) -> memoryview:
    """The memory of a U8 tensor, to be read into."""
    return memoryview(cast(Any, memory.numpy()))


def inspect_file(header: Header, on_bytes: Callable[[int], None]) -> str:
    """The sha256 of a file; RequestError where a tensor in it is not finite."""
    digest = hashlib.sha256()
    buffer = torch.empty(INSPECT_BYTES, dtype=torch.uint8)
    masked = torch.empty_like(buffer)
    # The header and the tensors, which lie side by side, are the whole file.
    parts = [("(header)", TensorInfo("U8", (), 0, header.data_start)), *header.tensors.items()]
    for name, info in parts:
        bad = 0
        with opened(header, name) as file:
            for start in range(info.start, info.stop, INSPECT_BYTES):
                size = min(INSPECT_BYTES, info.stop - start)
                view = _view(buffer)[:size]
                fill(file, header, name, view, start)
                digest.update(view)
                bad += _count_non_finite(buffer[:size], masked[:size], info.dtype)
                on_bytes(size)
        if bad:
            raise RequestError(
                f"{header.path}: tensor {name} holds {bad:,} NaN or Inf values; the checkpoint is "
                "broken: download it again, or ask its publisher"
            )
    return digest.hexdigest()


def _count_non_finite(raw: Tensor, masked: Tensor, dtype: str) -> int:
    """NaN and Inf among the bytes, seen as values of that type; masked: as many bytes of scratch.

    On integers, because comparing floats of 16 bits goes through FP32 and is ten times slower.
    """
    if dtype not in EXPONENTS:
        return 0
    integers, exponent = EXPONENTS[dtype]
    exponents = torch.bitwise_and(raw.view(integers), exponent, out=masked.view(integers))
    if int(exponents.max()) != exponent:
        return 0
    return int((exponents == exponent).sum())
