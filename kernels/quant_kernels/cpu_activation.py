"""Activations on the CPU: bindings of quant_cpu_quantize_activation and its two relatives.

Arguments travel as one C struct (csrc/include/quant_cpu.h), packed by `struct`: ctypes takes longer
to convert a dozen arguments than a decode step's activation takes to quantize.
"""

from __future__ import annotations

import ctypes
import functools
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from quant_kernels import cpu

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QuantCpuType
CODE_TYPES = {torch.float8_e4m3fn: 0, torch.int8: 1}  # QuantCpuCodes
_TOKENS = Struct("@PqqqqPqqPqq").pack  # QuantCpuTokens


def quantize_activation(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.quantize_activation`."""
    status = _function("quantize_activation")(_tokens(x, codes, scale))
    if status:
        cpu.fail("quantize_activation", status)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, codes: Tensor, scale: Tensor, residual: Tensor | None
) -> None:
    """`ops.rms_norm_quantize`."""
    stream = (None, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    status = _function("rms_norm_quantize")(
        _tokens(x, codes, scale), weight.data_ptr(), TYPES[weight.dtype], eps, *stream
    )
    if status:
        cpu.fail("rms_norm_quantize", status)


def silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.silu_mul_quantize`."""
    status = _function("silu_mul_quantize")(_tokens(gate_up, codes, scale))
    if status:
        cpu.fail("silu_mul_quantize", status)


def _tokens(x: Tensor, codes: Tensor, scale: Tensor) -> bytes:
    rows, columns = codes.shape
    return _TOKENS(
        x.data_ptr(), x.stride(0), TYPES[x.dtype], rows, columns,
        codes.data_ptr(), codes.stride(0), CODE_TYPES[codes.dtype],
        scale.data_ptr(), scale.stride(0), torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def _function(op: str) -> Any:
    function = cpu.library()[f"quant_cpu_{op}"]
    function.argtypes = [ctypes.c_char_p]
    if op == "rms_norm_quantize":
        function.argtypes += [
            ctypes.c_void_p,  # weight
            ctypes.c_int64,  # its QuantCpuType
            ctypes.c_float,  # eps
            ctypes.c_void_p,  # residual
            ctypes.c_int64,  # elements between its rows
        ]
    return function
