"""Activations on the CPU: bindings of quant_cpu_quantize_activation and its two relatives."""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from quant_kernels.cpu_calls import invoke

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QuantCpuType
CODE_TYPES = {torch.float8_e4m3fn: 0, torch.int8: 1}  # QuantCpuCodes
_TOKENS = Struct("@PqqqqPqqPqq").pack  # QuantCpuTokens
_NORM = Struct("@PqdPq").pack  # what QuantCpuNorm has behind it


def quantize_activation(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.quantize_activation`."""
    invoke("quantize_activation", _tokens(x, codes, scale))


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, codes: Tensor, scale: Tensor, residual: Tensor | None
) -> None:
    """`ops.rms_norm_quantize`."""
    stream = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    norm = _NORM(weight.data_ptr(), TYPES[weight.dtype], eps, *stream)
    invoke("rms_norm_quantize", _tokens(x, codes, scale) + norm)


def silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor) -> None:
    """`ops.silu_mul_quantize`."""
    invoke("silu_mul_quantize", _tokens(gate_up, codes, scale))


def _tokens(x: Tensor, codes: Tensor, scale: Tensor) -> bytes:
    rows, columns = codes.shape
    return _TOKENS(
        x.data_ptr(), x.stride(0), TYPES[x.dtype], rows, columns,
        codes.data_ptr(), codes.stride(0), CODE_TYPES[codes.dtype],
        scale.data_ptr(), scale.stride(0), torch.get_num_threads(),
    )  # fmt: skip
