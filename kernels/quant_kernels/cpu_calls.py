"""Calls of libquant_cpu.so's ops, and recordings of them.

Arguments travel as one C struct (csrc/include/quant_cpu.h), packed by `struct`: ctypes takes longer
to convert a dozen arguments than a decode step's activation takes to quantize. What was called is
then a few bytes, so that a sequence of calls is as easily made again by a single one: that of the
300 ops of a small model's decode step costs less than one of them costs from Python.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from quant_kernels import cpu

# In the order of QuantCpuOp.
OPS = (
    "quantize_activation",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "gemm",
    "rope_append",
    "attention",
    "linear",
)
_Calls = list[tuple[str, bytes]]


class _State(threading.local):
    recording: _Calls | None = None


_state = _State()


def invoke(op: str, arguments: bytes, describe: Callable[[], str] | None = None) -> None:
    """Run one of OPS on its packed struct; RuntimeError, about `describe()`, where it fails."""
    status = _function(op)(arguments)
    if status:
        cpu.fail(op if describe is None else describe(), status)
    if _state.recording is not None:
        _state.recording.append((op, arguments))


@contextmanager
def record() -> Iterator[_Calls]:
    """The calls that this thread makes meanwhile, which are also carried out."""
    before = _state.recording
    calls: _Calls = []
    _state.recording = calls
    try:
        yield calls
    finally:
        _state.recording = before


class Replay:
    """Calls to make again, on the same memory.

    holding: what keeps that memory alive as long as this; otherwise the caller does.
    """

    def __init__(self, calls: Sequence[tuple[str, bytes]], holding: object = None) -> None:
        self._holding = holding
        self._arguments = [ctypes.create_string_buffer(data, len(data)) for _, data in calls]
        self._calls = (_Call * len(calls))()
        for call, (op, _), data in zip(self._calls, calls, self._arguments, strict=True):
            call.op, call.arguments = OPS.index(op), ctypes.addressof(data)

    def __call__(self) -> None:
        """Make them; RuntimeError where one fails."""
        status = _function("replay")(self._calls, len(self._calls))
        if status:
            cpu.fail("replay", status)


class _Call(ctypes.Structure):
    _fields_ = (("op", ctypes.c_int64), ("arguments", ctypes.c_void_p))


@functools.cache
def _function(op: str) -> Any:
    function = cpu.library()[f"quant_cpu_{op}"]
    function.argtypes = [ctypes.c_char_p]
    if op == "replay":
        function.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64]
    return function
