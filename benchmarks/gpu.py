"""Everything a GPU can tell in a few minutes: are the kernels right, and are they fast.

    python benchmarks/gpu.py --json gpu.json --minutes 8

First every kernel against the reference (`checks.py`, `trials.py`), in several processes, since
most of that time is the compiler's; in as many the kernels to be timed are compiled. Then, alone on
the GPU, its ceilings, the GEMMs of whole models and attention (`gemm.py`, `gate_up.py`,
`attention.py`), the most important shapes first (`gpu_plan.py`); what there was no time for is
named. All of it runs in processes that may die with a kernel or be stopped when one hangs
(`worker.py`); an op whose kernels of a backend took two with them is not run again. The JSON is
written every WRITE_S seconds with what is known, and whole before tables, goals (`gpu_goals.py`)
and failures are printed. `--backends cutlass` leaves Triton, and its compiler, out.

Exit code 1 where a check failed or was given up, 2 where a Hopper GPU has no libquant_cuda.so.

    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --check-only --small --json out.json

runs the checks without a GPU. `gpu_smoke.py` comes before all this, on a GPU that has never run
the kernels.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks import attention, gate_up, gemm  # noqa: E402
from benchmarks.gpu_goals import goals, label_of  # noqa: E402
from benchmarks.gpu_plan import BACKENDS, check_items, compile_items, measure_items  # noqa: E402
from benchmarks.libraries import ALLOW_MISSING, require_cutlass  # noqa: E402
from benchmarks.progress import regularly, write  # noqa: E402
from benchmarks.roofline import Peaks  # noqa: E402
from benchmarks.timing import TIMED, gpu_state, synchronizer, warm_up  # noqa: E402
from benchmarks.worker import PATIENCE, Item, finished, supervise_all, trouble, work  # noqa: E402

MAKERS = {"check": check_items, "compile": compile_items, "measure": measure_items}
# Of the whole time: when checks end, and when compiling ends, whatever is left of them.
CHECK_SHARE, COMPILE_SHARE = 0.35, 0.5
MOST_PROCESSES = 12
# On the GPU: a context, and the largest trial with its reference in FP32.
BYTES_OF_PROCESS = 5e9
LAST_SECONDS = 15.0  # for the last item to end, and for the tables
WRITE_S = 15.0
TABLES = ("gemm", "gate_up", "attention")


def processes(device: torch.device) -> int:
    """How many can check at a time: they need cores to compile, and memory on the GPU."""
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(MOST_PROCESSES, os.cpu_count() or 1, int(memory / BYTES_OF_PROCESS)))


def items_of(stage: str, args: argparse.Namespace) -> list[Item]:
    """All of a stage's items, in their order."""
    items = MAKERS[stage](args.small, _device(args), args.backends)
    return [replace(item, limit=item.limit * args.patience) for item in items]


def run_stage(args: argparse.Namespace, stage: str, folder: Path, deadline: float) -> None:
    """A stage's items dealt to processes, one where times are taken; the records lie in folder."""
    count = 1 if stage == "measure" else args.processes
    logs = [folder / f"{stage}-{part}.jsonl" for part in range(count)]
    commands = [
        _command(args, f"{stage}:{part}:{count}", logs[part], deadline) for part in range(count)
    ]
    supervise_all(commands, logs, deadline)


