"""From the fused q, k, v projection to what attention reads: `reference_attention.rope_quantize`.

Per head x [D] of a token, i < D / 2, with c, s the cosines and sines of its position:

    x <- D(x / sqrt(mean(x^2) + eps) * weight)                        q and k of QK-norm models
    x_i <- D(x_i c_i - x_{i+D/2} s_i),  x_{i+D/2} <- D(x_{i+D/2} c_i + x_i s_i)       q and k
    q <- q / key_scale,  k <- (k - key_shift) key_scale               keys with a transform
    q -> E4M3 codes with scale max|q| / 448;  k, v -> INT4 rows with scale and offset (`kv4.py`)

D: to the dtype of qkv; everything else is FP32, unfused, as in the definition, step by step.

A program has one KV head of a token with all the query heads that read it: they share the row of
cosines and sines and the key transform. A head is two tiles of D / 2, its halves: RoPE's partners
i and i + D/2 then lie in the same thread, and they are also the two nibbles of byte i of the cache,
so nothing moves between lanes but maxima and the norm's sums. Tiles are padded to powers of two;
the padding is zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant_kernels import dispatch, kv4, packing
from quant_kernels.triton import activation, numbers
from quant_kernels.triton.activation import E4M3_MAX, INFINITY

PAGE = tl.constexpr(packing.KV_PAGE)
STEPS = tl.constexpr(kv4.STEPS)
CENTRE = tl.constexpr(kv4.CENTRE)
SIGNED_STEPS = tl.constexpr(kv4.SIGNED_STEPS)
LOWEST = tl.constexpr(float(kv4.CODES[0]))
HIGHEST = tl.constexpr(float(kv4.CODES[1]))

PAIRS_A_WARP = 256  # of queries: 16 of their elements a thread
MAX_WARPS = 8


@triton.jit
def _halves(source, inside, HALF: tl.constexpr):
    """Two halves of heads, HALF elements apart, as FP32 tiles [heads, pairs]."""
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm(first, second, weight, eps, pair, inside, like, HALF: tl.constexpr):
    """RMSNorm of every head, rounded to the dtype of `like`."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    r = tl.rsqrt(tl.div_rn(squares, 2.0 * HALF) + eps)[:, None]
    low, high = _halves(weight + pair, inside, HALF)
    first = numbers.round_to(first * r * low, like).to(tl.float32)
    return first, numbers.round_to(second * r * high, like).to(tl.float32)


@triton.jit
def _rope(first, second, c, s, like):
    """Both halves turned, rounded to the dtype of `like`."""
    turned = numbers.round_to(first * c - second * s, like).to(tl.float32)
    return turned, numbers.round_to(second * c + first * s, like).to(tl.float32)


@triton.jit
def _largest(first, second):
    """The largest `activation.magnitude` of every head."""
    found = tl.max(activation.magnitude(first), axis=1)
    return tl.maximum(found, tl.max(activation.magnitude(second), axis=1))


@triton.jit
def _code(x, offset, step):
    """Codes of the INT4 cache, int32; 0 for a NaN."""
    q = tl.div_rn(x - offset, step)
    nearest = numbers.round_nearest(tl.minimum(tl.maximum(q, LOWEST), HIGHEST))
    return tl.where(q == q, nearest, 0.0).to(tl.int32)


@triton.jit
def _store_row(
    first, second, inside, pair, codes, scales, row, HALF: tl.constexpr, SYMMETRIC: tl.constexpr
):
    """One head [1, D] into a row of the cache (`kv4.quantize_kv`, `packing.pack_kv`)."""
    low = tl.min(tl.where(inside, tl.minimum(first, second), float("inf")), axis=1)
    high = tl.max(tl.where(inside, tl.maximum(first, second), -float("inf")), axis=1)
    broken = _largest(first, second) > INFINITY  # tl.min and tl.max drop NaN
    low = tl.where(broken, float("nan"), low)
    high = tl.where(broken, float("nan"), high)
    if SYMMETRIC:
        extreme = tl.where(high > -low, high, low)
        scale = tl.div_rn(extreme, -SIGNED_STEPS).to(tl.float16)
        offset = tl.zeros_like(scale)
    else:
        scale = tl.div_rn(high - low, STEPS).to(tl.float16)
        offset = ((high + low) * 0.5 - CENTRE * scale.to(tl.float32)).to(tl.float16)
    o = offset.to(tl.float32)[:, None]
    step = tl.where(scale == 0.0, 1.0, scale.to(tl.float32))[:, None]
    packed = (_code(first, o, step) & 15) | ((_code(second, o, step) & 15) << 4)
    tl.store(codes + row * HALF + pair, packed.to(tl.uint8), mask=inside)
    place = scales + row * 2 + tl.arange(0, 1)
    tl.store(place, scale)
    tl.store(place + 1, offset)


