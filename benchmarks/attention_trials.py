"""Attention's trials: all ratios of query to KV heads, all head dimensions, windows, soft caps,
skipping, and batches of ragged lengths with empty places.

What a cache holds beyond a sequence's length is NaN, as it may be in memory that nobody has
written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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
from benchmarks.shapes import GQA_RATIOS, HEAD_DIMS
from quant_kernels import cuda_attention, ops, reference
from quant_kernels.packing import KV_PAGE

# P in E4M3: every element rounded to its other neighbour would be off by 2^-3 at most, and the
# error of one such rounding, 2^-4 / sqrt(3) in the root mean square, has the metric 6.5e-4.
P_STEP, P_METRIC = 2.0**-3, 6.5e-4
# Prefill's outputs by each CUDA kernel, beside that of the op.
EXPANDS = {"unpacked by blocks": False, "unpacked before": True}
PREFILL, DECODE = "prefill_attention", "decode_attention"
CUTLASS = ("cutlass",)
SKIP = 12.0  # a threshold in powers of two
# Of a sink, in the offset of its keys: with queries around 1, scores SINK sqrt(D) above the others.
SINK = 3.0


@dataclass(frozen=True)
class AttentionCase:
    """Attention over a batch of (tokens of the chunk, keys in the cache).

    sink: the keys of every sequence's first page have scores so high that skip_threshold leaves
    out all others. expand: which of prefill's CUDA kernels; None: the op, and both beside it.
    """

    op: str
    batch: tuple[tuple[int, int], ...]
    dim: int
    ratio: int
    window: int = 0
    dtype: torch.dtype = torch.float32
    soft_cap: float = 0.0
    skip_threshold: float = 0.0
    sink: bool = False
    expand: bool | None = None
    kv_heads: int = 2

    @property
    def label(self) -> str:
        words = [f"D {self.dim} ratio {self.ratio} window {self.window} {name_of(self.dtype)}"]
        chunks = ", ".join("/".join(map(str, pair)) for pair in self.batch[:4])
        words.append(f"batch {len(self.batch)} of {chunks}{' ...' * (len(self.batch) > 4)}")
        words += [f"soft cap {self.soft_cap:g}"] if self.soft_cap else []
        words += [f"skips {self.skip_threshold:g}"] if self.skip_threshold else []
        words += ["sink"] if self.sink else []
        words += [name for name, expand in EXPANDS.items() if expand is self.expand]
        return " ".join(words)

    def trial(self, backends: tuple[str, ...] = BACKENDS) -> Trial:
        """Of these backends, as far as they take it."""
        if self.dim not in cuda_attention.HEAD_DIMS:
            backends = tuple(backend for backend in backends if backend != "cutlass")
        return Trial(self.op, self.label, partial(attention_call, self), backends)


def prefill_trials(small: bool) -> list[Trial]:
    """Ragged batches; on Hopper also what its kernels alone can do."""
    if small:
        return _trials(PREFILL, [((3, 3), (5, 70))], small)
    batches = [
        ((1, 1), (65, 65), (17, 200)),
        ((128, 128), (3, 67), (64, 64), (31, 500)),
        ((257, 257), (129, 1029)),
    ]
    batch = batches[1]
    ours = [AttentionCase(PREFILL, batch, dim, 4, soft_cap=30.0) for dim in (64, 128)]
    ours += [
        AttentionCase(PREFILL, batches[2], dim, 4, skip_threshold=SKIP, sink=True)
        for dim in cuda_attention.HEAD_DIMS
    ]
    many = tuple((1 + 29 * i % 130, 1 + 29 * i % 130) for i in range(40))
    ours.append(AttentionCase(PREFILL, many, 128, 4, expand=True))
    return [case.trial(CUTLASS) for case in ours] + _trials(PREFILL, batches, small)


def decode_trials(small: bool) -> list[Trial]:
    """Lengths around pages' edges, empty places among them, and long ones that are split."""
    if small:
        return _trials(DECODE, [((1, 70), (1, 0))], small)
    batches = [
        tuple((1, n) for n in lengths)
        for lengths in ((1, 63, 64, 65, 0), (200, 1, 0, 777, 128), (4097,), (3000, 129) * 9)
    ]
    ours = [AttentionCase(DECODE, batches[1], dim, 16) for dim in cuda_attention.HEAD_DIMS]
    ours += [AttentionCase(DECODE, batches[1], 128, 4, soft_cap=30.0)]
    pair = (AttentionCase(DECODE, batches[1], 128, 4), AttentionCase(DECODE, batches[2], 128, 8))
    # Not captured: a graph of two streams that fails says nothing of the kernels in it.
    together = Trial(DECODE, "two streams at once", partial(_at_once, pair), captured=False)
    return [*(case.trial(CUTLASS) for case in ours), together, *_trials(DECODE, batches, small)]


