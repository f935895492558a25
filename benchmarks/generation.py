"""Time to the first token, time per token after it, and memory: our runtime beside others.

    python benchmarks/generation.py QUANTIZED --baseline DENSE --batch 1 4 --prompt 128 512 \\
        --json generation.json
    python benchmarks/generation.py --random benchmarks/configs/llama-3-8b.json --compiled \\
        --batch 1 16 64 --prompt 1024 4096 16384 --json generation.json

QUANTIZED and DENSE are Hugging Face directories (or .gguf files) of the same model; --random makes
weights of a shape on the device instead, in --scheme and --group-size, with a 4-bit KV cache. For
every batch and prompt length, greedily and past any end of sequence:

    TTFT = seconds of generating 1 token,   TPOT = (seconds of generating N - TTFT) / (N - 1)

medians over --repeats, after one of each that does not count. Prompts are random tokens. An engine
runs in a process of its own, so that its peak memory is its own: resident bytes, and on a GPU what
tensors took there. Our tokens with recorded decode steps (CUDA graphs on a GPU) are first compared
with those without.
transformers runs in BF16, as it comes and, with --compiled, with its static
cache and torch.compile; vLLM in BF16 where it is installed and there is a GPU; --dense adds our own
runtime in BF16. A cell that does not fit the memory is left out and named.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
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
from quant.errors import RequestError  # noqa: E402
from quant.memory import peak_device_bytes, peak_memory_bytes, reset_peak_memory  # noqa: E402

ENGINES = ("fourbyeight", "fourbyeight dense", "transformers", "transformers compiled", "vllm")
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


def our_engine(
    args: argparse.Namespace, model: Any, batch: int, length: int, eager: bool = False
) -> Generate:
    """Our runtime, with room for `batch` sequences of `length` tokens; eager: no recorded steps."""
    from quant.runtime.batch import pages_needed
    from quant.runtime.recordings import recorded_steps
    from quant.runtime.sampling import SamplingParams
    from quant.runtime.scheduler import Request, Scheduler

    cache = model.new_cache(batch * pages_needed(length), length)
    scheduler = Scheduler(
        model,
        cache,
        frozenset(),
        max_num_seqs=batch,
        max_model_len=length,
        max_num_batched_tokens=max(args.max_num_batched_tokens, batch),
        graphs=None if eager else recorded_steps(model, cache, length),
    )

    def generate(given: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        requests = [Request(None, ids, params, params.generator()) for ids in given]
        for request in requests:
            scheduler.add(request)
        while scheduler.waiting or scheduler.running:
            scheduler.step()
        return [request.token_ids for request in requests]

    return generate


def check_graphs(args: argparse.Namespace, model: Any, batch: int, length: int) -> None:
    """SystemExit where recorded decode steps give other tokens than steps launched one by one."""
    given, room = prompts(batch, length), length + args.tokens
    recorded = our_engine(args, model, batch, room)(given, args.tokens)
    launched = our_engine(args, model, batch, room, eager=True)(given, args.tokens)
    if recorded != launched:
        rows = [i for i in range(batch) if recorded[i] != launched[i]]
        raise SystemExit(f"recorded steps change the tokens of sequences {rows} of {batch}")


def our_model(args: argparse.Namespace, dense: bool) -> Any:
    """The checkpoint, or random weights of its shape."""
    from benchmarks.random_model import random_model, read_config
    from quant.recipe import Recipe
    from quant.runtime.model import load_model
    from quant_kernels.kv4 import KVFormat

    device = select_device(args.device)
    if args.random is None:
        return load_model(resolve_model(args.baseline if dense else args.model), device=device)
    fmt = Recipe().override(scheme=args.scheme, group_size=args.group_size).weight_format
    config = read_config(args.random)
    return random_model(config, None if dense else fmt, None if dense else KVFormat(), device)


def transformers_engine(args: argparse.Namespace, compiled: bool) -> Generate:
    """transformers' `generate` in BF16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    target = select_device(args.device)
    loaded: Any
    if args.random is None:
        directory = resolve_model(args.baseline)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(target)
    else:
        with target:
            config = AutoConfig.from_pretrained(args.random)
            loaded = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded.eval()
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


