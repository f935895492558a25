"""Attention over the INT4 cache: microseconds, rates, share of the roofline, and BF16 beside.

    python benchmarks/attention.py --json attention.json --markdown attention.md

Prefill: one causal prompt of S tokens, its keys and values in the cache already. Decode: B
sequences of one length, one new token each. The baseline is torch's scaled_dot_product_attention
over BF16 keys and values that lie contiguous, which ours do not: the fastest of its cuDNN, flash
and memory-efficient kernels, with grouped heads or with keys and values repeated beforehand, and in
decode also with the query heads of a KV head as rows of one call, which reads the cache once.
"cutlass, unpacking" is cutlass with prefill's pages unpacked where they are read, never before.

Caches are random bytes with random scales. Pages lie in random order. Small ones rotate through
several, larger than the L2 cache together (`timing.py`).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.gemm import add_rates, number  # noqa: E402
from benchmarks.libraries import ALLOW_MISSING, require_cutlass  # noqa: E402
from benchmarks.roofline import decode_work, measure_peaks, plot, prefill_work  # noqa: E402
from benchmarks.shapes import CONTEXTS, MODELS, ModelShape  # noqa: E402
from benchmarks.timing import (  # noqa: E402
    Call,
    best_of,
    copies,
    first_line,
    gpu_state,
    l2_bytes,
    measure,
    said,
)
from quant_kernels import cuda_attention, dispatch, ops  # noqa: E402
from quant_kernels.packing import KV_PAGE  # noqa: E402

BATCHES = (1, 8, 16, 64)
QUICK_CONTEXTS = (2048, 16384)
QUICK_BATCHES = (1, 16)
SDPA, UNPACKING = "sdpa", "cutlass, unpacking"
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# Of the free memory that a shape may take; what needs more is left out and said so.
MEMORY_SHARE = 0.8
HEADER = """\
| attention | backend | batch | context | us | spread | TFLOP/s | GB/s | roofline \
| bf16 us | bf16 by | x bf16 |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


class Cache:
    """Random INT4 caches of `batch` sequences: one pool of pages, a block table for each."""

    def __init__(self, model: ModelShape, batch: int, length: int, device: torch.device) -> None:
        pages = math.ceil(length / KV_PAGE)
        size = batch * pages * KV_PAGE * model.kv_heads * (model.head_dim + 8)
        number = copies(size, l2_bytes(device))
        total = number * batch * pages
        form = (2, total, model.kv_heads, KV_PAGE)
        self.codes = torch.empty(*form, model.head_dim // 2, dtype=torch.uint8, device=device)
        self.codes.random_(0, 256)
        self.scales = torch.empty(*form, 2, dtype=torch.float16, device=device)
        self.scales[..., 0].uniform_(0.02, 0.2)
        self.scales[..., 1].normal_(0, 0.3)
        order = torch.randperm(total, device=device).to(torch.int32)
        # Tensors of their own: aligned as a step's block table is.
        self.tables = [table.clone() for table in order.view(number, batch, pages)]
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=device)


