"""The GEMMs of libquant_cpu.so (csrc/cpu/gemm.cpp), and the instruction set they use.

The instruction set is the best that the machine has, or the one that $QUANT_CPU_ISA or `set_isa`
names: amx, avx512_vnni, avx_vnni, avx2 or portable. INT8 results are the same bits with all.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor

from quant_kernels.cpu import isa, isas, set_isa
from quant_kernels.cpu_activation import TYPES, quantize_activation
from quant_kernels.cpu_calls import invoke
from quant_kernels.packing import BlockedWeight

__all__ = ["gemm", "isa", "isas", "set_isa"]

NUMERICS = {"int8": 0, "lut": 1, "exact": 2}  # QuantCpuNumerics
_GEMM = Struct("@PqPqPPPqqqqqPqqPqPqqqq").pack  # QuantCpuGemm


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
    fmt = weight.fmt
    m, k = x_codes.shape
    invoke(
        "gemm",
        _GEMM(
            x_codes.data_ptr(), x_codes.stride(0), x_scale.data_ptr(), x_scale.stride(0),
            weight.codes.data_ptr(), weight.t.data_ptr(), weight.c.data_ptr(),
            m, weight.c.shape[0], k, fmt.group_size, NUMERICS[fmt.numerics],
            out.data_ptr(), out.stride(0), TYPES[out.dtype],
            *((0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])),
            *((0, 0, 0) if residual is None else
              (residual.data_ptr(), residual.stride(0), TYPES[residual.dtype])),
            silu_mul, torch.get_num_threads(),
        ),
        lambda: f"gemm of x_codes [{m}, {k}] and a {fmt.label} weight {list(weight.shape)}",
    )  # fmt: skip
    if codes is not None and scale is not None:
        quantize_activation(out, codes, scale)
