"""What torch calls: the ops' schemas, the checks of their arguments, and the way to a backend.

`ops.py` says what they do. Registered with Library.define / impl and not with custom_op, which is
slower: at some 300 ops a token microseconds are felt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from quant_kernels.arguments import (
    CODES,
    FLOATS,
    OpError,
    Weight,
    check_weight,
    expect,
    weight_of,
)
from quant_kernels.backends import backend_for
from quant_kernels.formats import WeightFormat
from quant_kernels.packing import KV_PAGE
from quant_kernels.registration_dense import SCHEMAS as DENSE_SCHEMAS

__all__ = ["OpError", "Weight", "backend_for", "call"]

HEAD_DIMS = (32, 64, 96, 128, 256)


def _quantize_activation(x: Tensor, codes: Tensor, scale: Tensor, backend: str) -> None:
    op = "quantize_activation"
    _check_activation(op, "x", x, codes, scale, x.shape[-1])
    backend_for(op, x.device, backend).quantize_activation(x, codes, scale)


def _rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    codes: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    backend: str,
) -> None:
    op = "rms_norm_quantize"
    _check_activation(op, "x", x, codes, scale, x.shape[-1])
    expect(op, "weight", weight, (x.shape[1],), FLOATS)
    if residual is not None:
        expect(op, "residual", residual, tuple(x.shape), (x.dtype,))
    backend_for(op, x.device, backend).rms_norm_quantize(x, weight, eps, codes, scale, residual)


def _silu_mul_quantize(gate_up: Tensor, codes: Tensor, scale: Tensor, backend: str) -> None:
    op = "silu_mul_quantize"
    if gate_up.shape[-1] % 2:
        raise OpError(f"{op}: gate_up {list(gate_up.shape)} must be [M, 2 F]")
    _check_activation(op, "gate_up", gate_up, codes, scale, gate_up.shape[-1] // 2)
    backend_for(op, gate_up.device, backend).silu_mul_quantize(gate_up, codes, scale)


def _gemm(scheme: str) -> Callable[..., None]:
    op, kind = f"gemm_{scheme}", torch.float8_e4m3fn if scheme == "w4afp8" else torch.int8

    def run(
        x_codes: Tensor,
        x_scale: Tensor,
        codes: Tensor,
        t: Tensor,
        c: Tensor,
        group_size: int,
        numerics: str,
        out: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        silu_mul: bool,
        out_codes: Tensor | None,
        out_scale: Tensor | None,
        workspace: Tensor | None,
        backend: str,
    ) -> None:
        fmt = _format(scheme, group_size, numerics)
        weight = weight_of(op, codes, t, c, fmt, x_codes.shape[-1])
        rows, columns = weight.shape
        m = x_codes.shape[0]
        expect(op, "x_codes", x_codes, (m, columns), (kind,))
        expect(op, "x_scale", x_scale, (m, 1), (torch.float32,))
        check_weight(op, weight, rows, columns)
        if silu_mul and (rows % 2 or residual is not None):
            raise OpError(f"{op}: silu_mul takes a weight of 2 F rows, not {rows}, and no residual")
        expect(op, "out", out, (m, rows // 2 if silu_mul else rows), FLOATS)
        if bias is not None:
            expect(op, "bias", bias, (rows,), FLOATS)
        if residual is not None:
            expect(op, "residual", residual, (m, rows), FLOATS)
        if (out_codes is None) != (out_scale is None) or (out_codes is not None and not silu_mul):
            raise OpError(f"{op}: codes and scale of the output come together, and with silu_mul")
        if out_codes is not None and out_scale is not None:
            expect(op, "codes", out_codes, tuple(out.shape), CODES)
            expect(op, "scale", out_scale, (m, 1), (torch.float32,))
        module = backend_for(op, x_codes.device, backend)
        if not isinstance(weight, module.WEIGHT):
            raise OpError(
                f"{op}: the weight [{rows}, {columns}] is in the {weight.LAYOUT} layout, not in "
                f"the {module.WEIGHT.LAYOUT} layout that backend {module.NAME!r} reads; make it "
                f"with ops.prepare(weight, backend={module.NAME!r}) from the checkpoint's"
            )
        module.gemm(
            x_codes, x_scale, weight, out, bias, residual, silu_mul, workspace,
            out_codes, out_scale,
        )  # fmt: skip

    return run


def _linear(x: Tensor, weight: Tensor, out: Tensor, backend: str) -> None:
    op = "linear"
    if x.dim() != 2 or weight.dim() != 2:
        raise OpError(
            f"{op}: x must be [M, H] and weight [N, H], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    expect(op, "x", x, tuple(x.shape), FLOATS)
    expect(op, "weight", weight, (weight.shape[0], x.shape[1]), (x.dtype,))
    expect(op, "out", out, (x.shape[0], weight.shape[0]), (x.dtype,))
    backend_for(op, x.device, backend).linear(x, weight, out)


def _rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    key_shift: Tensor | None,
    symmetric: bool,
    backend: str,
) -> None:
    op, tokens = "rope_append", qkv.shape[0]
    query_heads, dim = q_codes.shape[1:]
    kv_heads = _check_cache(op, q_codes, q_scale, kv_codes, kv_scales)
    expect(op, "qkv", qkv, (tokens, (query_heads + 2 * kv_heads) * dim), FLOATS)
    expect(op, "q_codes", q_codes, (tokens, query_heads, dim), (torch.float8_e4m3fn,))
    integers = (torch.int32, torch.int64)
    expect(op, "positions", positions, (tokens,), integers)
    expect(op, "slots", slots, (tokens,), integers)
    expect(op, "cos", cos, (cos.shape[0], dim // 2), (torch.float32,))
    expect(op, "sin", sin, tuple(cos.shape), (torch.float32,))
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            expect(op, name, norm, (dim,), FLOATS)
    for name, part in (("key_scale", key_scale), ("key_shift", key_shift)):
        if part is not None:
            expect(op, name, part, (kv_heads, dim), (torch.float32,))
    if (q_norm is None) != (k_norm is None) or (key_scale is None) != (key_shift is None):
        raise OpError(f"{op}: q_norm and k_norm, and key_scale and key_shift, come in pairs")
    backend_for(op, qkv.device, backend).rope_append(
        qkv, positions, cos, sin, slots, q_codes, q_scale, kv_codes, kv_scales,
        q_norm, k_norm, eps, key_scale, key_shift, symmetric,
    )  # fmt: skip


def _prefill_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    sm_scale: float,
    window: int,
    soft_cap: float,
    skip_threshold: float,
    backend: str,
) -> None:
    op, batch = "prefill_attention", len(kv_lens)
    _check_attention(op, q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out, sm_scale)
    expect(op, "cu_seqlens", cu_seqlens, (batch + 1,), (torch.int32,))
    if not 0 <= max_query_len <= len(q_codes):
        raise OpError(f"{op}: max_query_len is {max_query_len} with {len(q_codes)} query tokens")
    module = backend_for(op, q_codes.device, backend)
    options = _options(op, module.NAME, soft_cap=soft_cap, skip_threshold=skip_threshold)
    module.prefill_attention(
        q_codes, q_scale, kv_codes, kv_scales, block_table, cu_seqlens, kv_lens,
        max_query_len, out, sm_scale, window, **options,
    )  # fmt: skip


def _decode_attention(
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
    window: int,
    soft_cap: float,
    workspace: Tensor | None,
    backend: str,
) -> None:
    op = "decode_attention"
    _check_attention(op, q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out, sm_scale)
    if len(q_codes) != len(kv_lens):
        raise OpError(f"{op}: {len(q_codes)} query tokens for {len(kv_lens)} sequences; one each")
    module = backend_for(op, q_codes.device, backend)
    module.decode_attention(
        q_codes, q_scale, kv_codes, kv_scales, block_table, kv_lens, out,
        sm_scale, window, workspace, **_options(op, module.NAME, soft_cap=soft_cap),
    )  # fmt: skip


_format = functools.cache(WeightFormat)  # which checks what it is made of


def _check_activation(
    op: str, name: str, x: Tensor, codes: Tensor, scale: Tensor, columns: int
) -> None:
    if x.dim() != 2:
        raise OpError(f"{op}: {name} must have two dimensions, got {list(x.shape)}")
    expect(op, name, x, tuple(x.shape), FLOATS)
    expect(op, "codes", codes, (x.shape[0], columns), CODES)
    expect(op, "scale", scale, (x.shape[0], 1), (torch.float32,))


def _check_cache(
    op: str, q_codes: Tensor, q_scale: Tensor, kv_codes: Tensor, kv_scales: Tensor
) -> int:
    """Queries and cache belong together; returns Hk."""
    if q_codes.dim() != 3 or kv_codes.dim() != 5:
        raise OpError(
            f"{op}: q_codes must be [T, Hq, D] and kv_codes [2, pages, Hk, {KV_PAGE}, D / 2], got "
            f"{list(q_codes.shape)} and {list(kv_codes.shape)}"
        )
    tokens, query_heads, dim = q_codes.shape
    pages, kv_heads = kv_codes.shape[1:3]
    if dim not in HEAD_DIMS or kv_heads == 0 or query_heads % kv_heads:
        raise OpError(
            f"{op}: {query_heads} query heads over {kv_heads} KV heads of dimension {dim}; heads "
            f"must divide, and the dimension be one of {', '.join(map(str, HEAD_DIMS))}"
        )
    expect(op, "q_codes", q_codes, tuple(q_codes.shape), (torch.float8_e4m3fn,))
    expect(op, "q_scale", q_scale, (tokens, query_heads), (torch.float32,))
    expect(op, "kv_codes", kv_codes, (2, pages, kv_heads, KV_PAGE, dim // 2), (torch.uint8,))
    expect(op, "kv_scales", kv_scales, (2, pages, kv_heads, KV_PAGE, 2), (torch.float16,))
    if not (kv_codes.is_contiguous() and kv_scales.is_contiguous()):
        raise OpError(f"{op}: kv_codes and kv_scales must be contiguous")
    return int(kv_heads)


def _check_attention(
    op: str,
    q_codes: Tensor,
    q_scale: Tensor,
    kv_codes: Tensor,
    kv_scales: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    sm_scale: float,
) -> None:
    if not sm_scale > 0:
        raise OpError(f"{op}: sm_scale must be positive, got {sm_scale}")
    _check_cache(op, q_codes, q_scale, kv_codes, kv_scales)
    batch = len(kv_lens)
    expect(op, "kv_lens", kv_lens, (batch,), (torch.int32,))
    expect(op, "block_table", block_table, (batch, block_table.shape[1]), (torch.int32,))
    expect(op, "out", out, tuple(q_codes.shape), FLOATS)


# Backends that take an option of attention.
_TAKEN_BY = {"soft_cap": ("cutlass", "reference"), "skip_threshold": ("cutlass", "reference")}


def _options(op: str, backend: str, **values: float) -> dict[str, float]:
    """Those that are not off, where the backend takes them."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise OpError(f"{op}: {name} must be finite and not negative, got {value}")
        if value and backend not in _TAKEN_BY[name]:
            raise OpError(
                f"{op}: backend {backend!r} has no {name} (got {value}); the backends "
                f"{' and '.join(_TAKEN_BY[name])} take it"
            )
    return {name: value for name, value in values.items() if value}