def vllm_engine(args: argparse.Namespace) -> Generate:
    """vLLM in BF16, with dummy weights where ours are random."""
    from vllm import LLM, SamplingParams

    longest = max(args.prompt) + args.tokens
    options = {"dtype": "bfloat16", "max_model_len": longest, "max_num_seqs": max(args.batch)}
    if args.random is None:
        llm = LLM(str(resolve_model(args.baseline)), **options)
    else:
        folder = tempfile.mkdtemp(prefix="generation-")
        (Path(folder) / "config.json").write_bytes(args.random.read_bytes())
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, **options)

    def generate(given: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], params)
        return [list(output.outputs[0].token_ids) for output in outputs]

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
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        command += ["--engine", engine, "--json", str(path)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{engine} failed; what it said stands above")
        return [Cell(**cell) for cell in json.loads(path.read_text())["cells"]]


def free_memory() -> None:
    """Give back what nothing refers to any more: caches, recorded steps, a GPU's pool."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _work(args: argparse.Namespace) -> list[Cell]:
    cells, engine = [], args.engine
    generate: Generate | None = None
    if engine.startswith("fourbyeight"):
        model = our_model(args, engine.endswith("dense"))
        check_graphs(args, model, min(args.batch), min(args.prompt))
    elif engine.startswith("transformers"):
        generate = transformers_engine(args, engine.endswith("compiled"))
    elif engine == "vllm":
        generate = vllm_engine(args)
    for batch in args.batch:
        for length in args.prompt:
            where = f"{engine}, batch {batch}, prompt {length}"
            try:
                if engine.startswith("fourbyeight"):
                    generate = None
                    free_memory()  # of the cell before: two caches need not fit
                    generate = our_engine(args, model, batch, length + args.tokens)
                rest = (args.tokens, args.repeats, args.device)
                cell = measure(engine, generate, batch, length, *rest)
            except (torch.OutOfMemoryError, RequestError) as error:
                print(f"{where}: left out: {str(error).splitlines()[0]}")
                continue
            cells.append(cell)
            print(f"{where}: {cell.ttft:.3f} s, then {cell.tpot * 1e3:.2f} ms a token")
    return cells


def engines(args: argparse.Namespace) -> list[str]:
    """What is measured, as the options and this machine say."""
    has_dense = args.baseline is not None or args.random is not None
    wanted = {
        "fourbyeight": True,
        "fourbyeight dense": has_dense and args.dense,
        "transformers": has_dense,
        "transformers compiled": has_dense and args.compiled,
        "vllm": has_dense
        and importlib.util.find_spec("vllm") is not None
        and select_device(args.device).type == "cuda",
    }
    return [engine for engine in ENGINES if wanted[engine]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="quantized checkpoint")
    parser.add_argument("--random", type=Path, metavar="CONFIG", help="a config.json, no weights")
    parser.add_argument("--scheme", default="w4afp8", help="of --random")
    parser.add_argument("--group-size", type=int, default=128, help="of --random")
    parser.add_argument("--baseline", help="the same model, dense")
    parser.add_argument("--compiled", action="store_true", help="transformers compiled, too")
    parser.add_argument("--dense", action="store_true", help="our runtime in BF16, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, default=32, help="to generate, at least 2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1 or min(*args.batch, *args.prompt) < 1:
        parser.error("--tokens must be at least 2, and batches, prompts and repeats at least 1")
    if (args.model is None) == (args.random is None):
        parser.error("give a quantized checkpoint, or --random CONFIG, and not both")
    if args.engine:
        cells = _work(args)
    else:
        cells = [cell for engine in engines(args) for cell in run_engine(args, engine)]
        print(markdown(cells))
    figures = {
        "torch": torch.__version__,
        "device": device_name(select_device(args.device)),
        "threads": torch.get_num_threads(),
        "cells": [asdict(cell) for cell in cells],
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
