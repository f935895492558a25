"""The GEMMs of libquant_cpu.so (csrc/cpu/gemm.cpp), and the instruction set they use.

The instruction set is the best that the machine has, or the one that $QUANT_CPU_ISA or `set_isa`
names: amx, avx512_vnni, avx_vnni, avx2 or portable. INT8 results are the same bits with all.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from quant_kernels import cpu, native
from quant_kernels.cpu import isa, isas, set_isa
from quant_kernels.cpu_activation import quantize_activation
from quant_kernels.packing import BlockedWeight

__all__ = ["gemm", "isa", "isas", "set_isa"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QuantCpuType
NUMERICS = {"int8": 0, "lut": 1, "exact": 2}  # QuantCpuNumerics


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: BlockedWeight,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    silu_mul: bool,
    workspace: Tensor | None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `ops.gemm`, on `torch.get_num_threads()` threads; needs no workspace."""
    library, fmt = _library(), weight.fmt
    m, k = x_codes.shape
    status = library.quant_cpu_gemm(
        x_codes.data_ptr(), x_codes.stride(0), x_scale.data_ptr(), x_scale.stride(0),
        weight.codes.data_ptr(), weight.t.data_ptr(), weight.c.data_ptr(),
        m, weight.c.shape[0], k, fmt.group_size, NUMERICS[fmt.numerics],
        out.data_ptr(), out.stride(0), TYPES[out.dtype],
        *((None, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
        *((None, 0, 0) if residual is None else
          (residual.data_ptr(), residual.stride(0), TYPES[residual.dtype])),
        silu_mul, torch.get_num_threads(),
    )  # fmt: skip
    if status:
        reason = library.quant_cpu_error_string(status).decode()
        raise RuntimeError(
            f"gemm of x_codes [{m}, {k}] and a {fmt.label} weight {list(weight.shape)}: {reason}; "
            f"this machine has {', '.join(isas())} (argument of set_isa, or $QUANT_CPU_ISA)"
        )
    if codes is not None and scale is not None:
        quantize_activation(out, codes, scale)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load("quant_cpu", cpu.ABI)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.quant_cpu_error_string.argtypes = [number]
    library.quant_cpu_error_string.restype = ctypes.c_char_p
    library.quant_cpu_gemm.argtypes = [
        pointer, size,  # x, its stride
        pointer, size,  # x_scale, its stride
        pointer, pointer, pointer,  # codes, t, c
        size, size, size,  # m, n, k
        size, number,  # group_size, numerics
        pointer, size, number,  # out, its stride and type
        pointer, number,  # bias, its type
        pointer, size, number,  # residual, its stride and type
        number, number,  # silu_mul, threads
    ]  # fmt: skip
    return library
