"""The trials of `checks.py`: every op on the shapes at which kernels go wrong.

Token counts around every tile's edge, rows that no tile divides, columns of one span and more, all
weight formats, bias, residual and SiLU, all ratios of query to KV heads, all head dimensions,
windows, and batches of ragged lengths with empty places. What a cache holds beyond a sequence's
length is NaN, as it may be in memory that nobody has written.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import (
    Call,
    Figures,
    Outputs,
    Trial,
    close,
    code_steps,
    metric,
    poison,
    same_bits,
)
from benchmarks.gemm import random_weight
from benchmarks.shapes import (
    EDGE_COLUMNS,
    EDGE_ROWS,
    EDGE_TOKENS,
    GQA_RATIOS,
    HEAD_DIMS,
    MODELS,
)
from quant_kernels import cuda_attention, dispatch, ops, reference
from quant_kernels.formats import GROUP_SIZES, WeightFormat, every_format
from quant_kernels.ops import Weight
from quant_kernels.packing import KV_PAGE, join_weight, unpack_kv

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Half a unit in the last place, relative to the number.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# A share of codes may land on the other side of a rounding boundary where what is rounded differs
# in its last bit, as sums of another order do: a BF16 bit is a thirtieth of an E4M3 step.
OTHER_SIDE = 0.05
# P in E4M3: every element rounded to its other neighbour would be off by 2^-3 at most, and the
# error of one such rounding, 2^-4 / sqrt(3) in the root mean square, has the metric 6.5e-4.
P_STEP, P_METRIC = 2.0**-3, 6.5e-4
# Prefill's outputs by each CUDA kernel, beside that of the op.
EXPANDS = {"unpacked by blocks": False, "unpacked before": True}
EPS = 1e-5


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
        label = f"[{m}, {k}] {_name(dtype)} {kind}"
        for op in ("quantize_activation", "rms_norm_quantize", "silu_mul_quantize"):
            found.append(Trial(op, label, partial(_activation, op, m, k, dtype, kind)))
    return found


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
    found = []
    if not small:
        numerics = "lut" if scheme == "w4afp8" else "int8"
        fmt = WeightFormat(scheme, 128, numerics)
        linears = [MODELS[0].linears[name] for name in ("down", "o")]
        found += [
            _gemm_trial(fmt, m, n, k, i)
            for m in (16, 2048, 1, 128)
            for i, (n, k) in enumerate(linears)
        ]
        n, k = MODELS[0].linears["gate_up"]
        found += [_gemm_trial(fmt, m, n, k, 0, silu=True) for m in (16, 1, 257)]
        make = partial(_streams, fmt, *MODELS[0].linears["o"])
        found.append(Trial(f"gemm_{scheme}", f"two streams at once {fmt.label}", make))
    for i, (m, n, k) in enumerate(shapes, start=2):
        fitting = [f for f in formats if f.per_channel or k % f.group_size == 0]
        for fmt in fitting if small else fitting[i % len(fitting) :: len(GROUP_SIZES)]:
            found.append(_gemm_trial(fmt, m, n, k, i))
    return found


def rope_trials(small: bool) -> list[Trial]:
    """RoPE into the cache: ratios, head dimensions, types, with and without what is optional."""
    grid = list(itertools.product(HEAD_DIMS, GQA_RATIOS))
    if small:
        return [Trial("rope_append", "T 5 D 64 ratio 3", partial(_rope, 5, 2, 3, 64, 3))]
    found = []
    for i, (dim, ratio) in enumerate(grid):
        tokens = EDGE_TOKENS[i % len(EDGE_TOKENS)]
        variant = i + i // len(GQA_RATIOS)
        label = f"T {tokens} D {dim} ratio {ratio} variant {variant}"
        found.append(Trial("rope_append", label, partial(_rope, tokens, 2, ratio, dim, variant)))
    return found


def prefill_trials(small: bool) -> list[Trial]:
    """(tokens of the chunk, tokens in the cache) of ragged batches."""
    batches = [
        ((1, 1), (65, 65), (17, 200)),
        ((128, 128), (3, 67), (64, 64), (31, 500)),
        ((257, 257), (129, 1029)),
    ]
    if small:
        batches = [((3, 3), (5, 70))]
    return _attention_trials("prefill_attention", batches, small)


def decode_trials(small: bool) -> list[Trial]:
    """Lengths around pages' edges, empty places among them, and long ones that are split."""
    batches = [
        tuple((1, n) for n in lengths)
        for lengths in ((1, 63, 64, 65, 0), (200, 1, 0, 777, 128), (4097,), (3000, 129) * 9)
    ]
    if small:
        batches = [((1, 70), (1, 0))]
    return _attention_trials("decode_attention", batches, small)


