"""The GEMMs' configurations, timed on this GPU: the table that `tuning.py` reads.

    python benchmarks/tune.py --models Llama-3-8B --kinds lut int8 --minutes 9

Every case (kind of format, bucket of tokens, weight [n, k], silu_mul) of the models is timed in
each of `tuning.candidates`, and the fastest enters the table, sm_XY.json in the kernels' folder
`tuned`; what the rule would choose stays where nothing beats it by more than NOISE. First the
candidates are compiled in several processes, then they are timed alone on the GPU, in processes
that may die with one (`worker.py`). Cases that time ran out for, wholly or in part, are left out;
entries of other cases stay. A bucket is timed at its largest number of tokens, the last one at
TOKENS_OF_LAST.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.gemm import random_weight  # noqa: E402
from benchmarks.shapes import MODELS  # noqa: E402
from benchmarks.timing import copies, gpu_state, l2_bytes, measure, synchronizer  # noqa: E402
from benchmarks.worker import Item, supervise, work  # noqa: E402
from quant_kernels import dispatch, reference  # noqa: E402
from quant_kernels.formats import WeightFormat  # noqa: E402
from quant_kernels.packing import SplitWeight  # noqa: E402
from quant_kernels.triton import tuning  # noqa: E402
from quant_kernels.triton.tuning import Case, Config  # noqa: E402

FORMATS = {
    "int8": WeightFormat("w4a8", 128, "int8"),
    "int8-channel": WeightFormat("w4a8", -1, "int8"),
    "lut": WeightFormat("w4afp8", 128, "lut"),
    "fp8-channel": WeightFormat("w4afp8", -1, "lut"),
    "exact": WeightFormat("w4afp8", 128, "exact"),
}
TOKENS_OF_LAST = 4096
# Less is no reason to leave the rule.
NOISE = 0.02
COMPILE_SHARE = 0.5
LAST_SECONDS = 10.0
MOST_PROCESSES = 12

# Microseconds of a case in a configuration, and what a GPU without a table runs it in.
Timer = Callable[[Case, Config], float]
Rule = Callable[[Case], Config]


def cases(
    models: Sequence[str], kinds: Sequence[str], buckets: Sequence[int], silu_mul: bool
) -> list[Case]:
    """The distinct cases of these models; silu_mul: also gate_up with SiLU in its epilogue."""
    found: dict[Case, None] = {}
    for model in MODELS:
        for linear, (n, k) in model.linears.items() if model.name in models else ():
            for kind in kinds:
                for bucket in buckets:
                    found[Case(kind, bucket, n, k, False)] = None
                    if silu_mul and linear == "gate_up":
                        found[Case(kind, bucket, n, k, True)] = None
    return list(found)


def configurations(case: Case, rule: Rule) -> list[Config]:
    """What is timed: the rule's choice first, and every candidate."""
    others = tuning.candidates(case.kind, case.bucket, case.k, case.silu_mul)
    return list(dict.fromkeys([rule(case), *others]))


def items(wanted: Iterable[Case], rule: Rule, timer: Timer) -> list[Item]:
    """An item a case and configuration; its key is both, as JSON."""
    return [
        Item(key_of(case, config), functools.partial(timer, case, config))
        for case in wanted
        for config in configurations(case, rule)
    ]


def key_of(case: Case, config: Config) -> str:
    return json.dumps([asdict(case), asdict(config)])


def chosen(
    wanted: Iterable[Case], rule: Rule, records: Mapping[str, dict[str, Any]]
) -> dict[Case, Config]:
    """The best configuration of every case whose candidates have all had their turn."""
    found = {}
    for case in wanted:
        every = configurations(case, rule)
        if any(key_of(case, config) not in records for config in every):
            continue
        times = {
            config: records[key_of(case, config)]["result"]
            for config in every
            if "result" in records[key_of(case, config)]
        }
        if times:
            best = min(times, key=lambda config: times[config])
            kept = times.get(every[0], math.inf) <= times[best] * (1 + NOISE)
            found[case] = every[0] if kept else best
    return found


