"""What rounding to a grid loses, on the CPU: binding of quant_cpu_group_errors."""

from __future__ import annotations

import ctypes
import functools
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from quant_kernels import cpu

LEVELS = 9
_GROUP_ERRORS = Struct("@PPPPPqqqq").pack  # QuantCpuGroupErrors


def group_errors(w: Tensor, h: Tensor, units: Tensor, levels: Tensor | None = None) -> Tensor:
    """sum over k of h[G, k] (w[n, G, k] - u nearest(w[n, G, k] / u))^2, u = units[n, G]: [N, G].

    The inner loop of a search for scales, in one pass where torch takes ten.

    Args:
        w: FP32 [N, G, g] on the CPU, as all others.
        h: FP32 [G, g], how much a column counts.
        units: FP32 [N, G], positive.
        levels: None: the nearest of the integers -8..7. FP32 [9], ascending from 0: the nearest of
            +-levels[i], i in 0..7, and -levels[8].

    Raises:
        ValueError: an argument is not as described.
        LibraryMissing: libquant_cpu.so was not built.
    """
    if w.dim() != 3:
        raise ValueError(f"group_errors: w must be [N, G, g], not {list(w.shape)}")
    rows, groups, size = w.shape
    shapes = {"w": w.shape, "h": (groups, size), "units": (rows, groups), "levels": (LEVELS,)}
    dense = []  # alive until the call has ended
    for (name, shape), x in zip(shapes.items(), (w, h, units, levels), strict=True):
        if x is None:
            continue
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.shape != shape:
            raise ValueError(
                f"group_errors: {name} must be FP32 {list(shape)} on the CPU, "
                f"not {x.dtype} {list(x.shape)} on {x.device}"
            )
        dense.append(x.contiguous())
    errors = torch.empty(rows, groups)
    pointers = [x.data_ptr() for x in dense] + [0] * (levels is None)
    arguments = _GROUP_ERRORS(
        *pointers, errors.data_ptr(), rows, groups * size, groups, torch.get_num_threads()
    )
    status = _function()(arguments)
    if status:
        cpu.fail("group_errors", status)
    return errors


@functools.cache
def _function() -> Any:
    function = cpu.library().quant_cpu_group_errors
    function.argtypes = [ctypes.c_char_p]
    return function
