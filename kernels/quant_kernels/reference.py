"""The definition of every op in plain torch. A backend is right when it agrees with this file.

Notation: X [M, K] tokens, W^ [N, K] = P(q, t) * c (`formats.py`), Y = X W^T [M, N]. An activation
is codes times one FP32 scale per token, so

    Y[m, n] = a[m] * c[n] * sum_k xq[m, k] * P(q, t)[n, k]  (+ bias[n])  (+ residual[m, n])

with the sum in FP32 for FP8 codes and in INT32 for INT8 codes.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels.formats import (
    E4M3_MAX,
    INT8_MAX,
    FormatError,
    WeightFormat,
    e4m3_values,
    kernel_operand,
)
from quant_kernels.packing import CODES_PER_WORD, PackedWeight, unpack_int4

# Elements of a weight that are unpacked together: their temporaries stay some ten megabytes.
ELEMENTS_AT_ONCE = 2**21
# Of a BF16 weight that become FP32 together, and tokens from which that pays.
WIDE_ELEMENTS, WIDE_TOKENS = 2**24, 32

_precision_lock = threading.RLock()


@dataclass(frozen=True)
class ExpandedWeight:
    """A weight unpacked once for many products: operand P(q, t) [N, K] and row units c [N, 1] FP32.

    The operand is int8 for w4a8, and FP32 for w4afp8.
    """

    operand: Tensor
    c: Tensor
    fmt: WeightFormat


def expand(weight: PackedWeight) -> ExpandedWeight:
    """The operand of a packed weight; `gemm` with either gives the same bits."""
    columns = weight.words.shape[1] * CODES_PER_WORD
    dtype = torch.int8 if weight.fmt.scheme == "w4a8" else torch.float32
    rows = max(1, ELEMENTS_AT_ONCE // columns)
    if rows >= len(weight.words):  # in decode as a rule, where a copy would double the time
        product, c = kernel_operand(unpack_int4(weight.words), weight.scales, weight.fmt)
        return ExpandedWeight(product.to(dtype), c, weight.fmt)
    shape, device = (len(weight.words), columns), weight.words.device
    operand = torch.empty(shape, dtype=dtype, device=device)
    c = torch.empty(shape[0], 1, device=device)
    for start in range(0, len(operand), rows):
        part = slice(start, start + rows)
        words, scales = weight.words[part], weight.scales[part]
        operand[part], c[part] = kernel_operand(unpack_int4(words), scales, weight.fmt)
    return ExpandedWeight(operand, c, weight.fmt)


def quantize_activation(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Per-token symmetric quantization of x [..., K] (any float dtype), computed in FP32.

    kind "fp8":  a = max|x| / 448, codes = E4M3(x / a), torch.float8_e4m3fn.
    kind "int8": a = max|x| / 127, codes = RNE(x / a) in [-127, 127], torch.int8.
    Returns codes [..., K] and scales a [..., 1] FP32. A token of zeros gets scale 1.
    """
    if kind not in ("fp8", "int8"):
        raise FormatError(f"activation type {kind!r} is unknown; known: fp8, int8")
    limit = E4M3_MAX if kind == "fp8" else INT8_MAX
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / limit
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays NaN
    y = (x / scale).clamp_(-limit, limit)
    return (y.to(torch.float8_e4m3fn) if kind == "fp8" else y.round_().to(torch.int8)), scale


