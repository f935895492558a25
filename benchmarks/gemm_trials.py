"""The GEMMs' trials: token counts around every tile's edge, rows that no tile divides, columns of
one span and more, all weight formats, bias, residual and SiLU, with and without codes of -8."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import (
    BACKENDS,
    DTYPES,
    ROUNDING,
    Call,
    Figures,
    Outputs,
    Trial,
    at_once,
    close,
    metric,
    name_of,
    normal,
    poison,
    same_bits,
)
from benchmarks.gemm import random_weight
from benchmarks.shapes import EDGE_COLUMNS, EDGE_ROWS, EDGE_TOKENS, MODELS
from quant_kernels import cuda_gemm, dispatch, ops, reference
from quant_kernels.cuda_tuning import Config
from quant_kernels.formats import CODE_MIN, GROUP_SIZES, WeightFormat, every_format
from quant_kernels.fragments import fragment_weight
from quant_kernels.ops import Weight
from quant_kernels.packing import PackedWeight, join_weight


@dataclass(frozen=True)
class GemmCase:
    """A GEMM [m, k] x [n, k].

    codes: silu(gate) * up quantized, too. least: the weight's smallest code. config: which kernel
    of backend cutlass, instead of the one that it would choose.
    """

    fmt: WeightFormat
    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    bias: bool = False
    residual: bool = False
    silu: bool = False
    codes: bool = False
    least: int = CODE_MIN
    config: Config | None = None

    @property
    def label(self) -> str:
        words = [f"[{self.m}, {self.k}] x [{self.n}, {self.k}] {self.fmt.label}"]
        words.append(f"to {name_of(self.dtype)}")
        words += [name for name in ("bias", "residual", "silu", "codes") if getattr(self, name)]
        words += [] if self.least == CODE_MIN else [f"codes from {self.least}"]
        if (c := self.config) is not None:
            words.append(f"tile {c.tile_tokens} cluster {c.cluster} workers {c.workers}")
            words.append("split" if c.split else "whole")
        return " ".join(words)

    @property
    def kind(self) -> str:
        """Which of `cuda_tuning.KINDS` multiplies it."""
        return cuda_gemm.kind_name(self.fmt, self.least == CODE_MIN)

    def trial(self, backends: tuple[str, ...] = BACKENDS) -> Trial:
        """Of these backends, as far as they take it."""
        if self.silu and self.n % 128:  # cutlass takes a gate of whole fragments of 64 rows
            backends = tuple(backend for backend in backends if backend != "cutlass")
        return Trial(
            f"gemm_{self.fmt.scheme}", self.label, functools.partial(gemm_call, self), backends
        )


def gemm_trials(scheme: str, small: bool) -> list[Trial]:
    """Whole linears of a model first, in which big tiles and split K run; then edges."""
    formats = [fmt for fmt in every_format() if fmt.scheme == scheme]
    if small:
        shapes: list[tuple[int, int, int]] = [(3, 40, 128), (17, 72, 192)]
        formats = [fmt for fmt in formats if fmt.group_size == 64]
    else:
        shapes = [
            (m, n, k)
            for m in EDGE_TOKENS
            for n, k in zip(EDGE_ROWS, _turned(EDGE_COLUMNS, m), strict=True)
        ]
    found = [] if small else _whole_linears(scheme) + _no_minus_eight(formats)
    for i, (m, n, k) in enumerate(shapes, start=2):
        fitting = [f for f in formats if f.per_channel or k % f.group_size == 0]
        for fmt in fitting if small else fitting[i % len(fitting) :: len(GROUP_SIZES)]:
            found.append(_varied(fmt, m, n, k, i).trial())
    return found


def _whole_linears(scheme: str) -> list[Trial]:
    fmt = WeightFormat(scheme, 128, "lut" if scheme == "w4afp8" else "int8")
    linears = [MODELS[0].linears[name] for name in ("down", "o")]
    cases = [
        _varied(fmt, m, n, k, i) for m in (16, 2048, 1, 128) for i, (n, k) in enumerate(linears)
    ]
    n, k = MODELS[0].linears["gate_up"]
    cases += [_varied(fmt, m, n, k, 0, silu=True) for m in (16, 1, 257)]
    make = functools.partial(_at_once, fmt, *MODELS[0].linears["o"])
    # Not captured: a graph of two streams that fails says nothing of the kernels in it.
    together = Trial(f"gemm_{scheme}", f"two streams at once {fmt.label}", make, captured=False)
    return [*(case.trial() for case in cases), together]


def _no_minus_eight(formats: Sequence[WeightFormat]) -> list[Trial]:
    """FP8 weights without a code of -8, for which backend cutlass has other kernels."""
    cases = [
        GemmCase(fmt, m, n, k, DTYPES[i % 3], bias=i % 2 == 1, least=CODE_MIN + 1)
        for i, (m, n, k) in enumerate(((16, 4096, 4096), (2048, 1024, 1024), (65, 264, 1408)))
        for fmt in formats
        if fmt.scheme == "w4afp8"
    ]
    return [case.trial(("cutlass",)) for case in cases]


def _varied(
    fmt: WeightFormat, m: int, n: int, k: int, variant: int, silu: bool = False
) -> GemmCase:
    """With what is optional by turns."""
    silu = silu or (n < 1024 and variant // 3 % 4 == 0)
    return GemmCase(
        fmt, m, n, k, DTYPES[variant % 3],
        bias=variant % 2 == 1,
        residual=not silu and variant // 2 % 2 == 1,
        silu=silu,
        codes=silu and variant // 12 % 2 == 0,
    )  # fmt: skip


def gemm_call(case: GemmCase, device: torch.device) -> Call:
    """The case on random arguments."""
    fmt, m, n, k = case.fmt, case.m, case.n, case.k
    generator = torch.Generator(device).manual_seed(m * 31 + n * 7 + k)
    packed = join_weight(random_weight(n, k, fmt, device, m + n, case.least))
    # Gates where SiLU bends, and products that FP16 holds.
    x = normal(generator, (m, k), 0.25 if case.silu else 2.0)
    codes, scale = reference.quantize_activation(x, fmt.activation)
    bias = normal(generator, (n,), 1.0) if case.bias else None
    residual = normal(generator, (m, n), 1.0).bfloat16() if case.residual else None
    columns = n // 2 if case.silu else n

    @functools.cache
    def prepared(backend: str) -> tuple[Weight, Tensor]:
        if case.config is not None and backend == "cutlass":
            size = cuda_gemm.needed_bytes(case.config) + cuda_gemm.maxima_bytes(m, n) * case.codes
            return fragment_weight(packed), poison((size,), torch.uint8, device)
        size = ops.workspace_bytes(device, gemms=[(n, k)], max_tokens=m, backend=backend)
        return ops.prepare(packed, backend=backend), poison((size,), torch.uint8, device)

    def run(backend: str, out: Outputs) -> None:
        weight, workspace = prepared(backend)
        if case.config is not None and backend == "cutlass":
            cuda_gemm.run(
                case.config, codes, scale, weight, out["out"], bias, residual, case.silu,
                workspace, out.get("codes"), out.get("scale"),
            )  # fmt: skip
            return
        ops.gemm(
            codes, scale, weight, out["out"], bias=bias, residual=residual, silu_mul=case.silu,
            codes=out.get("codes"), scale=out.get("scale"), backend=backend, workspace=workspace,
        )  # fmt: skip

    def fresh() -> Outputs:
        made = {"out": poison((m, columns), case.dtype, device)}
        if case.codes:
            made["codes"] = poison((m, columns), codes.dtype, device)
            made["scale"] = poison((m, 1), torch.float32, device)
        return made

    def judge(_: Outputs, found: Outputs) -> Figures:
        y, error = _exact(case, packed, codes, scale, bias, residual)
        # FP16 ends at 2^-24; what is in error may be rounded further away.
        bound = 1.01 * error + ROUNDING[case.dtype] * y.abs() + 2.0**-24
        share = close("out", y, found["out"], bound)
        most = metric_bound(fmt, k, case.dtype, device)
        figures = {"share_of_bound": share, "metric": metric("out", y, found["out"], most)}
        if case.codes:
            mine = {name: x.cpu() for name, x in found.items()}
            # By the CPU: on a GPU, torch divides by 448 and by 127 with their rounded reciprocals.
            right = reference.quantize_activation(mine["out"], fmt.activation)
            same_bits("the output quantized", {"codes": right[0], "scale": right[1]}, mine)
        return figures

    return Call(fresh, run, judge)


def _exact(
    case: GemmCase,
    packed: PackedWeight,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output in FP32, and how far a kernel's may be from it before it is rounded."""
    y = reference.gemm(codes, scale, packed, bias, torch.float32, residual)
    weight = reference.expand(packed)
    magnitudes = codes.float().abs() @ weight.operand.float().abs().T
    error = _steps(case.fmt, case.k, codes.device) * magnitudes * scale * weight.c.T
    error += 2.0**-21 * (y.abs() + (0 if bias is None else bias.abs()))
    if case.silu:
        (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
        y = F.silu(gate) * up
        # silu' is at most 1.1, and exp is good to 2^-20.
        error = (1.1 * gate_error + 2.0**-20 * gate.abs()) * (up.abs() + up_error)
        error += F.silu(gate).abs() * up_error
    return y, error


def _at_once(fmt: WeightFormat, n: int, k: int, device: torch.device) -> Call:
    """Few tokens, whose sums meet in workspaces, in two streams that run beside each other."""
    generator = torch.Generator(device).manual_seed(n)
    packed = join_weight(random_weight(n, k, fmt, device))
    inputs = [
        reference.quantize_activation(normal(generator, (m, k), 2.0), fmt.activation)
        for m in (16, 33)
    ]

    @functools.cache
    def prepared(backend: str) -> tuple[Weight, list[Tensor]]:
        size = ops.workspace_bytes(device, gemms=[(n, k)], max_tokens=64, backend=backend)
        spaces = [torch.empty(size, dtype=torch.uint8, device=device) for _ in inputs]
        return ops.prepare(packed, backend=backend), spaces

    def run(backend: str, out: Outputs) -> None:
        weight, spaces = prepared(backend)
        calls = [
            functools.partial(ops.gemm, *given, weight, y, workspace=space, backend=backend)
            for given, y, space in zip(inputs, out.values(), spaces, strict=True)
        ]
        at_once(device, calls, backend)

    def fresh() -> Outputs:
        shapes = {f"out{i}": (len(codes), n) for i, (codes, _) in enumerate(inputs)}
        return {name: poison(shape, torch.float32, device) for name, shape in shapes.items()}

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        bound = metric_bound(fmt, k, torch.float32, device)
        return {name: metric(name, wanted[name], found[name], bound) for name in wanted}

    return Call(fresh, run, judge)


def metric_bound(fmt: WeightFormat, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Of the error metric, for a sum over K that is rounded to a type."""
    return 4 * _steps(fmt, k, device) ** 2 / 2 + ROUNDING[dtype] ** 2 + 1e-10


def _steps(fmt: WeightFormat, k: int, device: torch.device) -> float:
    """The error that a sum over K may gather, relative to the sum of its terms' magnitudes.

    INT32 sums are exact. The accumulator of an FP8 tensor core is taken to keep 13 bits behind the
    leading one and to lose the rest in each of K / 32 additions; FP16's and FP32's, 22 bits of K.
    """
    if fmt.activation == "int8":
        return 0.0
    narrow = dispatch.capability(device) >= dispatch.FP8_CAPABILITY
    return (k / 32 + 1) * 2.0**-13 if narrow else k * 2.0**-22


def _turned(values: Sequence[int], places: int) -> list[int]:
    """The values, beginning with another one."""
    start = places % len(values)
    return [*values[start:], *values[:start]]
