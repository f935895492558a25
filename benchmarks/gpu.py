"""Everything a GPU can tell in a few minutes: are the kernels right, and are they fast.

    python benchmarks/gpu.py --json gpu.json --minutes 8

First every kernel against the reference (`checks.py`, `trials.py`), in several processes, since
most of that time is the compiler's; in as many the kernels to be timed are compiled. Then, alone on
the GPU, its ceilings, the GEMMs of whole models and attention (`gemm.py`, `gate_up.py`,
`attention.py`), the most important shapes first; what there was no time for is named. All of it
runs in processes that may die with a kernel (`worker.py`). One JSON; tables, goals and failures are
printed. Exit code 1 where a check failed.

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --check-only --small --json out.json

runs the checks without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks import attention, checks, gate_up, gemm, trials  # noqa: E402
from benchmarks.roofline import COPY_BYTES, PEAK_SIZE, Peaks, measure_peaks  # noqa: E402
from benchmarks.shapes import CONTEXTS, MODELS, TOKENS, ModelShape  # noqa: E402
from benchmarks.timing import gpu_state, synchronizer  # noqa: E402
from benchmarks.worker import Item, supervise, work  # noqa: E402
from quant_kernels import dispatch  # noqa: E402

GROUPS: dict[str, Callable[[bool], list[checks.Trial]]] = {
    "activation": trials.activation_trials,
    "gemm_w4afp8": partial(trials.gemm_trials, "w4afp8"),
    "gemm_w4a8": partial(trials.gemm_trials, "w4a8"),
    "rope": trials.rope_trials,
    "prefill": trials.prefill_trials,
    "decode": trials.decode_trials,
}
# Of the whole time: when checks end, and when compiling ends, whatever is left of them.
CHECK_SHARE, COMPILE_SHARE = 0.35, 0.5
MOST_PROCESSES = 12
# On the GPU: a context, and the largest trial with its reference in FP32.
BYTES_OF_PROCESS = 5e9
LAST_SECONDS = 15.0  # for the last item to end, and for the tables
DECODE_WEIGHT_BYTES = 30e6
FFN_TOKENS = 16 * 1024


@dataclass(frozen=True)
class Tier:
    """Shapes of one importance."""

    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is timed: the first tier must be there, each adds to those before it."""

    models: tuple[ModelShape, ...]
    attention_models: tuple[ModelShape, ...]
    tiers: tuple[Tier, ...]
    peak_sizes: tuple[int, int]


PLAN = Plan(
    MODELS,
    (MODELS[0], MODELS[3], MODELS[1]),  # the one that is missing has the first one's heads
    (
        Tier((1, 16, 64, 4096), (16384,), (1, 16)),
        Tier((2048, FFN_TOKENS), (4096, 32768), attention.BATCHES),
        Tier(TOKENS, CONTEXTS, attention.BATCHES),
    ),
    (PEAK_SIZE, COPY_BYTES),
)
TINY = ModelShape("tiny", 128, 128, 2, 1, 64)
SMALL_PLAN = Plan((TINY,), (TINY,), (Tier((3,), (70,), (2,)),), (64, 2**16))


@dataclass(frozen=True)
class Goal:
    """A figure of a row, `column`, that every row of a kind should reach."""

    name: str
    table: str
    column: str
    least: float
    covers: Callable[[dict[str, Any]], bool]


def _decodes(row: dict[str, Any]) -> bool:
    return bool(row["m"] <= 16 and row["n"] * row["k"] / 2 >= DECODE_WEIGHT_BYTES)


def _is_ffn(row: dict[str, Any]) -> bool:
    wanted = ("Llama-2-7B gate_up", "Llama-2-7B down", "Llama-3-8B gate_up", "Llama-3-8B down")
    return row["m"] == FFN_TOKENS and any(name in wanted for name in row["names"])


