"""Attention over the INT4 cache on a CPU: rates, and the machine's own beside them.

    python benchmarks/cpu_attention.py --threads 2 --markdown cpu_attention.md

Decode: a step of B sequences of one length; GB/s are of the INT4 cache that it reads, beside what
torch.sum reads of a large buffer, and torch's scaled_dot_product_attention over BF16 keys and
values that lie contiguous (query heads of a KV head as rows of one call, which reads them once).
Prefill: a causal prompt; TFLOP/s, beside scaled_dot_product_attention in BF16 with keys and values
repeated for its heads.

Every round times the probe, ours and torch's one after the other, and shares and ratios are medians
over rounds: what else the machine does meets all three. Caches of one row rotate, so that what is
read is not in the last-level cache as far as memory goes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.shapes import ModelShape  # noqa: E402
from quant_kernels import cpu, ops  # noqa: E402
from quant_kernels.packing import KV_PAGE  # noqa: E402

MODELS = (
    ModelShape("SmolLM2-135M", 576, 1536, 9, 3, 64),
    ModelShape("Llama-3-8B", 4096, 14336, 32, 8, 128),
    ModelShape("Llama-2-7B", 4096, 11008, 32, 32, 128),
)
DECODES = ((1, 1024), (1, 16384), (8, 4096))
PROMPTS = (512, 2048)
PROBE_BYTES = 2**29
ROTATED_BYTES = 2**29  # of caches, and as many of BF16 keys and values
HEADER = (
    "| attention | batch | context | us | rate | of the probe | bf16 us | x bf16 |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def cache(model: ModelShape, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and the block table of some sequences, their pages in random order."""
    needed = math.ceil(length / KV_PAGE)
    shape = (2, batch * needed, model.kv_heads, KV_PAGE)
    codes = torch.randint(0, 256, (*shape, model.head_dim // 2), dtype=torch.uint8)
    scales = torch.empty(*shape, 2, dtype=torch.float16)
    scales[..., 0].uniform_(0.02, 0.2)
    scales[..., 1].normal_(0, 0.3)
    return codes, scales, torch.randperm(batch * needed).int().view(batch, needed)


def queries(tokens: int, model: ModelShape) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of random queries, and where their attention goes."""
    shape = (tokens, model.heads, model.head_dim)
    codes = (torch.randn(shape) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(tokens, model.heads) * 0.005 + 0.001
    return codes, scale, torch.empty(shape, dtype=torch.bfloat16)


def decode_calls(
    model: ModelShape, batch: int, length: int
) -> tuple[list[Callable[[], object]], list[Callable[[], object]], int]:
    """Ours and torch's, a call a copy of the cache, and the bytes that one of ours reads."""
    read = 2 * batch * length * model.kv_heads * (model.head_dim // 2 + 4)
    codes, scale, out = queries(batch, model)
    lengths = torch.full((batch,), length, dtype=torch.int32)

    def ours(pages: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
        return lambda: ops.decode_attention(
            codes, scale, *pages, lengths, out, sm_scale=model.head_dim**-0.5, backend="cpu"
        )

    ratio = model.heads // model.kv_heads
    rows = torch.randn(batch, model.kv_heads, ratio, model.head_dim, dtype=torch.bfloat16)
    size = 4 * batch * length * model.kv_heads * model.head_dim
    pairs = [
        [torch.randn(batch, model.kv_heads, length, model.head_dim).bfloat16() for _ in range(2)]
        for _ in range(max(1, ROTATED_BYTES // size))
    ]
    copies = [cache(model, batch, length) for _ in range(max(1, ROTATED_BYTES // read))]
    theirs = [lambda pair=pair: F.scaled_dot_product_attention(rows, *pair) for pair in pairs]
    return [ours(pages) for pages in copies], theirs, read


def prefill_calls(
    model: ModelShape, length: int
) -> tuple[list[Callable[[], object]], list[Callable[[], object]], int]:
    """Ours and torch's, and the FLOP of one."""
    codes, scale, out = queries(length, model)
    pages = cache(model, 1, length)
    bounds, lengths = torch.tensor([0, length]).int(), torch.tensor([length]).int()
    qkv = [torch.randn(1, model.heads, length, model.head_dim).bfloat16() for _ in range(3)]
    return (
        [
            lambda: ops.prefill_attention(
                codes, scale, *pages, bounds, lengths, length, out,
                sm_scale=model.head_dim**-0.5, backend="cpu",
            )
        ],
        [lambda: F.scaled_dot_product_attention(*qkv, is_causal=True)],
        2 * length * (length + 1) * model.heads * model.head_dim,
    )  # fmt: skip


def seconds(calls: list[Callable[[], object]], least: float) -> float:
    """Of one call: as many as take `least` seconds, rotating; the first is not counted."""
    calls[-1]()
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least:
        calls[done % len(calls)]()
        done += 1
    return passed / done


def row(name: str, batch: int, length: int, calls: tuple, rounds: int, memory: Tensor) -> str:
    """One line of the table."""
    ours, theirs, work = calls
    samples = []
    for _ in range(rounds):
        probe = memory.numel() * memory.element_size() / seconds([memory.sum], 0.1)
        samples.append((seconds(ours, 0.1), seconds(theirs, 0.1), probe))
    mine, bf16 = (statistics.median(sample[i] for sample in samples) for i in range(2))
    ratio = statistics.median(other / own for own, other, _ in samples)
    rate, share = f"{work / mine / 1e12:.3f} TFLOP/s", ""
    if "decode" in name:
        rate = f"{work / mine / 1e9:.1f} GB/s"
        share = f"{statistics.median(work / own / probe for own, _, probe in samples):.0%}"
    cells = (name, batch, length, f"{mine * 1e6:.0f}", rate, share, f"{bf16 * 1e6:.0f}")
    return "| " + " | ".join(map(str, cells)) + f" | {ratio:.2f} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--isas", nargs="+", default=[cpu.isa()], help="of " + " ".join(cpu.isas()))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    memory = torch.zeros(PROBE_BYTES // 8, dtype=torch.int64)
    lines = HEADER
    print(HEADER, end="")
    for model in MODELS:
        if args.models and model.name not in args.models:
            continue
        shapes = [(batch, length, True) for batch, length in DECODES]
        for batch, length, decode in [*shapes, *((1, length, False) for length in PROMPTS)]:
            make = decode_calls(model, batch, length) if decode else prefill_calls(model, length)
            for isa in args.isas:
                cpu.set_isa(isa)
                name = f"{model.name} {'decode' if decode else 'prefill'}, {isa}"
                line = row(name, batch, length, make, args.rounds, memory)
                print(line, end="", flush=True)
                lines += line
    if args.markdown:
        args.markdown.write_text(lines)


if __name__ == "__main__":
    main()