def queries(tokens: int, model: ModelShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of random queries, and where their attention goes."""
    shape = (tokens, model.heads, model.head_dim)
    codes = (torch.randn(shape, device=device, dtype=torch.bfloat16) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(tokens, model.heads, device=device) * 0.005 + 0.001
    return codes, scale, torch.empty(shape, dtype=torch.bfloat16, device=device)


def prefill_calls(
    model: ModelShape, length: int, device: torch.device, backend: str = "triton"
) -> list[functools.partial[None]]:
    """Our prefill of a prompt, a call for every copy of its cache."""
    cache = Cache(model, 1, length, device)
    codes, scale, out = queries(length, model, device)
    bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
    return [
        functools.partial(
            ops.prefill_attention, codes, scale, cache.codes, cache.scales, table, bounds,
            cache.lengths, length, out, sm_scale=model.head_dim**-0.5, backend=backend,
        )
        for table in cache.tables
    ]  # fmt: skip


def unpacking_calls(model: ModelShape, length: int, device: torch.device) -> list[Call]:
    """The same by the CUDA kernel whose blocks unpack their pages themselves."""
    return [
        functools.partial(
            cuda_attention.prefill_attention, *call.args, window=0, expand=False,
            sm_scale=call.keywords["sm_scale"],
        )
        for call in prefill_calls(model, length, device, "cutlass")
    ]  # fmt: skip


def decode_calls(
    model: ModelShape, batch: int, length: int, device: torch.device, backend: str = "triton"
) -> list[Call]:
    """Our decode step, a call for every copy of the caches."""
    cache = Cache(model, batch, length, device)
    codes, scale, out = queries(batch, model, device)
    heads = (batch, model.heads, model.kv_heads, model.head_dim)
    size = ops.workspace_bytes(device, attention=heads, backend=backend)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return [
        functools.partial(
            ops.decode_attention, codes, scale, cache.codes, cache.scales, table, cache.lengths,
            out, sm_scale=model.head_dim**-0.5, workspace=workspace, backend=backend,
        )
        for table in cache.tables
    ]  # fmt: skip


def baselines(
    model: ModelShape, batch: int, queries: int, length: int, device: torch.device
) -> dict[str, list[Call]]:
    """Ways for torch to attend from the last `queries` tokens, all of a prompt or one, in BF16."""
    size = 4 * batch * length * model.kv_heads * model.head_dim
    number, ratio = copies(size, l2_bytes(device)), model.heads // model.kv_heads

    def tensor(heads: int, tokens: int) -> Tensor:
        shape = (batch, heads, tokens, model.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    q = tensor(model.heads, queries)
    pairs = [
        (tensor(model.kv_heads, length), tensor(model.kv_heads, length)) for _ in range(number)
    ]
    causal = queries > 1
    ways: dict[str, list[Call]] = {}
    for name, backend in KERNELS.items():
        ways[f"{name}, grouped"] = [
            _sdpa(backend, (q, *pair), causal, grouped=ratio > 1) for pair in pairs
        ]
        if not causal and ratio > 1:
            rows = q.view(batch, model.kv_heads, ratio, model.head_dim)
            ways[f"{name}, query heads as rows"] = [_sdpa(backend, (rows, *pair)) for pair in pairs]
    if causal and ratio > 1:
        repeated = [[x.repeat_interleave(ratio, dim=1) for x in pair] for pair in pairs[:2]]
        for name, backend in KERNELS.items():
            ways[f"{name}, repeated"] = [_sdpa(backend, (q, *pair), causal) for pair in repeated]
    return ways


def contestants(op: str, device: torch.device) -> list[str]:
    """Who attends in "prefill" or "decode" on a device, torch first."""
    found = [SDPA, *backends(f"{op}_attention", device)]
    return [*found, UNPACKING] if op == "prefill" and "cutlass" in found else found


def about(op: str, model: ModelShape, batch: int, context: int, backend: str) -> dict[str, Any]:
    """What a row says before it has a time."""
    row = {"op": op, "model": model.name, "batch": batch, "context": context, "backend": backend}
    form = (model.heads, model.kv_heads, model.head_dim)
    work = prefill_work(context, *form) if op == "prefill" else decode_work(batch, context, *form)
    return row | asdict(work)


def measure_attention(
    op: str, model: ModelShape, batch: int, context: int, backend: str, device: torch.device
) -> dict[str, Any]:
    """The time of one contestant; "skipped" where the shape does not fit the memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info(device)[0], bytes_of(op, model, batch, context)
        if needed > MEMORY_SHARE * free:
            return {"skipped": f"needs {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB free"}
    if backend == SDPA:
        queries = context if op == "prefill" else 1
        name, timing = best_of(baselines(model, batch, queries, context, device), device)
        return asdict(timing) | {"by": name}
    if backend == UNPACKING:
        calls: Sequence[Call] = unpacking_calls(model, context, device)
    elif op == "prefill":
        calls = prefill_calls(model, context, device, backend)
    else:
        calls = decode_calls(model, batch, context, device, backend)
    return asdict(measure(calls, device))


def bytes_of(op: str, model: ModelShape, batch: int, context: int) -> int:
    """What the baseline holds, which is more than ours."""
    if op == "decode":
        return 4 * batch * context * model.kv_heads * model.head_dim * 2
    ratio = model.heads // model.kv_heads
    heads = 3 * model.heads + 2 * model.kv_heads * (1 + ratio)
    return 2 * context * model.head_dim * heads


def joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a backend, with torch's time and the ratio. parts: `about` with `measure_attention`."""

    def key(part: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(part[name] for name in ("op", "model", "batch", "context"))

    theirs = {key(part): part for part in parts if part["backend"] == SDPA}
    rows = []
    for row in (dict(part) for part in parts if part["backend"] != SDPA):
        found = theirs.get(key(row), {})
        row |= {f"bf16_{name}": found.get(name) for name in ("us", "spread", "how", "by", "error")}
        both = row.get("us") and row["bf16_us"]
        row["x_bf16"] = row["bf16_us"] / row["us"] if both else None
        rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; a ratio above 1 is in our favour."""
    lines = HEADER.splitlines()
    for row in rows:
        head = [f"{row['model']} {row['op']}", row.get("backend", "")]
        head += [str(row["batch"]), str(row["context"])]
        if "us" not in row:
            reason = row.get("error") or row.get("skipped")
            lines.append("| " + " | ".join([*head, str(reason)]) + " |" * 8)
            continue
        share = row.get("roofline")
        cells = [
            f"{row['us']:.1f}", f"{row['spread']:.0%}",
            f"{row.get('tflops', 0):.0f}", f"{row.get('gbps', 0):.0f}",
            "" if share is None else f"{share:.0%}",
            number(row["bf16_us"], 1), row["bf16_by"] or "", number(row["x_bf16"], 2),
        ]  # fmt: skip
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _sdpa(
    backend: SDPBackend, qkv: Sequence[Tensor], causal: bool = False, grouped: bool = False
) -> Call:
    def call() -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=grouped)

    return call


def backends(op: str, device: torch.device) -> list[str]:
    """Whose kernels of an op run on a device: Triton's, and cutlass's on Hopper."""
    try:
        return ["triton", dispatch.choose(op, device, "cutlass")]
    except dispatch.BackendUnavailable:
        return ["triton"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--quick", action="store_true", help="the first model, few shapes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="the roofline, as PNG")
    parser.add_argument("--allow-missing", action="store_true", help=ALLOW_MISSING)
    args = parser.parse_args()
    device = torch.device(args.device)
    chosen = [model for model in MODELS if not args.models or model.name in args.models]
    require_cutlass(device, args.allow_missing)
    peaks = measure_peaks(device)
    parts: list[dict[str, Any]] = []
    for model in chosen[:1] if args.quick else chosen:
        for context in QUICK_CONTEXTS if args.quick else CONTEXTS:
            pairs = [("prefill", 1)]
            pairs += [("decode", batch) for batch in (QUICK_BATCHES if args.quick else BATCHES)]
            for op, batch in pairs:
                for backend in contestants(op, device):
                    shape = (op, model, batch, context, backend)
                    parts.append(about(*shape))
                    try:
                        parts[-1] |= measure_attention(*shape, device)
                    except Exception as error:
                        parts[-1]["error"] = first_line(error)
                    what = f"{model.name} {op} {batch} x {context} {backend}"
                    print(f"{what}: {said(parts[-1])}", flush=True)
    rows = joined(parts)
    add_rates(rows, peaks)
    print(markdown(rows))
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if args.plot:
        plot([row for row in rows if "us" in row], peaks, args.plot)
    if args.json:
        figures = {"gpu": gpu_state(device), "peaks": asdict(peaks), "attention": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