@triton.jit
def _rope_append_kernel(
    qkv,
    positions,
    cos,
    sin,
    slots,
    q_codes,
    q_scale,
    kv_codes,
    kv_scales,
    q_norm,
    k_norm,
    eps,
    key_scale,
    key_shift,
    pages,
    qkv_row,
    cos_row,
    sin_row,
    q_codes_token,
    q_codes_head,
    q_scale_token,
    key_scale_head,
    key_shift_head,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    FP8: tl.constexpr,
):
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qkv += token * qkv_row
    pair = tl.arange(0, PAIRS)[None, :]
    inside = pair < HALF
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + position * cos_row + pair, mask=inside, other=0.0)
    s = tl.load(sin + position * sin_row + pair, mask=inside, other=0.0)
    if key_scale is not None:
        stretch, stretch2 = _halves(key_scale + kv_head * key_scale_head + pair, inside, HALF)

    member = tl.arange(0, HEADS)
    head = kv_head * RATIO + member
    real = (member < RATIO)[:, None] & inside
    first, second = _halves(qkv + head[:, None] * (2 * HALF) + pair, real, HALF)
    if q_norm is not None:
        first, second = _norm(first, second, q_norm, eps, pair, inside, qkv, HALF)
    first, second = _rope(first, second, c, s, qkv)
    if key_scale is not None:
        first = tl.div_rn(first, tl.where(inside, stretch, 1.0))
        second = tl.div_rn(second, tl.where(inside, stretch2, 1.0))
    a = activation.token_scale(_largest(first, second), E4M3_MAX)
    codes = q_codes + token * q_codes_token + head[:, None] * q_codes_head + pair
    tl.store(codes, numbers.e4m3_byte(tl.div_rn(first, a[:, None]), FP8), mask=real)
    tl.store(codes + HALF, numbers.e4m3_byte(tl.div_rn(second, a[:, None]), FP8), mask=real)
    tl.store(q_scale + token * q_scale_token + head, a, mask=member < RATIO)

    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        row = ((slot // PAGE) * KV_HEADS + kv_head) * PAGE + slot % PAGE
        k = qkv + (KV_HEADS * RATIO + kv_head) * (2 * HALF) + pair
        k1, k2 = _halves(k, inside, HALF)
        if k_norm is not None:
            k1, k2 = _norm(k1, k2, k_norm, eps, pair, inside, qkv, HALF)
        k1, k2 = _rope(k1, k2, c, s, qkv)
        if key_scale is not None:
            shift, shift2 = _halves(key_shift + kv_head * key_shift_head + pair, inside, HALF)
            k1, k2 = (k1 - shift) * stretch, (k2 - shift2) * stretch2
        _store_row(k1, k2, inside, pair, kv_codes, kv_scales, row, HALF, SYMMETRIC)

        row += tl.cast(pages, tl.int64) * (KV_HEADS * PAGE)
        v1, v2 = _halves(k + KV_HEADS * (2 * HALF), inside, HALF)
        _store_row(v1, v2, inside, pair, kv_codes, kv_scales, row, HALF, SYMMETRIC)


def rope_append(
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
) -> None:
    """`ops.rope_append`."""
    tokens, query_heads, dim = q_codes.shape
    pages, kv_heads = kv_codes.shape[1:3]
    if not tokens:
        return
    _rope_append_kernel[(tokens, kv_heads)](
        qkv, positions, cos, sin, slots, q_codes.view(torch.uint8), q_scale, kv_codes, kv_scales,
        q_norm, k_norm, eps, key_scale, key_shift, pages,
        qkv.stride(0), cos.stride(0), sin.stride(0),
        q_codes.stride(0), q_codes.stride(1), q_scale.stride(0),
        0 if key_scale is None else key_scale.stride(0),
        0 if key_shift is None else key_shift.stride(0),
        **_tiles(query_heads, kv_heads, dim), SYMMETRIC=symmetric,
        FP8=dispatch.capability(qkv.device) >= dispatch.FP8_CAPABILITY,
        enable_fp_fusion=False,
    )  # fmt: skip


def _tiles(query_heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    ratio, half = query_heads // kv_heads, dim // 2
    heads, pairs = triton.next_power_of_2(ratio), triton.next_power_of_2(half)
    return {
        "KV_HEADS": kv_heads,
        "RATIO": ratio,
        "HALF": half,
        "HEADS": heads,
        "PAIRS": pairs,
        "num_warps": min(max(heads * pairs // PAIRS_A_WARP, 1), MAX_WARPS),
    }


def compile_cases() -> list[tuple[Any, ...]]:
    """As `activation.compile_cases`."""
    cases: list[tuple[Any, ...]] = []
    for heads in ((32, 8, 128), (32, 32, 128), (64, 8, 128), (9, 3, 64)):
        for norm in (False, True):
            for fp8 in (True, False):
                cases.append(_case(heads, "bf16", norm, not norm, norm, fp8))
    others = (((24, 8, 96), "fp16"), ((16, 8, 256), "fp32"), ((64, 2, 128), "bf16"))
    return cases + [_case(heads, dtype, True, True, False, False) for heads, dtype in others]


def _case(
    heads: tuple[int, int, int], dtype: str, norm: bool, transform: bool, symmetric: bool, fp8: bool
) -> tuple[Any, ...]:
    types = {"qkv": f"*{dtype}", "positions": "*i64", "slots": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("cos", "sin", "q_scale", "key_scale", "key_shift"), "*fp32")
    types |= dict.fromkeys(("q_codes", "kv_codes"), "*u8") | {"kv_scales": "*fp16"}
    types |= dict.fromkeys(("q_norm", "k_norm"), "*bf16")
    absent = [] if norm else ["q_norm", "k_norm"]
    absent += [] if transform else ["key_scale", "key_shift"]
    tiles = _tiles(*heads)
    options = {"num_warps": tiles.pop("num_warps"), "enable_fp_fusion": False}
    constants = {**tiles, "SYMMETRIC": symmetric, "FP8": fp8, **dict.fromkeys(absent)}
    there = (arg for arg in _rope_append_kernel.arg_names if arg not in constants)
    signature = {arg: types.get(arg, "i32") for arg in there}
    label = f"{heads} {dtype}" + " norm" * norm + " transform" * transform
    label += " symmetric" * symmetric + " without FP8" * (not fp8)
    aligned = ("qkv_row", "cos_row", "sin_row", "q_codes_token", "q_codes_head", "key_scale_head")
    name = f"rope_append {label}"
    return name, _rope_append_kernel, signature, constants, options, fp8, aligned