_GEMM = (
    "(Tensor x_codes, Tensor x_scale, Tensor codes, Tensor t, Tensor c, int group_size, "
    "str numerics, Tensor(a!) out, Tensor? bias, Tensor? residual, bool silu_mul, "
    "Tensor(b!)? out_codes, Tensor(c!)? out_scale, Tensor(d!)? workspace, str backend) -> ()"
)
_CACHE = "Tensor q_codes, Tensor q_scale, Tensor kv_codes, Tensor kv_scales, Tensor block_table, "
_SCHEMAS: dict[str, tuple[str, Callable[..., None]]] = {
    "quantize_activation": (
        "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, str backend) -> ()",
        _quantize_activation,
    ),
    "rms_norm_quantize": (
        "(Tensor x, Tensor weight, float eps, Tensor(a!) codes, Tensor(b!) scale, "
        "Tensor(c!)? residual, str backend) -> ()",
        _rms_norm_quantize,
    ),
    "silu_mul_quantize": (
        "(Tensor gate_up, Tensor(a!) codes, Tensor(b!) scale, str backend) -> ()",
        _silu_mul_quantize,
    ),
    "gemm_w4afp8": (_GEMM, _gemm("w4afp8")),
    "gemm_w4a8": (_GEMM, _gemm("w4a8")),
    "linear": (
        "(Tensor x, Tensor weight, Tensor(a!) out, str backend) -> ()",
        _linear,
    ),
    "rope_append": (
        "(Tensor qkv, Tensor positions, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) q_codes, "
        "Tensor(b!) q_scale, Tensor(c!) kv_codes, Tensor(d!) kv_scales, Tensor? q_norm, "
        "Tensor? k_norm, float eps, Tensor? key_scale, Tensor? key_shift, bool symmetric, "
        "str backend) -> ()",
        _rope_append,
    ),
    "prefill_attention": (
        f"({_CACHE}Tensor cu_seqlens, Tensor kv_lens, int max_query_len, Tensor(a!) out, "
        "float sm_scale, int window, float soft_cap, float skip_threshold, str backend) -> ()",
        _prefill_attention,
    ),
    "decode_attention": (
        f"({_CACHE}Tensor kv_lens, Tensor(a!) out, float sm_scale, int window, float soft_cap, "
        "Tensor(b!)? workspace, str backend) -> ()",
        _decode_attention,
    ),
    **DENSE_SCHEMAS,
}


def _register() -> torch.library.Library:
    library = torch.library.Library("fourbyeight", "DEF")
    for name, (schema, run) in _SCHEMAS.items():
        library.define(name + schema)
        for device in ("CPU", "CUDA"):
            library.impl(name, run, device)
        torch.library.register_fake(f"fourbyeight::{name}", lambda *_: None, lib=library)
    return library


_LIBRARY = _register()


def call(op: str, *arguments: object) -> None:
    """Run an op: one node for torch.compile; elsewhere past torch's dispatcher, 5 us at each op."""
    if torch.compiler.is_compiling():
        getattr(torch.ops.fourbyeight, op)(*arguments)
    else:
        _SCHEMAS[op][1](*arguments)
