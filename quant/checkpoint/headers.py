"""What a safetensors file says it holds, checked before anything is allocated or read.

    file = n (8 bytes, little-endian) | JSON of n bytes | data
    JSON = {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [a, b]}, ...}

with a and b counted from the start of the data. A file is taken only where its tensors cover its
data exactly: in range, each as long as its shape and dtype make it, side by side without overlaps
or holes, to the last byte. Then no offset in it can lead a reader astray.
"""

from __future__ import annotations

import math
import reprlib
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quant.checkpoint.source import parse_json
from quant.errors import RequestError

# Every type of the format, and the bits of an element.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# A tensor takes about 120 bytes of a header: room for 130,000 in one file, where the largest
# published models have 90,000 in all their files. (safetensors itself reads up to 100 MB.)
MAX_HEADER_BYTES = 16 << 20
MAX_DIMENSIONS = 64  # torch's own limit
MAX_NAME_CHARACTERS = 512

AGAIN = "download it again"
LENGTH = struct.Struct("<Q")
ENTRY = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's stored type in safetensors' terms, and the bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's tensors, in the order of their bytes, which follow each other from data_start.

    size and mtime_ns are the file's when it was read: with others, the header says nothing.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    data_start: int
    size: int
    mtime_ns: int


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file; reads nothing else of it.

    Raises RequestError that names the file, the tensor, and what is wrong.
    """
    try:
        return _read(path)
    except (ValueError, struct.error) as error:  # struct's where the file shrank meanwhile
        raise RequestError(f"{path} is not a readable safetensors file: {error}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path) -> Header:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    if found.st_size < LENGTH.size:
        raise ValueError(f"it has {found.st_size} bytes, fewer than its first field; " + AGAIN)
    with path.open("rb") as file:
        (length,) = LENGTH.unpack(file.read(LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"its header length is {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
            )
        data_start = LENGTH.size + length
        if data_start > found.st_size:
            raise ValueError(
                f"its header length is {length:,} bytes, but the file has only "
                f"{found.st_size:,}; {AGAIN}"
            )
        text = file.read(length)
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise ValueError(f"its header is not valid JSON: {error}") from None
    _check_metadata(entries.pop("__metadata__", {}))
    tensors = {name: _tensor(name, entry, data_start) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(tensors, data_start, found.st_size)
    return Header(path, tensors, data_start, found.st_size, found.st_mtime_ns)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise ValueError(f"__metadata__ is {reprlib.repr(metadata)}, not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ValueError(
                f"__metadata__ {reprlib.repr(key)} is {reprlib.repr(value)}, not a string"
            )


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked by itself; ValueError names the tensor and the field."""
    # Names go into messages and into other files' names for this tensor.
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise ValueError(
            f"the tensor name {reprlib.repr(name)} is longer than {MAX_NAME_CHARACTERS} characters "
            "or holds some that cannot be printed"
        )
    what = f"tensor {name}"
    if not isinstance(entry, dict) or set(entry) != ENTRY:
        keys = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(
            f"{what} is described by {reprlib.repr(keys)}, not by dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{what}: dtype {reprlib.repr(dtype)} is none of {', '.join(DTYPE_BITS)}")
    if not _is_counts(shape):
        raise ValueError(
            f"{what}: shape {reprlib.repr(shape)} is not a list of non-negative integers"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what}: shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS}")
    # Zeros aside, because frameworks multiply the other dimensions into strides.
    if math.prod(max(size, 1) for size in shape) >= 2**56:
        raise ValueError(f"{what}: shape {reprlib.repr(shape)} is too large for any machine")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{what}: data_offsets {reprlib.repr(offsets)} are not two integers 0 <= a <= b"
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    start, stop = offsets
    if bits != 8 * (stop - start):
        wanted = f"{bits // 8:,}" if bits % 8 == 0 else f"{bits / 8:,.1f}"
        raise ValueError(
            f"{what}: data_offsets span {stop - start:,} bytes, but shape {shape} of dtype {dtype} "
            f"takes {wanted}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)


def _is_counts(value: Any) -> bool:
    """Whether it is a list of integers that are not negative; true and false are not integers."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """ValueError where tensors, in the order of their bytes, do not cover the data exactly.

    In the order in which a single wrong offset is named rather than its neighbours: what lies
    outside of the file, then what lies on others, and only then what is not covered.
    """
    last = max(tensors, key=lambda name: tensors[name].stop, default="")
    end = tensors[last].stop if last else data_start
    if end > size:
        raise ValueError(
            f"tensor {last} ends {end - size:,} bytes after the end of the file; the file is "
            f"truncated or its header wrong: {AGAIN}"
        )
    pairs = list(pairwise(tensors.items()))
    for (before, one), (name, other) in pairs:
        if other.start < one.stop:
            raise ValueError(
                f"tensors {before} and {name} overlap: their data_offsets end at "
                f"{one.stop - data_start:,} and start at {other.start - data_start:,}"
            )
    first = next(iter(tensors), "")
    if first and tensors[first].start > data_start:
        raise ValueError(
            f"tensor {first}: data_offsets start at {tensors[first].start - data_start:,}, but "
            "nothing lies before it: bytes between belong to no tensor"
        )
    for (before, one), (name, other) in pairs:
        if other.start > one.stop:
            raise ValueError(
                f"tensor {name}: data_offsets start at {other.start - data_start:,}, but tensor "
                f"{before} before it ends at {one.stop - data_start:,}: bytes between belong to no "
                "tensor"
            )
    if end < size:
        raise ValueError(f"{size - end:,} trailing bytes belong to no tensor; {AGAIN}")