GOALS = (
    Goal("M <= 16, 30 MB of codes and more: x bf16", "gemm", "x_bf16", 3.0, _decodes),
    Goal("M <= 16, 30 MB and more: of the copy bandwidth", "gemm", "bandwidth", 0.75, _decodes),
    Goal("M = 64: x bf16", "gemm", "x_bf16", 2.5, lambda row: row["m"] == 64),
    Goal("M = 64: x FP8", "gemm", "x_fp8", 1.4, lambda row: row["m"] == 64),
    Goal("M >= 2048: x bf16", "gemm", "x_bf16", 1.6, lambda row: row["m"] >= 2048),
    Goal("M >= 2048: x FP8", "gemm", "x_fp8", 0.8, lambda row: row["m"] >= 2048),
    Goal("FFN of 7B and 8B at 16 x 1024 tokens: x bf16", "gemm", "x_bf16", 1.6, _is_ffn),
    Goal("gate and up with codes: x two ops", "gate_up", "x_apart", 1.0, lambda row: True),
    Goal(
        "decode attention at 16k, batch 16: x SDPA",
        "attention",
        "x_bf16",
        3.0,
        lambda row: row["op"] == "decode" and row["context"] == 16384 and row["batch"] == 16,
    ),
    Goal(
        "decode attention at 16k, batch 16: of the copy bandwidth",
        "attention",
        "bandwidth",
        0.65,
        lambda row: row["op"] == "decode" and row["context"] == 16384 and row["batch"] == 16,
    ),
    Goal(
        "prefill attention, 4k to 32k: x SDPA",
        "attention",
        "x_bf16",
        1.25,
        lambda row: row["op"] == "prefill" and 4096 <= row["context"] <= 32768,
    ),
)


def check_items(small: bool, device: torch.device) -> list[Item]:
    """All trials, groups by turns: wherever time ends, it ends for all of them."""
    ranked = []
    for make in GROUPS.values():
        group = make(small)
        ranked += [(i / len(group), trial) for i, trial in enumerate(group)]
    ranked.sort(key=lambda pair: pair[0])
    return [
        Item(name_of(trial.key, backend), partial(checks.run, trial, device, backend))
        for _, trial in ranked
        for backend in attention.backends(trial.op, device)
        if backend == "triton" or trial.everywhere
    ]


def unavailable(device: torch.device) -> dict[str, str]:
    """Why the Hopper kernels are not in the tables; empty where they are."""
    try:
        dispatch.choose(dispatch.CUTLASS_OPS[0], device, "cutlass")
    except dispatch.BackendUnavailable as error:
        return {"cutlass": str(error)}
    return {}


def name_of(key: str, backend: str) -> str:
    """A trial's key, its op marked with the backend where it is not Triton's."""
    op, _, label = key.partition(":")
    return key if backend == "triton" else f"{op} ({backend}):{label}"


def compile_items(small: bool, device: torch.device) -> list[Item]:
    """One launch of the kernels that `measure_items` times."""
    plan = SMALL_PLAN if small else PLAN
    found = [
        Item(f"{shape.n} x {shape.k}, {m}", partial(gemm.compile_once, shape, m, device))
        for tier in plan.tiers[:2]
        for shape in gemm.shapes(plan.models)
        for m in tier.tokens
    ]
    found += [
        Item(f"{shape.n} x {shape.k}, {m} codes", partial(gate_up.compile_once, shape, m, device))
        for tier in plan.tiers[:2]
        for shape in gemm.shapes(plan.models)
        for m in tier.tokens
        if gate_up.is_one(shape)
    ]
    context = plan.tiers[-1].contexts[0]
    for model in plan.attention_models:
        make = partial(attention.prefill_calls, model, context, device)
        found.append(Item(f"{model.name} prefill", partial(_first, make)))
        for batch in plan.tiers[-1].batches:
            make = partial(attention.decode_calls, model, batch, context, device)
            found.append(Item(f"{model.name} decode {batch}", partial(_first, make)))
    return found


