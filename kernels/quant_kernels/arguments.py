"""What ops take: tensors of a shape and type, and weights in any layout. Errors that say what."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_kernels.formats import WeightFormat
from quant_kernels.fragments import SCALE_DTYPES as FRAGMENT_SCALE_DTYPES
from quant_kernels.fragments import FragmentWeight, fragment_shapes
from quant_kernels.packing import (
    BLOCKED_SCALE_DTYPES,
    SCALE_DTYPES,
    BlockedWeight,
    PackedWeight,
    SplitWeight,
    blocked_shapes,
    span_of,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CODES = (torch.float8_e4m3fn, torch.int8)
Weight = PackedWeight | SplitWeight | BlockedWeight | FragmentWeight


class OpError(ValueError):
    """Arguments that an op does not take: which op and argument, what was found, what is wanted."""


def expect(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]
) -> None:
    """Shape, dtype and a contiguous last dimension, or OpError."""
    dense = x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1
    if x.shape != shape or x.dtype not in dtypes or not dense:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise OpError(
            f"{op}: {name} must be {kinds} {list(shape)} with its last dimension contiguous, got "
            f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} with strides {x.stride()}"
        )


def weight_of(
    op: str, codes: Tensor, t: Tensor, c: Tensor, fmt: WeightFormat, columns: int
) -> Weight:
    """The weight whose tensors these are: a layout is told by the dimensions of its codes.

    columns: of the activations, which say it where a layout pads K.
    """
    if codes.dim() not in (2, 3, 4, 5) or t.dim() < 2 or c.dim() != 1:
        raise OpError(
            f"{op}: codes {list(codes.shape)}, t {list(t.shape)} and c {list(c.shape)} are no "
            "weight in any layout; make one with ops.prepare"
        )
    if codes.dim() == 2:
        return PackedWeight(codes, t, fmt)
    if codes.dim() == 5:
        return FragmentWeight(codes, t, c, fmt, columns)
    return SplitWeight(codes, t, c, fmt) if codes.dim() == 3 else BlockedWeight(codes, t, c, fmt)


Part = tuple[str, tuple[int, ...], tuple[torch.dtype, ...]]  # name, shape, allowed types


@functools.lru_cache(maxsize=1024)
def _weight_parts(layout: str, rows: int, columns: int, fmt: WeightFormat) -> tuple[Part, ...]:
    """What the tensors of an [N, K] weight must be; FormatError where the format cannot hold it."""
    fmt.check(rows, columns)
    groups = fmt.groups(columns)
    if layout == SplitWeight.LAYOUT:
        half = span_of(columns, fmt) // 2
        return (
            ("codes", (columns // (2 * half), rows, half), (torch.uint8,)),
            ("t", (0 if fmt.per_channel else groups, rows), (SCALE_DTYPES[fmt.numerics],)),
            ("c", (rows,), (torch.float32,)),
        )
    if layout == BlockedWeight.LAYOUT:
        codes, scales = blocked_shapes(rows, columns, fmt)
        return (
            ("codes", codes, (torch.uint8,)),
            ("t", scales, (BLOCKED_SCALE_DTYPES[fmt.numerics],)),
            ("c", (rows,), (torch.float32,)),
        )
    if layout == FragmentWeight.LAYOUT:
        fragments, t_shape = fragment_shapes(rows, columns, fmt)
        return (
            ("codes", fragments, (torch.uint8, torch.int32)),
            ("t", t_shape, (FRAGMENT_SCALE_DTYPES[fmt.numerics],)),
            ("c", (rows,), (torch.float32,)),
        )
    return ("codes", (rows, columns // 8), (torch.int32,)), ("t", (rows, groups), FLOATS)


def check_weight(op: str, weight: Weight, rows: int, columns: int) -> None:
    """A weight's tensors belong together and are contiguous."""
    if isinstance(weight, PackedWeight):
        tensors: tuple[Tensor, ...] = (weight.words, weight.scales)
    else:
        tensors = (weight.codes, weight.t, weight.c)
    parts = _weight_parts(weight.LAYOUT, rows, columns, weight.fmt)
    if isinstance(weight, FragmentWeight):  # 16 bytes a thread, or four words
        name, shape, dtypes = parts[0]
        kind = int(weight.codes.dtype == torch.int32)
        parts = ((name, (*shape, (16, 4)[kind]), (dtypes[kind],)), *parts[1:])
    for (name, shape, dtypes), part in zip(parts, tensors, strict=True):
        expect(op, name, part, shape, dtypes)
        if not part.is_contiguous():
            raise OpError(f"{op}: {name} {list(part.shape)} must be contiguous")