def dequantize_activation(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [..., K], scale [..., 1] -> what the kernel sees of x, FP32."""
    values = e4m3_values(codes) if codes.dtype == torch.float8_e4m3fn else codes.float()
    return values.mul_(scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] -> x / sqrt(mean(x^2) + eps) * weight, in x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 F], the gate first -> silu(gate) * up [..., F], computed in FP32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gemm_w4afp8(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: PackedWeight | ExpandedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: Tensor | None = None,
) -> Tensor:
    """INT4 x FP8 GEMM.

    x_codes [M, K] float8_e4m3fn, x_scale [M, 1] FP32; weight [N, K], packed or expanded; bias [N];
    residual [M, N] -> [M, N] out_dtype. Accumulates in FP32.
    """
    _check("gemm_w4afp8", "w4afp8", torch.float8_e4m3fn, x_codes, x_scale, weight)
    weight = weight if isinstance(weight, ExpandedWeight) else expand(weight)
    # E4M3 codes and lut operands are exact in BF16, so hardware BF16 products lose nothing.
    exact_in_bf16 = weight.fmt.numerics == "lut" or weight.fmt.per_channel
    with bf16_products(exact_in_bf16):
        acc = e4m3_values(x_codes) @ weight.operand.T
    return _epilogue(acc, x_scale, weight.c, bias, residual, out_dtype)


def gemm_w4a8(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: PackedWeight | ExpandedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: Tensor | None = None,
) -> Tensor:
    """INT4 x INT8 GEMM: as `gemm_w4afp8` with x_codes int8; INT32 accumulation over all of K."""
    _check("gemm_w4a8", "w4a8", torch.int8, x_codes, x_scale, weight)
    weight = weight if isinstance(weight, ExpandedWeight) else expand(weight)
    return _epilogue(
        int8_matmul(x_codes, weight.operand), x_scale, weight.c, bias, residual, out_dtype
    )


def gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: PackedWeight | ExpandedWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: Tensor | None = None,
) -> Tensor:
    """The GEMM of the weight's scheme; arguments as `gemm_w4afp8`."""
    op = gemm_w4afp8 if weight.fmt.scheme == "w4afp8" else gemm_w4a8
    return op(x_codes, x_scale, weight, bias, out_dtype, residual)


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [M, H] weight [N, H]^T -> [M, N], all of one dtype: a sum in FP32, rounded once.

    Torch's own product, whose order of summation, and so the last bit, may depend on M.
    """
    if _is_better_in_fp32(x):
        return _linear_in_fp32(x, weight, None, out)
    return torch.mm(x, weight.T, out=out)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x [..., K], weight [N, K], bias [N] -> [..., N], in x's dtype.

    A sum in FP32, rounded once.
    """
    if _is_better_in_fp32(x):
        return _linear_in_fp32(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_better_in_fp32(x: Tensor) -> bool:
    """Many tokens [..., K] in BF16 on a CPU that has no BF16 products: a seventh of the time."""
    many = x.dim() > 0 and x.numel() >= WIDE_TOKENS * x.shape[-1]
    return many and x.device.type == "cpu" and x.dtype == torch.bfloat16 and _bf16_is_emulated()


def _linear_in_fp32(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """`dense_linear`, some rows of the weight at a time, for the memory that FP32 takes."""
    wide, rows = x.float(), max(1, WIDE_ELEMENTS // max(1, weight.shape[1]))
    if out is None:
        out = x.new_empty(*x.shape[:-1], len(weight))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        added = None if bias is None else bias[part].float()
        out[..., part] = F.linear(wide, weight[part].float(), added)
    return out


def int8_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] int8, w [N, K] with integer values in [-128, 127] -> exact x w^T [M, N], FP32.

    The sum is an exact INT32 and is rounded to FP32 once, at the end, as an epilogue does.
    """
    if x.device.type == "cpu" and _int_mm_is_worth_it():
        return torch._int_mm(x.contiguous(), w.to(torch.int8).T.contiguous()).float()
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32, device=x.device)
    with bf16_products(False):
        # A partial sum is at most 128 * 128 * 1024 = 2^24, so FP32 holds it exactly.
        for a, b in zip(x.split(1024, dim=1), w.split(1024, dim=1), strict=True):
            total += (a.float() @ b.float().T).to(torch.int32)
    return total.float()


@functools.cache
def _int_mm_is_worth_it() -> bool:
    """Whether torch's INT8 product is exact and fast on this CPU.

    Without VNNI it saturates sums of two products, or takes 35 times as long as FP32.
    """
    extremes = torch.tensor([[127, 127], [-128, -128], [127, -128]], dtype=torch.int8)
    x = extremes.repeat(1, 64).contiguous()
    found = torch._int_mm(x, x.T.contiguous())
    if not torch.equal(found.double(), x.double() @ x.double().T):
        return False
    a, b = torch.ones(64, 512, dtype=torch.int8), torch.ones(512, 512, dtype=torch.int8)
    in_fp32 = _seconds(lambda: a.float() @ b.float())
    return _seconds(lambda: torch._int_mm(a, b)) < 4 * in_fp32


@functools.cache
def _bf16_is_emulated() -> bool:
    """Whether oneDNN has no BF16 products for this CPU, and torch a slow way around them.

    Asked, not timed: bits must be the same in every process, such as one that resumes a run.
    """
    available = torch.backends.mkldnn.is_available()
    return available and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _seconds(run: Callable[[], object]) -> float:
    """The shortest of three runs, after one that does not count."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


@contextmanager
def bf16_products(enabled: bool = True) -> Iterator[None]:
    """Let FP32 matmuls on a CPU multiply in BF16 (FP32 accumulation) where the hardware can.

    Only for operands whose values are BF16 numbers: then the products are the same, and several
    times faster with AMX or AVX512-BF16. A machine without them computes in FP32.
    """
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        before = backend.fp32_precision
        backend.fp32_precision = "bf16" if enabled else "ieee"
        try:
            yield
        finally:
            backend.fp32_precision = before


def _epilogue(
    acc: Tensor,
    x_scale: Tensor,
    c: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    y = acc.mul_(x_scale).mul_(c.T)
    if bias is not None:
        y.add_(bias.float())
    if residual is not None:
        y.add_(residual.float())
    return y.to(out_dtype)


def _check(
    op: str,
    scheme: str,
    code_dtype: torch.dtype,
    x_codes: Tensor,
    x_scale: Tensor,
    weight: PackedWeight | ExpandedWeight,
) -> None:
    if isinstance(weight, ExpandedWeight):
        columns = weight.operand.shape[1]
    else:
        columns = weight.words.shape[1] * CODES_PER_WORD
    if weight.fmt.scheme != scheme:
        raise FormatError(f"{op} takes {scheme} weights, got {weight.fmt}")
    if x_codes.dtype != code_dtype:
        raise FormatError(f"{op} takes {code_dtype} activation codes, got {x_codes.dtype}")
    if x_codes.dim() != 2 or x_codes.shape[1] != columns:
        raise FormatError(
            f"{op}: x_codes {list(x_codes.shape)} and a weight of K = {columns} disagree on K"
        )
    if x_scale.shape != (x_codes.shape[0], 1):
        raise FormatError(
            f"{op}: x_codes {list(x_codes.shape)} need x_scale [{x_codes.shape[0]}, 1], "
            f"got {list(x_scale.shape)}"
        )