def measure_items(small: bool, device: torch.device) -> list[Item]:
    """The device's ceilings, then tiers of shapes, GEMMs and attention by turns."""
    plan = SMALL_PLAN if small else PLAN
    ceilings = partial(measure_peaks, device, *plan.peak_sizes)
    found = {"peaks": Item("peaks", lambda: asdict(ceilings()))}
    for tier in plan.tiers:
        for shape in gemm.shapes(plan.models):
            for m in tier.tokens:
                key = f"gemm: {shape.names[0]} [{m}, {shape.k}] x [{shape.n}, {shape.k}]"
                found.setdefault(key, Item(key, partial(gemm.measure_gemm, shape, m, device)))
            for m in tier.tokens if gate_up.is_one(shape) else ():
                key = f"gate_up: {shape.names[0]} [{m}, {shape.k}] x [{shape.n}, {shape.k}]"
                found.setdefault(key, Item(key, partial(gate_up.measure_gate_up, shape, m, device)))
        for model in plan.attention_models:
            for context in tier.contexts:
                key = f"prefill: {model.name} {context}"
                run = partial(attention.measure_prefill, model, context, device)
                found.setdefault(key, Item(key, run))
                for batch in tier.batches:
                    key = f"decode: {model.name} {batch} x {context}"
                    step = partial(attention.measure_decode, model, batch, context, device)
                    found.setdefault(key, Item(key, step))
    return list(found.values())


