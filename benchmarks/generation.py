"""Time to the first token, time per token after it, and memory: our runtime beside transformers.

    python benchmarks/generation.py QUANTIZED --baseline DENSE --batch 1 4 --prompt 128 512 \\
        --json generation.json

QUANTIZED and DENSE are Hugging Face directories (or .gguf files) of the same model. For every batch
and prompt length, greedily and past any end of sequence:

    TTFT = seconds of generating 1 token,   TPOT = (seconds of generating N - TTFT) / (N - 1)

medians over --repeats, after one of each that does not count. Prompts are random tokens. An engine
runs in a process of its own, so that its peak memory is its own: resident bytes, and on a GPU what
tensors took there. transformers runs DENSE in BF16, as it comes and, with --compiled, with its
static cache and torch.compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from quant.checkpoint.source import resolve_model  # noqa: E402
from quant.device import select_device  # noqa: E402
from quant.memory import peak_device_bytes, peak_memory_bytes, reset_peak_memory  # noqa: E402

ENGINES = ("fourbyeight", "transformers", "transformers compiled")
VOCABULARY = 256  # prompts use the first tokens of it, which every model has

# (prompts [B][S], tokens to generate) -> token ids, [B][N]
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Cell:
    """One engine at one batch and prompt length. Seconds; tokens_per_second: while decoding."""

    engine: str
    batch: int
    prompt: int
    ttft: float
    tpot: float
    tokens_per_second: float
    peak_memory_bytes: int
    peak_device_bytes: int | None


def prompts(batch: int, length: int) -> list[list[int]]:
    """Random token ids [batch][length], the same for every engine."""
    generator = torch.Generator().manual_seed(batch * 100_003 + length)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator).tolist()


def our_engine(model: str, device: str, batch: int, length: int) -> Generate:
    """`LLM` with room for `batch` sequences of `length` tokens."""
    from quant.runtime.llm import LLM
    from quant.runtime.sampling import SamplingParams

    llm = LLM(model, device=device, max_num_seqs=batch, max_model_len=length)

    def generate(given: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [output.outputs[0].token_ids for output in llm.generate(given, params)]

    return generate


def transformers_engine(model: str, device: str, compiled: bool) -> Generate:
    """transformers' `generate` in BF16."""
    from transformers import AutoModelForCausalLM

    target = select_device(device)
    directory = resolve_model(model)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(target)
    cache = {"cache_implementation": "static"} if compiled else {}

    @torch.inference_mode()
    def generate(given: list[list[int]], count: int) -> list[list[int]]:
        tokens = torch.tensor(given, device=target)
        found = loaded.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **cache,
        )
        rows: list[list[int]] = found[:, tokens.shape[1] :].tolist()
        return rows

    return generate


def measure(
    engine: str, generate: Generate, batch: int, length: int, count: int, repeats: int, device: str
) -> Cell:
    """The medians of `repeats` runs after one that does not count."""
    given = prompts(batch, length)
    target = select_device(device)

    def seconds(wanted: int) -> float:
        if target.type == "cuda":
            torch.cuda.synchronize(target)
        started = time.perf_counter()
        rows = generate(given, wanted)
        taken = time.perf_counter() - started
        if [len(row) for row in rows] != [wanted] * batch:
            raise SystemExit(f"{engine} gave {[len(row) for row in rows]} tokens, not {wanted}")
        return taken

    for wanted in (1, count):
        seconds(wanted)
    reset_peak_memory()
    first = statistics.median(seconds(1) for _ in range(repeats))
    whole = statistics.median(seconds(count) for _ in range(repeats))
    tpot = (whole - first) / (count - 1)
    return Cell(
        engine, batch, length, first, tpot, batch / tpot, peak_memory_bytes(),
        peak_device_bytes(target),
    )  # fmt: skip


def markdown(cells: Sequence[Cell]) -> str:
    """A row a cell; x: how often TTFT and TPOT of transformers are ours."""
    base = {(c.batch, c.prompt): c for c in cells if c.engine == "transformers"}
    lines = [
        "| engine | batch | prompt | TTFT ms | x | TPOT ms | x | tokens/s | memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in sorted(cells, key=lambda c: (c.batch, c.prompt, ENGINES.index(c.engine))):
        other = base.get((cell.batch, cell.prompt))
        ratios = ("", "")
        if other is not None and other is not cell:
            ratios = (f"{other.ttft / cell.ttft:.2f}", f"{other.tpot / cell.tpot:.2f}")
        memory = cell.peak_device_bytes or cell.peak_memory_bytes
        lines.append(
            f"| {cell.engine} | {cell.batch} | {cell.prompt} | {cell.ttft * 1e3:.1f} | {ratios[0]} "
            f"| {cell.tpot * 1e3:.2f} | {ratios[1]} | {cell.tokens_per_second:.1f} "
            f"| {memory / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def run_engine(args: argparse.Namespace, engine: str) -> list[Cell]:
    """Measure one engine in a process of its own; its cells come back in a file."""
    with tempfile.TemporaryDirectory(prefix="generation-") as name:
        path = Path(name) / "cells.json"
        command = [sys.executable, str(Path(__file__).resolve()), args.model]
        for flag, values in (("--batch", args.batch), ("--prompt", args.prompt)):
            command += [flag, *map(str, values)]
        command += ["--tokens", str(args.tokens), "--repeats", str(args.repeats)]
        command += ["--device", args.device, "--engine", engine, "--json", str(path)]
        if args.baseline:
            command += ["--baseline", args.baseline]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{engine} failed; what it said stands above")
        return [Cell(**cell) for cell in json.loads(path.read_text())]


def _work(args: argparse.Namespace) -> list[Cell]:
    cells, engine = [], args.engine
    if engine != ENGINES[0]:
        generate = transformers_engine(args.baseline, args.device, engine == ENGINES[2])
    for batch in args.batch:
        for length in args.prompt:
            if engine == ENGINES[0]:
                generate = our_engine(args.model, args.device, batch, length + args.tokens)
            rest = (args.tokens, args.repeats, args.device)
            cell = measure(engine, generate, batch, length, *rest)
            cells.append(cell)
            print(
                f"{cell.engine}, batch {batch}, prompt {length}: {cell.tpot * 1e3:.2f} ms a token"
            )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="quantized checkpoint")
    parser.add_argument("--baseline", help="the same model, dense, for transformers")
    parser.add_argument("--compiled", action="store_true", help="transformers compiled, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, default=32, help="to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1 or min(*args.batch, *args.prompt) < 1:
        parser.error("--tokens must be at least 2, and batches, prompts and repeats at least 1")
    if args.engine:
        figures: Any = [asdict(cell) for cell in _work(args)]
    else:
        wanted = [ENGINES[0]] + ([ENGINES[1]] if args.baseline else [])
        wanted += [ENGINES[2]] if args.baseline and args.compiled else []
        cells = [cell for engine in wanted for cell in run_engine(args, engine)]
        print(markdown(cells))
        figures = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cells": [asdict(cell) for cell in cells],
        }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