def merged(content: dict[str, Any], best: Mapping[Case, Config], made: dict[str, Any]) -> Any:
    """A table with these choices in it, and the entries of other cases as they were."""
    table = tuning.parse_table(content, "the table so far") | dict(best)
    entries = [{**asdict(case), "config": asdict(config)} for case, config in table.items()]
    return {"measured": made, "entries": sorted(entries, key=lambda entry: json.dumps(entry))}


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; a table that cannot be read back is not written."""
    tuning.parse_table(content, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def tokens_of(case: Case) -> int:
    return TOKENS_OF_LAST if case.bucket == tuning.BUCKETS[-1] else case.bucket


@functools.lru_cache(maxsize=1)
def weights(kind: str, n: int, k: int, number: int, device: torch.device) -> list[SplitWeight]:
    return [random_weight(n, k, FORMATS[kind], device, seed) for seed in range(number)]


def call(case: Case, config: Config, device: torch.device, number: int) -> list[Any]:
    """The GEMM of a case in a configuration, over `number` copies of its weight."""
    from quant_kernels.triton.gemm import run

    m, fmt = tokens_of(case), FORMATS[case.kind]
    x = torch.randn(m, case.k, device=device)
    codes, scale = reference.quantize_activation(x, fmt.activation)
    columns = case.n // 2 if case.silu_mul else case.n
    out = torch.empty(m, columns, dtype=torch.bfloat16, device=device)
    size = tuning.needed_bytes(config, m, case.n)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    return [
        functools.partial(
            run, config, codes, scale, weight, out, None, None, case.silu_mul, workspace
        )
        for weight in weights(case.kind, case.n, case.k, number, device)
    ]


def on_device(device: torch.device, case: Case, config: Config) -> float:
    """The timer: microseconds with cold weights."""
    number = copies(case.n * case.k // 2, l2_bytes(device))
    return measure(call(case, config, device, number), device, seconds=0.02, least=8).us


def compiled(device: torch.device, case: Case, config: Config) -> float:
    """Instead of the timer: one launch, after which Triton has the kernel on disk."""
    call(case, config, device, 1)[0]()
    return 0.0


def _work(args: argparse.Namespace, wanted: Sequence[Case], rule: Rule) -> int:
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stage, _, part = args.worker.partition(":")
    every = items(wanted, rule, functools.partial(on_device, device))
    if stage == "compile":
        # Kernels do not depend on [n, k], which only the first case of a kind and bucket compiles.
        first = {(case.kind, case.bucket, case.silu_mul): case for case in reversed(wanted)}
        every = items(first.values(), rule, functools.partial(compiled, device))
        every = every[int(part) :: args.processes]
    return work(every, args.log, args.deadline, synchronizer(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--kinds", nargs="+", choices=tuning.KINDS, default=["lut", "int8"])
    parser.add_argument(
        "--buckets", nargs="+", type=int, choices=tuning.BUCKETS, default=list(tuning.BUCKETS)
    )
    parser.add_argument("--silu-mul", action="store_true", help="also gate_up with its epilogue")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--processes", type=int, default=min(MOST_PROCESSES, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="the table; by default where it is read from")
    for name, kind in (("--worker", str), ("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    capability = dispatch.capability(device)
    rule = functools.partial(
        tuning.by_rule,
        sms=tuning.multiprocessors(device),
        fp8=capability >= dispatch.FP8_CAPABILITY,
    )
    wanted = cases(args.models, args.kinds, args.buckets, args.silu_mul)
    if args.worker:
        sys.exit(_work(args, wanted, rule))
    end = time.time() + args.minutes * 60 - LAST_SECONDS
    middle = time.time() + (end - time.time()) * COMPILE_SHARE

    def stage(name: str, log: Path, deadline: float) -> dict[str, dict[str, Any]]:
        command = [sys.executable, *sys.argv, "--worker", name, "--log", str(log)]
        command += ["--deadline", str(deadline), "--processes", str(args.processes)]
        return supervise(command, log, deadline)

    with tempfile.TemporaryDirectory(prefix="tune-") as name:
        directory = Path(name)
        with ThreadPoolExecutor(args.processes) as pool:
            list(
                pool.map(
                    lambda i: stage(f"compile:{i}", directory / f"{i}.jsonl", middle),
                    range(args.processes),
                )
            )
        records = stage("time", directory / "time.jsonl", end)
    best = chosen(wanted, rule, records)
    path = args.output or tuning.TABLES / f"sm_{capability[0]}{capability[1]}.json"
    before = json.loads(path.read_text()) if path.exists() else {"entries": []}
    made = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **gpu_state(device)}
    write_table(path, merged(before, best, made))
    for case, config in best.items():
        us, usual = (records[key_of(case, c)].get("result") for c in (config, rule(case)))
        print(f"{case}: {us:.1f} us in {config}; by rule {usual and round(usual, 1)} us")
    failed = sum("error" in record for record in records.values())
    print(f"{len(best)} of {len(wanted)} cases into {path}; {failed} configurations failed")


if __name__ == "__main__":
    main()