def _activation(
    op: str, m: int, k: int, dtype: torch.dtype, kind: str, device: torch.device
) -> Call:
    generator = torch.Generator(device).manual_seed(m * 31 + k)
    width = 2 * k if op == "silu_mul_quantize" else k
    x = _normal(generator, (m, width), 3.0).to(dtype)
    x[m // 2] = 0  # a token of zeros has scale 1
    weight = (1 + 0.3 * _normal(generator, (k,), 1.0)).to(dtype)
    residual = _normal(generator, (m, k), 1.0).to(dtype)
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


def _gemm_trial(
    fmt: WeightFormat, m: int, n: int, k: int, variant: int, silu: bool = False
) -> Trial:
    out, bias = DTYPES[variant % 3], variant % 2 == 1
    silu = silu or (n < 1024 and variant // 3 % 4 == 0)
    quantized = silu and variant // 12 % 2 == 0
    residual = not silu and variant // 2 % 2 == 1
    label = f"[{m}, {k}] x [{n}, {k}] {fmt.label} to {_name(out)}"
    label += " bias" * bias + " residual" * residual + " silu" * silu + " codes" * quantized
    make = partial(_gemm, fmt, m, n, k, out, bias, residual, silu, quantized)
    # Backend cutlass takes a gate of whole fragments of 64 rows.
    return Trial(f"gemm_{fmt.scheme}", label, make, everywhere=not silu or n % 128 == 0)


def _gemm(
    fmt: WeightFormat,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    with_bias: bool,
    with_residual: bool,
    silu: bool,
    quantized: bool,
    device: torch.device,
) -> Call:
    generator = torch.Generator(device).manual_seed(m * 31 + n * 7 + k)
    split = random_weight(n, k, fmt, device, m + n)
    packed = join_weight(split)
    codes, scale = reference.quantize_activation(_normal(generator, (m, k), 2.0), fmt.activation)
    bias = _normal(generator, (n,), 1.0) if with_bias else None
    residual = _normal(generator, (m, n), 1.0).bfloat16() if with_residual else None
    columns = n // 2 if silu else n

    @functools.cache
    def prepared(backend: str) -> tuple[Weight, Tensor]:
        sizes = ops.workspace_bytes(device, gemms=[(n, k)], max_tokens=m, backend=backend)
        return ops.prepare(packed, backend=backend), poison((sizes,), torch.uint8, device)

    def call(backend: str, out: Outputs) -> None:
        weight, workspace = prepared(backend)
        ops.gemm(
            codes, scale, weight, out["out"], bias=bias, residual=residual, silu_mul=silu,
            codes=out.get("codes"), scale=out.get("scale"), backend=backend, workspace=workspace,
        )  # fmt: skip

    def fresh() -> Outputs:
        made = {"out": poison((m, columns), dtype, device)}
        if quantized:
            made["codes"] = poison((m, columns), codes.dtype, device)
            made["scale"] = poison((m, 1), torch.float32, device)
        return made

    def judge(_: Outputs, found: Outputs) -> Figures:
        if quantized:
            mine = {name: x.cpu() for name, x in found.items()}
            # By the CPU: on a GPU, torch divides by 448 and by 127 with their rounded reciprocals.
            right = reference.quantize_activation(mine["out"], fmt.activation)
            same_bits("the output quantized", {"codes": right[0], "scale": right[1]}, mine)
        y = reference.gemm(codes, scale, packed, bias, torch.float32, residual)
        weight = reference.expand(packed)
        magnitudes = codes.float().abs() @ weight.operand.float().abs().T
        error = _steps(fmt, k, device) * magnitudes * scale * weight.c.T
        error += 2.0**-21 * (y.abs() + (0 if bias is None else bias.abs()))
        if silu:
            (gate, up), (gate_error, up_error) = y.chunk(2, -1), error.chunk(2, -1)
            y = F.silu(gate) * up
            # silu' is at most 1.1, and exp is good to 2^-20.
            error = (1.1 * gate_error + 2.0**-20 * gate.abs()) * (up.abs() + up_error)
            error += F.silu(gate).abs() * up_error
        # FP16 ends at 2^-24; what is in error may be rounded further away.
        bound = 1.01 * error + ROUNDING[dtype] * y.abs() + 2.0**-24
        share = close("out", y, found["out"], bound)
        accumulated = 4 * _steps(fmt, k, device) ** 2 / 2
        return {
            "share_of_bound": share,
            "metric": metric("out", y, found["out"], accumulated + ROUNDING[dtype] ** 2 + 1e-10),
        }

    return Call(fresh, call, judge)


def _streams(fmt: WeightFormat, n: int, k: int, device: torch.device) -> Call:
    """Few tokens, whose sums meet in workspaces, in two streams that run beside each other."""
    generator = torch.Generator(device).manual_seed(n)
    packed = join_weight(random_weight(n, k, fmt, device))
    inputs = [
        reference.quantize_activation(_normal(generator, (m, k), 2.0), fmt.activation)
        for m in (16, 33)
    ]
    streams = [torch.cuda.Stream(device) for _ in inputs] if device.type == "cuda" else []

    @functools.cache
    def prepared(backend: str) -> tuple[Weight, list[Tensor]]:
        size = ops.workspace_bytes(device, gemms=[(n, k)], max_tokens=64, backend=backend)
        spaces = [torch.empty(size, dtype=torch.uint8, device=device) for _ in inputs]
        return ops.prepare(packed, backend=backend), spaces

    def call(backend: str, out: Outputs) -> None:
        weight, spaces = prepared(backend)
        if backend == "reference" or not streams:
            for (codes, scale), y in zip(inputs, out.values(), strict=True):
                ops.gemm(codes, scale, weight, y, workspace=spaces[0], backend=backend)
            return
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        for _ in range(20):
            for i, y in enumerate(out.values()):
                with torch.cuda.stream(streams[i]):
                    ops.gemm(*inputs[i], weight, y, workspace=spaces[i], backend=backend)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    def fresh() -> Outputs:
        shapes = {f"out{i}": (len(codes), n) for i, (codes, _) in enumerate(inputs)}
        return {name: poison(shape, torch.float32, device) for name, shape in shapes.items()}

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        bound = 4 * _steps(fmt, k, device) ** 2 / 2 + 1e-10
        return {name: metric(name, wanted[name], found[name], bound) for name in wanted}

    return Call(fresh, call, judge)


def _steps(fmt: WeightFormat, k: int, device: torch.device) -> float:
    """The error that a sum over K may gather, relative to the sum of its terms' magnitudes.

    INT32 sums are exact. The accumulator of an FP8 tensor core is taken to keep 13 bits behind the
    leading one and to lose the rest in each of K / 32 additions; FP16's and FP32's, 22 bits of K.
    """
    if fmt.activation == "int8":
        return 0.0
    narrow = dispatch.capability(device) >= dispatch.FP8_CAPABILITY
    return (k / 32 + 1) * 2.0**-13 if narrow else k * 2.0**-22


def _rope(
    tokens: int, kv_heads: int, ratio: int, dim: int, variant: int, device: torch.device
) -> Call:
    generator = torch.Generator(device).manual_seed(dim + ratio)
    heads = kv_heads * ratio
    qkv = _normal(generator, (tokens, (heads + 2 * kv_heads) * dim), 2.0)
    qkv = qkv.to(DTYPES[variant % 3])
    angles = torch.rand(700, dim // 2, generator=generator, device=device) * 6.3
    positions = torch.randperm(700, generator=generator, device=device)[:tokens]
    pages = tokens // KV_PAGE + 3
    slots = torch.randperm(pages * KV_PAGE, generator=generator, device=device)[:tokens]
    slots[tokens // 2] = -1
    weights = [1 + 0.3 * _normal(generator, (dim,), 1.0) for _ in range(2)]
    scale = 0.5 + torch.rand(kv_heads, dim, generator=generator, device=device)
    shift = _normal(generator, (kv_heads, dim), 0.5)
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


def _attention_trials(
    op: str, batches: Sequence[Sequence[tuple[int, int]]], small: bool
) -> list[Trial]:
    grid: Iterator[tuple[int, int]] = itertools.product(HEAD_DIMS, GQA_RATIOS)
    chosen = [(64, 3)] if small else sorted(grid, key=lambda pair: pair != (128, 4))
    found = []
    for i, ((dim, ratio), batch) in enumerate(itertools.product(chosen, batches)):
        window = (0, 37, 0, 200)[(i + i // len(batches)) % 4]
        label = f"D {dim} ratio {ratio} window {window} {_name(DTYPES[i % 3])} batch {len(batch)}"
        label += f" up to {max(length for _, length in batch)} keys"
        make = partial(_attention, op, tuple(batch), 2, ratio, dim, window, DTYPES[i % 3])
        # Backend cutlass has kernels of these head dimensions.
        found.append(Trial(op, label, make, everywhere=dim in (64, 128, 256)))
    return found


def _attention(
    op: str,
    batch: Sequence[tuple[int, int]],
    kv_heads: int,
    ratio: int,
    dim: int,
    window: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Call:
    generator = torch.Generator(device).manual_seed(dim + ratio + len(batch))
    chunks, lengths = ([pair[i] for pair in batch] for i in (0, 1))
    tokens, heads = sum(chunks), kv_heads * ratio
    needed = [-(-length // KV_PAGE) for length in lengths]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    table = torch.zeros(len(batch), max(needed), dtype=torch.int32, device=device)
    codes = torch.randint(
        0, 256, (2, pages, kv_heads, KV_PAGE, dim // 2), generator=generator, device=device
    ).to(torch.uint8)
    scales = torch.full((2, pages, kv_heads, KV_PAGE, 2), float("nan"), device=device)
    start = 0
    for b, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        table[b, :count] = order[start : start + count]
        for i in range(count):
            part = scales[:, int(order[start + i]), :, : length - i * KV_PAGE]
            size = part.shape[:-1]
            part[..., 0] = 0.02 + 0.18 * torch.rand(size, generator=generator, device=device)
            part[..., 1] = _normal(generator, size, 0.3)
        start += count
    scales = scales.half()
    q = _normal(generator, (tokens, heads, dim), 1.0)
    q_codes, q_scale = reference.quantize_activation(q, "fp8")
    q_scale = q_scale.squeeze(-1)
    bounds = torch.tensor([0, *itertools.accumulate(chunks)], dtype=torch.int32, device=device)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    form = (len(batch), heads, kv_heads, dim)
    sm_scale = dim**-0.5

    def call(backend: str, out: Outputs) -> None:
        cache = (q_codes, q_scale, codes, scales, table)
        if op == "prefill_attention":
            ops.prefill_attention(
                *cache, bounds, kv_lens, max(chunks), out["out"],
                sm_scale=sm_scale, window=window, backend=backend,
            )  # fmt: skip
            for name, expand in EXPANDS.items():
                if backend == "cutlass":
                    cuda_attention.prefill_attention(
                        *cache, bounds, kv_lens, max(chunks), out[name], sm_scale, window,
                        expand=expand,
                    )  # fmt: skip
                else:
                    out[name].copy_(out["out"])
        else:
            size = ops.workspace_bytes(device, attention=form, backend=backend)
            ops.decode_attention(
                *cache, kv_lens, out["out"], sm_scale=sm_scale, window=window,
                workspace=poison((size,), torch.uint8, device), backend=backend,
            )  # fmt: skip

    def fresh() -> Outputs:
        names = ("out", *EXPANDS) if op == "prefill_attention" else ("out",)
        return {name: poison((tokens, heads, dim), dtype, device) for name in names}

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        for name in found:
            same_bits(name, {"out": found["out"]}, {"out": found[name]})
        largest = 8 * float(scales[1, ..., 0].nan_to_num().abs().max())
        bound = P_STEP * largest + 2 * ROUNDING[dtype] * wanted["out"].double().abs() + 1e-6
        share = close("out", wanted["out"], found["out"], bound)
        rounded = ROUNDING[dtype] ** 2
        value = metric("out", wanted["out"], found["out"], P_METRIC + rounded)
        return {"share_of_bound": share, "metric": value}

    return Call(fresh, call, judge)


def _normal(generator: torch.Generator, shape: Sequence[int], deviation: float) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device) * deviation


def _turned(values: Sequence[int], places: int) -> list[int]:
    """The values, beginning with another one."""
    start = places % len(values)
    return [*values[start:], *values[:start]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
