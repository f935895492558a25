"""The trials of `checks.py`: every op on the shapes at which kernels go wrong.

Token counts around every tile's edge, all head dimensions and ratios of query to KV heads, all
types. `gemm_trials.py` and `attention_trials.py` have the GEMMs' and attention's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import attention_trials, gemm_trials
from benchmarks.checks import (
    DTYPES,
    ROUNDING,
    Call,
    Figures,
    Outputs,
    Trial,
    close,
    code_steps,
    name_of,
    normal,
    poison,
    same_bits,
)
from benchmarks.shapes import EDGE_TOKENS, GQA_RATIOS, HEAD_DIMS
from quant_kernels import ops
from quant_kernels.packing import KV_PAGE, unpack_kv

# A share of codes may land on the other side of a rounding boundary where what is rounded differs
# in its last bit, as sums of another order do: a BF16 bit is a thirtieth of an E4M3 step.
OTHER_SIDE = 0.05
EPS = 1e-5
TRITON = ("triton",)


def activation_trials(small: bool) -> list[Trial]:
    """The three ops that quantize, to both kinds of codes, from all types."""
    if small:
        shapes, dtypes = [(3, 192)], DTYPES[:1]
    else:
        sizes = (64, 576, 4096, 5120, 11008, 14336, 25600)
        shapes = list(zip(EDGE_TOKENS, (*sizes, *sizes), strict=True))
        dtypes = DTYPES
    found = []
    for (m, k), dtype, kind in itertools.product(shapes, dtypes, ("fp8", "int8")):
        label = f"[{m}, {k}] {name_of(dtype)} {kind}"
        for op in ("quantize_activation", "rms_norm_quantize", "silu_mul_quantize"):
            found.append(Trial(op, label, partial(_activation, op, m, k, dtype, kind), TRITON))
    return found


def rope_trials(small: bool) -> list[Trial]:
    """RoPE into the cache: ratios, head dimensions, types, with and without what is optional."""
    grid = list(itertools.product(HEAD_DIMS, GQA_RATIOS))
    if small:
        return [Trial("rope_append", "T 5 D 64 ratio 3", partial(_rope, 5, 2, 3, 64, 3), TRITON)]
    found = []
    for i, (dim, ratio) in enumerate(grid):
        tokens = EDGE_TOKENS[i % len(EDGE_TOKENS)]
        variant = i + i // len(GQA_RATIOS)
        label = f"T {tokens} D {dim} ratio {ratio} variant {variant}"
        found.append(
            Trial("rope_append", label, partial(_rope, tokens, 2, ratio, dim, variant), TRITON)
        )
    return found


def _activation(
    op: str, m: int, k: int, dtype: torch.dtype, kind: str, device: torch.device
) -> Call:
    generator = torch.Generator(device).manual_seed(m * 31 + k)
    width = 2 * k if op == "silu_mul_quantize" else k
    x = normal(generator, (m, width), 3.0).to(dtype)
    x[m // 2] = 0  # a token of zeros has scale 1
    weight = (1 + 0.3 * normal(generator, (k,), 1.0)).to(dtype)
    residual = normal(generator, (m, k), 1.0).to(dtype)
    code = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    normed = op == "rms_norm_quantize" and k % 3 != 1

    def fresh() -> Outputs:
        found = {"codes": poison((m, k), code, device)}
        found["scale"] = poison((m, 1), torch.float32, device)
        return found | ({"residual": residual.clone()} if normed else {})

    def call(backend: str, out: Outputs) -> None:
        codes, scale = out["codes"], out["scale"]
        if op == "quantize_activation":
            ops.quantize_activation(x, codes, scale, backend=backend)
        elif op == "silu_mul_quantize":
            ops.silu_mul_quantize(x, codes, scale, backend=backend)
        else:
            ops.rms_norm_quantize(
                x, weight, EPS, codes, scale, residual=out.get("residual"), backend=backend
            )

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        if normed:
            close("residual", wanted["residual"], found["residual"], 0.0)
        # The largest element of a token may be rounded to its other neighbour before it is read.
        rounded = 2.0**-20 + (0 if op == "quantize_activation" else 2 * ROUNDING[dtype])
        close("scale", wanted["scale"], found["scale"], wanted["scale"].double() * rounded)
        share = code_steps("codes", wanted["codes"], found["codes"], OTHER_SIDE)
        return {"codes_off_by_a_step": share}

    return Call(fresh, call, judge)


def _rope(
    tokens: int, kv_heads: int, ratio: int, dim: int, variant: int, device: torch.device
) -> Call:
    generator = torch.Generator(device).manual_seed(dim + ratio)
    heads = kv_heads * ratio
    qkv = normal(generator, (tokens, (heads + 2 * kv_heads) * dim), 2.0)
    qkv = qkv.to(DTYPES[variant % 3])
    angles = torch.rand(700, dim // 2, generator=generator, device=device) * 6.3
    positions = torch.randperm(700, generator=generator, device=device)[:tokens]
    pages = tokens // KV_PAGE + 3
    slots = torch.randperm(pages * KV_PAGE, generator=generator, device=device)[:tokens]
    slots[tokens // 2] = -1
    weights = [1 + 0.3 * normal(generator, (dim,), 1.0) for _ in range(2)]
    scale = 0.5 + torch.rand(kv_heads, dim, generator=generator, device=device)
    shift = normal(generator, (kv_heads, dim), 0.5)
    cache = (2, pages, kv_heads, KV_PAGE)
    symmetric = variant % 4 == 3

    def fresh() -> Outputs:
        return {
            "q_codes": poison((tokens, heads, dim), torch.float8_e4m3fn, device),
            "q_scale": poison((tokens, heads), torch.float32, device),
            "kv_codes": poison((*cache, dim // 2), torch.uint8, device),
            "kv_scales": poison((*cache, 2), torch.float16, device),
        }

    def call(backend: str, out: Outputs) -> None:
        ops.rope_append(
            qkv, positions, angles.cos(), angles.sin(), slots, *out.values(), eps=EPS,
            norms=(weights[0], weights[1]) if variant % 2 else None,
            key_transform=(scale, shift) if variant % 3 != 1 else None,
            symmetric=symmetric, backend=backend,
        )  # fmt: skip

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        rounded = 2 * ROUNDING[qkv.dtype] + 2.0**-10  # FP16 holds the scales
        close("q_scale", wanted["q_scale"], found["q_scale"], wanted["q_scale"].double() * rounded)
        share = code_steps("q_codes", wanted["q_codes"], found["q_codes"], OTHER_SIDE)
        nowhere = wanted["kv_scales"].isnan()
        for name in ("kv_codes", "kv_scales"):
            x, y = (out[name][nowhere[..., 0]] for out in (wanted, found))
            same_bits("what no slot names", {name: x}, {name: y})
        there = ~nowhere[..., 0]
        right, mine = (
            unpack_kv(out["kv_codes"][there], out["kv_scales"][there]) for out in (wanted, found)
        )
        step = right.scale.double().abs()
        close("scale", right.scale, mine.scale, 16 * rounded * step)
        # An offset is about eight steps and what it lies around.
        room = (8 * step + right.offset.double().abs()) * 2 * rounded
        close("offset", right.offset, mine.offset, room)
        kv_share = code_steps("kv_codes", right.codes, mine.codes, OTHER_SIDE)
        return {"q_codes_off_by_a_step": share, "kv_codes_off_by_a_step": kv_share}

    return Call(fresh, call, judge)


GROUPS: dict[str, Callable[[bool], list[Trial]]] = {
    "activation": activation_trials,
    "gemm_w4afp8": partial(gemm_trials.gemm_trials, "w4afp8"),
    "gemm_w4a8": partial(gemm_trials.gemm_trials, "w4a8"),
    "rope": rope_trials,
    "prefill": attention_trials.prefill_trials,
    "decode": attention_trials.decode_trials,
}


def by_turns(groups: Sequence[Sequence[Trial]]) -> list[Trial]:
    """Every group in its order, all of them at the same pace: wherever time ends, it ends for
    all."""
    ranked = [(i / len(group), trial) for group in groups for i, trial in enumerate(group)]
    return [trial for _, trial in sorted(ranked, key=lambda pair: pair[0])]