def records_of(stage: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of a stage by now."""
    return finished(*sorted(folder.glob(f"{stage}-*.jsonl")))


def checked(planned: Sequence[Item], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Records by key, and what there was no time for."""
    return {
        "records": records,
        "skipped": [item.key for item in planned if item.key not in records],
    }


def measured(planned: Sequence[Item], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Peaks and tables, joined of the items' times; rows have their rates, and "failed" says what
    has no time and why."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for item in planned:
        if item.about and item.key in records:
            record = records[item.key]
            why = trouble(record)
            figures = record["result"] if why is None else {"error": why}
            parts[item.key.partition(":")[0]].append(item.about | figures)
    tables = {
        "gemm": gemm.joined(parts["gemm"]),
        "gate_up": gate_up.joined(parts["gate_up"]),
        "attention": attention.joined(parts["attention"]),
    }
    peaks = records.get("peaks", {}).get("result")
    for name in ("gemm", "attention") if peaks else ():
        gemm.add_rates(tables[name], Peaks(**peaks))
    return {
        "peaks": peaks,
        **tables,
        "failed": {key: record for key, record in records.items() if trouble(record)},
        "skipped": [item.key for item in planned if item.key not in records],
        "goals": goals(tables),
    }


def print_checks(found: dict[str, Any]) -> int:
    """A line an op, then every failure; returns how many there are, given up ones among them."""
    records = found["records"]
    print("\n| op | passed | failed | given up | no time |\n|---|--:|--:|--:|--:|")
    for op in sorted({key.partition(":")[0] for key in (*records, *found["skipped"])}):
        mine = [record for key, record in records.items() if key.partition(":")[0] == op]
        counts = [sum(name in record for record in mine) for name in ("result", "error", "stopped")]
        counts.append(sum(key.partition(":")[0] == op for key in found["skipped"]))
        print(f"| {op} | {' | '.join(map(str, counts))} |")
    return _print_troubles("failed checks", records)


def print_measurements(found: dict[str, Any]) -> None:
    """Tables, what failed, what was left out or timed another way, and the goals last."""
    print(f"\n{gemm.markdown(found['gemm'])}\n{gate_up.markdown(found['gate_up'])}")
    print(attention.markdown(found["attention"]))
    _print_troubles("failed measurements", found["failed"])
    for line in not_by_graph([row for name in TABLES for row in found[name]]):
        print(line)
    if found["skipped"]:
        print(f"\nno time for {len(found['skipped'])} times, {found['skipped'][0]} the first")
    if found["peaks"]:
        rates = [f"{k} {v / 1e12:.0f} TFLOP/s" for k, v in found["peaks"]["operations"].items()]
        print(f"\nceilings: {found['peaks']['bandwidth'] / 1e9:.0f} GB/s, {', '.join(rates)}")
    print("\n| goal | wanted | least | mean | most | reached |\n|---|--:|--:|--:|--:|--:|")
    for row in found["goals"]:
        cells = (gemm.number(row[name], 2) or "-" for name in ("least", "mean", "most"))
        reached = f"{row['reached']} of {row['shapes']}"
        print(f"| {row['goal']} | {row['wanted']} | {' | '.join(cells)} | {reached} |")


def not_by_graph(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a time that was not taken of a graph, and so counts launches, too."""
    found = []
    for row in rows:
        for name in ("how", "bf16_how", "fp8_how", "quantize_how", "apart_how"):
            if row.get(name) and row[name] not in TIMED:
                what = row["names"][0] if "names" in row else f"{row['model']} {row['op']}"
                size = row.get("m", row.get("context"))
                found.append(f"not by graph: {what} {size} {label_of(row)} {name}: {row[name]}")
    return found


def _print_troubles(title: str, records: dict[str, dict[str, Any]]) -> int:
    """The last line of each, and how many were given up; the JSON has the rest."""
    lines = {key: trouble(record) for key, record in records.items() if trouble(record)}
    if lines:
        print(f"\n{title}:")
    for key, line in lines.items():
        if "error" in records[key]:
            print(f"  {key}: {str(line)[:500]}")
    given_up = Counter(lines[key] for key in lines if "stopped" in records[key])
    for line, count in given_up.items():
        print(f"  {count} times: {line}")
    return len(lines)


def _command(args: argparse.Namespace, stage: str, log: Path, deadline: float) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", stage, "--log", str(log)]
    command += ["--deadline", str(deadline), "--device", args.device]
    command += ["--patience", str(args.patience), "--backends", *args.backends]
    return command + ["--small"] * args.small


def _device(args: argparse.Namespace) -> torch.device:
    device = torch.device(args.device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _work(args: argparse.Namespace) -> int:
    """What a child does: its part of a stage."""
    device = _device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stage, part, count = args.worker.split(":")
    warm_up(device)
    mine = items_of(stage, args)[int(part) :: int(count)]
    return work(mine, args.log, args.deadline, synchronizer(device))


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
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--small", action="store_true", help="few trials, tiny shapes")
    parser.add_argument("--processes", type=int, help="for checks and compiling")
    parser.add_argument("--patience", type=float, default=1.0, help=PATIENCE)
    parser.add_argument("--allow-missing", action="store_true", help=ALLOW_MISSING)
    for name, kind in (("--worker", str), ("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work(args)
    started = time.time()
    end = started + args.minutes * 60 - LAST_SECONDS
    share = 1.0 if args.check_only else CHECK_SHARE
    device = _device(args)
    reasons = require_cutlass(device, args.allow_missing or "cutlass" not in args.backends)
    args.processes = args.processes or processes(device)
    figures: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy")},
        "gpu": gpu_state(device),
        "backends": args.backends,
        "unavailable": reasons,
    }
    trials = items_of("check", args)
    times = [] if args.check_only else items_of("measure", args)
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)

        def known() -> dict[str, Any]:
            found = {"checks": checked(trials, records_of("check", folder))}
            if times:
                found["measured"] = measured(times, records_of("measure", folder))
            return figures | found | {"seconds": round(time.time() - started, 1)}

        with regularly(lambda: write(args.json, known()), WRITE_S):
            run_stage(args, "check", folder, started + (end - started) * share)
            failed = sum(
                trouble(record) is not None for record in records_of("check", folder).values()
            )
            print(
                f"{len(trials)} checks, {failed} failed; {time.time() - started:.0f} s", flush=True
            )
            if times:
                if device.type == "cuda" and items_of("compile", args):
                    run_stage(args, "compile", folder, started + (end - started) * COMPILE_SHARE)
                run_stage(args, "measure", folder, end)
                figures["gpu_after"] = gpu_state(device)
        figures = known()
    write(args.json, figures)
    if times:
        print_measurements(figures["measured"])
    failed = print_checks(figures["checks"])
    print(f"\n{failed} checks failed or given up; {figures['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
