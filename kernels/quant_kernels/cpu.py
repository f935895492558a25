"""CPU backend: Python bindings of libquant_cpu.so (csrc/include/quant_cpu.h)."""

import contextlib
import ctypes
import functools
import math
import mmap
import os
from typing import NoReturn

import torch
from torch import Tensor

from quant_kernels import native

ABI = 6
ISA_UNAVAILABLE = 8  # QuantCpuStatus
CODES_PER_WORD = 8
HUGE_PAGE = 2**21


def available() -> bool:
    """Whether the library is there and can be used."""
    return why_unavailable() is None


@functools.cache
def usable() -> bool:
    """`available`, asked once; LibraryMissing where $QUANT_LIB_DIR names a build without it."""
    reason = why_unavailable()
    if reason is not None and os.environ.get("QUANT_LIB_DIR"):
        raise native.LibraryMissing(reason)
    return reason is None


def why_unavailable() -> str | None:
    """Why the library cannot be used and what to do about it; None where it can."""
    try:
        _library()
    except native.LibraryMissing as error:
        return str(error)
    return None


def empty_bytes(*shape: int) -> Tensor:
    """An uninitialized uint8 tensor that lies in huge pages, where the system has them.

    A weight is read from end to end: with pages of 4 KiB the search for the next page, and the
    hardware's prefetchers, which stop at its border, cost a third of the memory's bandwidth.
    """
    count = math.prod(shape)
    if count < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8)
    memory = mmap.mmap(-1, count + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + count].view(shape)


def in_huge_pages(x: Tensor) -> Tensor:
    """x, copied to where `empty_bytes` puts it if it is large and on the CPU."""
    if x.device.type != "cpu" or x.nbytes < HUGE_PAGE:
        return x
    return empty_bytes(x.nbytes).view(x.dtype).view(x.shape).copy_(x)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """INT4 codes out of the compressed-tensors "pack-quantized" layout.

        codes[n, k] = ((packed[n, k // 8] >> 4 (k mod 8)) & 15) - 8        in -8..7

    Args:
        packed: int32 [N, W] on the CPU, contiguous.
        columns: number of codes in a row, 0 <= columns <= 8 W; nibbles beyond it are padding.

    Returns:
        int8 [N, columns], contiguous.

    Raises:
        ValueError: `packed` or `columns` is not as described.
        LibraryMissing: libquant_cpu.so was not built.
    """
    found = f"{packed.dtype} {list(packed.shape)} on {packed.device}"
    if packed.device.type != "cpu" or packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(f"unpack_int4: packed must be int32 [N, W] on the CPU, not {found}")
    if not packed.is_contiguous():
        raise ValueError(
            f"unpack_int4: packed must be contiguous, but {found} has strides {packed.stride()}"
        )
    rows, words = packed.shape
    if not 0 <= columns <= CODES_PER_WORD * words:
        raise ValueError(
            f"unpack_int4: columns = {columns} is outside 0..{CODES_PER_WORD * words}, "
            f"what packed {list(packed.shape)} holds in a row"
        )
    library = _library()
    codes = torch.empty(rows, columns, dtype=torch.int8)
    status = library.quant_cpu_unpack_int4(
        packed.data_ptr(), rows, words, columns, codes.data_ptr()
    )
    if status:
        reason = library.quant_cpu_error_string(status).decode()
        raise RuntimeError(f"unpack_int4: {reason} (packed {found}, columns {columns})")
    return codes


def e4m3_to_float(codes: Tensor) -> Tensor:
    """The values of E4M3 codes: float8_e4m3fn [...] on the CPU, contiguous -> FP32 of that shape.

    Exact, as `codes.float()` is, and several times faster than it.

    Raises:
        ValueError: `codes` is not as described.
        LibraryMissing: libquant_cpu.so was not built.
    """
    found = f"{codes.dtype} {list(codes.shape)} on {codes.device}"
    if codes.device.type != "cpu" or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"e4m3_to_float: codes must be float8_e4m3fn on the CPU, not {found}")
    if not codes.is_contiguous():
        raise ValueError(
            f"e4m3_to_float: codes must be contiguous, but {found} has strides {codes.stride()}"
        )
    library = _library()
    values = torch.empty(codes.shape, dtype=torch.float32)
    status = library.quant_cpu_e4m3_to_float(codes.data_ptr(), codes.numel(), values.data_ptr())
    if status:
        reason = library.quant_cpu_error_string(status).decode()
        raise RuntimeError(f"e4m3_to_float: {reason} (codes {found})")
    return values


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine runs, best first."""
    return tuple(library().quant_cpu_isas().decode().split())


def isa() -> str:
    """The instruction set in use; empty where $QUANT_CPU_ISA names one that is not in `isas`."""
    return str(library().quant_cpu_isa().decode())


def set_isa(name: str | None) -> None:
    """Use this instruction set in the whole process; None: $QUANT_CPU_ISA's or the best again."""
    if library().quant_cpu_set_isa(None if name is None else name.encode()):
        raise ValueError(
            f"instruction set {name!r} is unknown, or this machine lacks it; it has: "
            f"{', '.join(isas())}"
        )


def fail(what: str, status: int) -> NoReturn:
    """Raise RuntimeError with a status in words."""
    reason = library().quant_cpu_error_string(status).decode()
    if status == ISA_UNAVAILABLE:
        reason += f"; this machine has {', '.join(isas())} (argument of set_isa, or $QUANT_CPU_ISA)"
    raise RuntimeError(f"{what}: {reason}")


def library() -> ctypes.CDLL:
    """libquant_cpu.so; LibraryMissing where it was not built."""
    return _library()


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load("quant_cpu", ABI)
    library.quant_cpu_error_string.argtypes = [ctypes.c_int]
    library.quant_cpu_error_string.restype = ctypes.c_char_p
    library.quant_cpu_isa.restype = ctypes.c_char_p
    library.quant_cpu_isas.restype = ctypes.c_char_p
    library.quant_cpu_set_isa.argtypes = [ctypes.c_char_p]
    library.quant_cpu_unpack_int4.argtypes = [
        ctypes.c_void_p,  # packed
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # words_per_row
        ctypes.c_int64,  # columns
        ctypes.c_void_p,  # codes
    ]
    library.quant_cpu_e4m3_to_float.argtypes = [
        ctypes.c_void_p,  # codes
        ctypes.c_int64,  # count
        ctypes.c_void_p,  # values
    ]
    return library