def _trials(op: str, batches: Sequence[Sequence[tuple[int, int]]], small: bool) -> list[Trial]:
    grid: Iterator[tuple[int, int]] = itertools.product(HEAD_DIMS, GQA_RATIOS)
    chosen = [(64, 3)] if small else sorted(grid, key=lambda pair: pair != (128, 4))
    found = []
    for i, ((dim, ratio), batch) in enumerate(itertools.product(chosen, batches)):
        window = (0, 37, 0, 200)[(i + i // len(batches)) % 4]
        case = AttentionCase(op, tuple(batch), dim, ratio, window, DTYPES[i % 3])
        found.append(case.trial())
    return found


@dataclass(frozen=True)
class Inputs:
    """What attention reads: queries, cache [2, pages, kv_heads, KV_PAGE, ...], lengths."""

    q_codes: Tensor
    q_scale: Tensor
    codes: Tensor
    scales: Tensor
    table: Tensor
    bounds: Tensor
    kv_lens: Tensor

    @property
    def cache(self) -> tuple[Tensor, ...]:
        return self.q_codes, self.q_scale, self.codes, self.scales, self.table


def random_inputs(case: AttentionCase, device: torch.device) -> Inputs:
    """Pages in random order; places behind a sequence's last key have NaN for a scale."""
    dim, batch = case.dim, case.batch
    generator = torch.Generator(device).manual_seed(dim + case.ratio + len(batch))
    chunks, lengths = ([pair[i] for pair in batch] for i in (0, 1))
    needed = [-(-length // KV_PAGE) for length in lengths]
    pages = sum(needed) + 3
    order = torch.randperm(pages, generator=generator, device=device).to(torch.int32)
    table = torch.zeros(len(batch), max(needed), dtype=torch.int32, device=device)
    shape = (2, pages, case.kv_heads, KV_PAGE)
    codes = torch.randint(0, 256, (*shape, dim // 2), generator=generator, device=device)
    scales = torch.full((*shape, 2), float("nan"), device=device)
    start = 0
    for b, (count, length) in enumerate(zip(needed, lengths, strict=True)):
        table[b, :count] = order[start : start + count]
        for i in range(count):
            part = scales[:, int(order[start + i]), :, : length - i * KV_PAGE]
            size = part.shape[:-1]
            part[..., 0] = 0.02 + 0.18 * torch.rand(size, generator=generator, device=device)
            part[..., 1] = normal(generator, size, 0.3)
            if case.sink and i == 0:
                part[0, ..., 1] += SINK
        start += count
    q = normal(generator, (sum(chunks), case.kv_heads * case.ratio, dim), 1.0) + case.sink
    q_codes, q_scale = reference.quantize_activation(q, "fp8")
    bounds = torch.tensor([0, *itertools.accumulate(chunks)], dtype=torch.int32, device=device)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Inputs(
        q_codes, q_scale.squeeze(-1), codes.to(torch.uint8), scales.half(), table, bounds, kv_lens
    )


def attention_call(case: AttentionCase, device: torch.device) -> Call:
    """The case on random arguments."""
    given = random_inputs(case, device)
    longest = max(chunk for chunk, _ in case.batch)
    options: dict[str, Any] = {"sm_scale": case.dim**-0.5, "window": case.window}
    options |= {"soft_cap": case.soft_cap} if case.soft_cap else {}
    skips = {"skip_threshold": case.skip_threshold} if case.skip_threshold else {}
    heads = case.kv_heads * case.ratio
    form = (len(case.batch), heads, case.kv_heads, case.dim)

    def prefill(backend: str, out: Outputs) -> None:
        given_all = (*given.cache, given.bounds, given.kv_lens, longest)

        def by_kernel(y: Tensor, expand: bool) -> None:
            cuda_attention.prefill_attention(*given_all, y, **options, **skips, expand=expand)

        if case.expand is None or backend != "cutlass":
            ops.prefill_attention(*given_all, out["out"], **options, **skips, backend=backend)
        else:
            by_kernel(out["out"], case.expand)
        for name in out.keys() & EXPANDS.keys():
            if backend == "cutlass":
                by_kernel(out[name], EXPANDS[name])
            else:
                out[name].copy_(out["out"])

    def decode(backend: str, out: Outputs) -> None:
        size = ops.workspace_bytes(device, attention=form, backend=backend)
        workspace = poison((size,), torch.uint8, device)
        ops.decode_attention(
            *given.cache, given.kv_lens, out["out"], **options, workspace=workspace,
            backend=backend,
        )  # fmt: skip

    def fresh() -> Outputs:
        every = case.op == PREFILL and case.expand is None
        shape = (len(given.q_codes), heads, case.dim)
        names = ("out", *EXPANDS) if every else ("out",)
        return {name: poison(shape, case.dtype, device) for name in names}

    run: Callable[[str, Outputs], None] = prefill if case.op == PREFILL else decode
    return Call(fresh, run, partial(_judge, case, given))


def _judge(case: AttentionCase, given: Inputs, wanted: Outputs, found: Outputs) -> Figures:
    for name in found:
        same_bits(name, {"out": found["out"]}, {"out": found[name]})
    values = given.scales[1].double().nan_to_num().abs()
    step = 8 * float(values[..., 0].max())
    bound = P_STEP * step + 2 * ROUNDING[case.dtype] * wanted["out"].double().abs() + 1e-6
    if case.skip_threshold:
        # A row skips no key that is above 2^-threshold of its largest term (`ops`), and values lie
        # no further apart than twice what the largest can be.
        keys = max(length for _, length in case.batch)
        apart = 2 * (step + float(values[..., 1].max()))
        bound = bound + keys * 2.0**-case.skip_threshold * apart
    share = close("out", wanted["out"], found["out"], bound)
    value = metric("out", wanted["out"], found["out"], P_METRIC + ROUNDING[case.dtype] ** 2)
    return {"share_of_bound": share, "metric": value}


def _at_once(cases: Sequence[AttentionCase], device: torch.device) -> Call:
    """Decode steps, each with a workspace of its own, in streams that run beside each other."""
    calls = [attention_call(case, device) for case in cases]

    def parts(out: Outputs) -> list[Outputs]:
        return [{"out": y} for y in out.values()]

    def run(backend: str, out: Outputs) -> None:
        pairs = zip(calls, parts(out), strict=True)
        at_once(device, [partial(call.run, backend, part) for call, part in pairs], backend)

    def fresh() -> Outputs:
        return {f"out{i}": call.fresh()["out"] for i, call in enumerate(calls)}

    def judge(wanted: Outputs, found: Outputs) -> Figures:
        figures: Figures = {}
        for i, (call, x, y) in enumerate(zip(calls, parts(wanted), parts(found), strict=True)):
            figures |= {f"{name} {i}": value for name, value in call.judge(x, y).items()}
        return figures

    return Call(fresh, run, judge)