def goals(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each goal beside what was measured, per backend and weight format."""
    found = []
    for goal in GOALS:
        rows = [row for row in tables[goal.table] if row.get(goal.column) and goal.covers(row)]
        for label in sorted({_label(row) for row in rows}) or [""]:
            ratios = sorted(row[goal.column] for row in rows if _label(row) == label)
            found.append(
                {
                    "goal": f"{goal.name} {label}".strip(),
                    "wanted": goal.least,
                    "shapes": len(ratios),
                    "reached": sum(ratio >= goal.least for ratio in ratios),
                    "least": ratios[0] if ratios else None,
                    "mean": geometric_mean(ratios),
                    "most": ratios[-1] if ratios else None,
                }
            )
    return found


def _label(row: dict[str, Any]) -> str:
    return f"{row.get('backend', '')} {row.get('format', '')}".strip()


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def processes(device: torch.device) -> int:
    """How many can check at a time: they need cores to compile, and memory on the GPU."""
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST_PROCESSES, os.cpu_count() or 1, int(memory / BYTES_OF_PROCESS)))


def in_parts(
    args: argparse.Namespace, stage: str, directory: Path, deadline: float
) -> dict[str, Any]:
    """A stage's items dealt to several processes; records by key."""

    def run(part: int) -> dict[str, Any]:
        log = directory / f"{stage}-{part}.jsonl"
        return supervise(_command(args, f"{stage}:{part}", log, deadline), log, deadline)

    records: dict[str, Any] = {}
    with ThreadPoolExecutor(args.processes) as pool:
        for found in pool.map(run, range(args.processes)):
            records |= found
    return records


def run_checks(args: argparse.Namespace, directory: Path, deadline: float) -> dict[str, Any]:
    """Records by key, and what there was no time for."""
    records = in_parts(args, "check", directory, deadline)
    planned = [item.key for item in check_items(args.small, torch.device(args.device))]
    return {"records": records, "skipped": [key for key in planned if key not in records]}


def run_measurements(args: argparse.Namespace, directory: Path, deadline: float) -> dict[str, Any]:
    """Peaks and tables; rows have their rates, and failures a row of their own in "failed"."""
    log = directory / "measure.jsonl"
    records = supervise(_command(args, "measure", log, deadline), log, deadline)
    tables: dict[str, list[dict[str, Any]]] = {"gemm": [], "gate_up": [], "attention": []}
    failed = {key: record["error"] for key, record in records.items() if "error" in record}
    peaks = records.pop("peaks", {}).get("result")
    for key, record in records.items():
        for row in record.get("result") or []:
            op = key.partition(":")[0]
            tables[op if op in tables else "attention"].append(row)
            if "error" in row:
                failed[f"{key} {_label(row)}".strip()] = row["error"]
    for name in ("gemm", "attention") if peaks else ():
        gemm.add_rates(tables[name], Peaks(**peaks))
    planned = [item.key for item in measure_items(args.small, torch.device(args.device))]
    skipped = [key for key in planned if key not in records and key != "peaks"]
    return {"peaks": peaks, **tables, "failed": failed, "skipped": skipped, "goals": goals(tables)}


def print_checks(found: dict[str, Any]) -> int:
    """A line an op, then every failure; returns how many there are."""
    records = found["records"]
    print("\n| op | passed | failed | no time |\n|---|--:|--:|--:|")
    for op in sorted({key.partition(":")[0] for key in (*records, *found["skipped"])}):
        mine = [record for key, record in records.items() if key.partition(":")[0] == op]
        failed = sum("error" in record for record in mine)
        late = sum(key.partition(":")[0] == op for key in found["skipped"])
        print(f"| {op} | {len(mine) - failed} | {failed} | {late} |")
    wrong = {key: record["error"] for key, record in records.items() if "error" in record}
    _print_errors("failed checks", wrong)
    return len(wrong)


def print_measurements(found: dict[str, Any]) -> None:
    """Tables, what failed, what was left out, and the goals last."""
    print(f"\n{gemm.markdown(found['gemm'])}\n{gate_up.markdown(found['gate_up'])}")
    print(attention.markdown(found["attention"]))
    _print_errors("failed measurements", found["failed"])
    if found["skipped"]:
        print(f"\nno time for {len(found['skipped'])} shapes, {found['skipped'][0]} the first")
    if found["peaks"]:
        rates = [f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in found["peaks"]["operations"].items()]
        print(f"\nceilings: {found['peaks']['bandwidth'] / 1e9:.0f} GB/s, {', '.join(rates)}")
    print("\n| goal | wanted | least | mean | most | reached |\n|---|--:|--:|--:|--:|--:|")
    for row in found["goals"]:
        cells = (gemm.number(row[name], 2) or "-" for name in ("least", "mean", "most"))
        reached = f"{row['reached']} of {row['shapes']}"
        print(f"| {row['goal']} | {row['wanted']} | {' | '.join(cells)} | {reached} |")


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """The JSON, whole or not at all."""
    if path is not None:
        partial_path = path.with_name(f"{path.name}.partial")
        partial_path.write_text(json.dumps(figures, indent=2) + "\n")
        os.replace(partial_path, path)


def _print_errors(title: str, errors: dict[str, str]) -> None:
    """The last line of each; the JSON has the rest."""
    if errors:
        print(f"\n{title}:")
    for key, error in errors.items():
        print(f"  {key}: {(error.strip().splitlines() or ['?'])[-1][:300]}")


def _first(make: Callable[[], Sequence[Callable[[], object]]]) -> None:
    make()[0]()


def _command(args: argparse.Namespace, stage: str, log: Path, deadline: float) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", stage, "--log", str(log)]
    command += ["--deadline", str(deadline), "--device", args.device]
    return command + ["--processes", str(args.processes)] + ["--small"] * args.small


def _work(args: argparse.Namespace) -> int:
    """What a child does: a stage, or its part of one."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    stage, _, part = args.worker.partition(":")
    if stage == "measure":
        items = measure_items(args.small, device)
    else:
        make = check_items if stage == "check" else compile_items
        every = make(args.small, device)
        items = every[int(part) :: args.processes]
    return work(items, args.log, args.deadline, synchronizer(device))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--small", action="store_true", help="few trials, tiny shapes")
    parser.add_argument("--processes", type=int, help="for checks and compiling")
    for name, kind in (("--worker", str), ("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args)
    started = time.time()
    end = started + args.minutes * 60 - LAST_SECONDS
    share = 1.0 if args.check_only else CHECK_SHARE
    device = torch.device(args.device)
    args.processes = args.processes or processes(device)
    figures: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy")},
        "gpu": gpu_state(device),
        "unavailable": unavailable(device),
    }
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        directory = Path(name)
        figures["checks"] = run_checks(args, directory, started + (end - started) * share)
        write(args.json, figures)
        if not args.check_only:
            if device.type == "cuda":
                in_parts(args, "compile", directory, started + (end - started) * COMPILE_SHARE)
            figures["measured"] = run_measurements(args, directory, end)
            figures["gpu_after"] = gpu_state(device)
    figures["seconds"] = round(time.time() - started, 1)
    if not args.check_only:
        print_measurements(figures["measured"])
    failed = print_checks(figures["checks"])
    write(args.json, figures)
    print(f"\n{failed} checks failed; {figures['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
