"""Every kernel of libquant_cuda.so, small and against the reference, before anything is timed.

    python benchmarks/gpu_smoke.py --json smoke.json

GEMMs: every kind of weight, group size, tile and cluster that there is a kernel for, whole and
split, by few workers and by many, with and without SiLU and codes. Attention: every head dimension
with soft cap, skipping and windows, prefill by both of its kernels, decode with up to 16 heads of a
group and lengths that are split. The simplest come first. Each is run once and judged, then
LAUNCHES times without waiting and in replays of a graph, which must give the same bits
(`checks.py`).

Nothing is compiled. Trials run in several processes; one that hangs costs LIMIT_S, and the second
of a kind ends that kind (`worker.py`). A failure is printed when it happens: how many elements are
off and where, how many are no numbers, the largest error. The JSON is written every WRITE_S. Exit
code 1 where a trial failed or had no turn, 2 where the library, a driver or a Hopper GPU is
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks import checks  # noqa: E402
from benchmarks.attention_trials import DECODE, PREFILL, SKIP, AttentionCase  # noqa: E402
from benchmarks.checks import DTYPES  # noqa: E402
from benchmarks.gemm_trials import GemmCase  # noqa: E402
from benchmarks.libraries import need_cutlass  # noqa: E402
from benchmarks.progress import regularly, write  # noqa: E402
from benchmarks.timing import gpu_state, synchronizer, warm_up  # noqa: E402
from benchmarks.trials import by_turns  # noqa: E402
from benchmarks.worker import PATIENCE, Item, finished, supervise_all, trouble, work  # noqa: E402
from quant_kernels import cuda_gemm, cuda_tuning, native  # noqa: E402
from quant_kernels.cuda_attention import HEAD_DIMS  # noqa: E402
from quant_kernels.cuda_tuning import Case, Config  # noqa: E402
from quant_kernels.formats import CODE_MIN, WeightFormat, every_format  # noqa: E402

LAUNCHES = 20
LIMIT_S, WRITE_S = 12.0, 3.0
MOST_PROCESSES = 8
MOST_LINES = 40  # of failures that are printed
ROWS, ROWS_SILU = 264, 384  # two tiles of 128 and 8 rows; three of 64 each of gate and up
# Eleven blocks of 128; or ten and a half, where groups end there.
COLUMNS, COLUMNS_RAGGED = 1408, 1344

Form = tuple[WeightFormat, int]  # and the weight's smallest code


def forms() -> dict[tuple[str, int], Form]:
    """A weight for every (kind, group size) of the GEMMs."""
    found: dict[tuple[str, int], Form] = {}
    for fmt, least in itertools.product(every_format(), (CODE_MIN, CODE_MIN + 1)):
        group = cuda_gemm.WHOLE_GROUP if fmt.per_channel else fmt.group_size
        kind = cuda_gemm.kind_name(fmt, least == CODE_MIN)
        found.setdefault((kind, group), (fmt, least))
    order = cuda_tuning.KINDS.index
    return dict(sorted(found.items(), key=lambda pair: (order(pair[0][0]), -pair[0][1])))


def configs(kind: str, group: int, sms: int) -> list[Config]:
    """Every kernel, by few workers, which take several tiles each, and by all."""
    case = Case(kind, group, cuda_tuning.BUCKETS[-1], ROWS, COLUMNS, False)
    return [
        dataclasses.replace(config, workers=workers)
        for config in cuda_tuning.candidates(case, sms)
        for workers in ((3, 7, config.workers) if config.split else (2, config.workers))
    ]


def gemm_cases(sms: int) -> list[GemmCase]:
    """One block of one tile of every kind first; then by split, SiLU, cluster and tile."""
    first = [
        GemmCase(fmt, 16, 128, 128, least=least, config=Config(16, 1, 1, False))
        for fmt, least in forms().values()
    ]
    rest = [
        (config, silu, group, fmt, least)
        for (kind, group), (fmt, least) in forms().items()
        for config in configs(kind, group, sms)
        for silu in (False, True)
    ]
    rest.sort(key=lambda it: (it[0].split, it[1], it[0].cluster, it[0].tile_tokens))
    for i, (config, silu, group, fmt, least) in enumerate(rest):
        whole_blocks = group == cuda_gemm.WHOLE_GROUP and not fmt.per_channel
        first.append(
            GemmCase(
                fmt,
                config.tile_tokens + 1,
                ROWS_SILU if silu else ROWS,
                COLUMNS if whole_blocks else COLUMNS_RAGGED,
                DTYPES[i % 3],
                bias=i % 2 == 1,
                residual=not silu and i % 4 == 3,
                silu=silu,
                codes=silu and config.workers not in (2, 3),
                least=least,
                config=config,
            )
        )
    return first


def prefill_cases() -> list[AttentionCase]:
    """Every head dimension, kernel and option, on a few batches, the smallest first."""
    batches: list[tuple[tuple[tuple[int, int], ...], int, int]] = [  # and the ratio and window
        (((1, 1),), 1, 0),
        (((64, 64),), 1, 0),
        (((130, 130), (3, 70)), 4, 0),
        (((130, 130), (3, 70)), 4, 37),
        (((17, 500), (65, 65)), 8, 0),
    ]
    options = [(0.0, 0.0), (30.0, 0.0), (0.0, SKIP), (30.0, SKIP)]
    grid = itertools.product(batches, options, HEAD_DIMS, (False, True))
    return [
        AttentionCase(
            PREFILL, batch, dim, ratio, window, DTYPES[2 - i % 3], cap, skip, skip > 0, expand
        )
        for i, ((batch, ratio, window), (cap, skip), dim, expand) in enumerate(grid)
    ]


def decode_cases() -> list[AttentionCase]:
    """Every head dimension, few heads of a group and 16, lengths that workers split."""
    lengths = [((5,), 0), ((64, 65, 1, 0), 0), ((777, 128), 37), ((4097,), 0), ((3000, 129) * 9, 0)]
    grid = itertools.product(lengths, (0.0, 30.0), HEAD_DIMS, (1, 4, 8, 16))
    return [
        AttentionCase(
            DECODE, tuple((1, n) for n in each), dim, ratio, window, DTYPES[2 - i % 3], cap
        )
        for i, ((each, window), cap, dim, ratio) in enumerate(grid)
    ]


def items(device: torch.device, sms: int, patience: float = 1.0) -> list[Item]:
    """All trials, GEMMs, prefill and decode by turns."""
    subjects: dict[str, str] = {}
    groups = []
    families: tuple[Sequence[GemmCase | AttentionCase], ...] = (
        gemm_cases(sms), prefill_cases(), decode_cases(),
    )  # fmt: skip
    for cases in families:
        group = [case.trial(("cutlass",)) for case in cases]
        groups.append(group)
        subjects |= {t.key: subject_of(case) for t, case in zip(group, cases, strict=True)}
    return [
        Item(
            trial.key,
            partial(checks.run, trial, device, "cutlass", LAUNCHES),
            LIMIT_S * patience,
            subjects[trial.key],
        )
        for trial in by_turns(groups)
    ]


def subject_of(case: GemmCase | AttentionCase) -> str:
    """What is given up together."""
    if isinstance(case, AttentionCase):
        how = "" if case.expand is None else f", expand {case.expand}"
        return f"{case.op} of D {case.dim}{how}"
    return f"gemm {case.kind} in clusters of {case.config.cluster if case.config else 0}"


def figures_of(planned: Sequence[str], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known by now."""
    return {
        "passed": sum("result" in record for record in records.values()),
        "failed": {key: record["error"] for key, record in records.items() if "error" in record},
        "given up": sorted(key for key, record in records.items() if "stopped" in record),
        "no time": [key for key in planned if key not in records],
        "figures": {key: r["result"] for key, r in records.items() if "result" in r},
    }


def run(args: argparse.Namespace, planned: Sequence[str]) -> dict[str, Any]:
    """Deal the items to processes, write and print what they find."""
    end, printed = time.time() + args.seconds, set[str]()
    state = {"gpu": gpu_state(torch.device("cuda")), "library": str(native.find("quant_cuda"))}
    with tempfile.TemporaryDirectory(prefix="smoke-") as name:
        logs = [Path(name) / f"{i}.jsonl" for i in range(args.processes)]
        shared = [
            "--patience",
            str(args.patience),
            "--processes",
            str(args.processes),
            "--deadline",
            str(end),
        ]
        program = [sys.executable, str(Path(__file__).resolve()), *shared]
        commands = [[*program, "--log", str(log), "--part", str(i)] for i, log in enumerate(logs)]

        def tell() -> None:
            records = finished(*logs)
            for key in [key for key, record in records.items() if "error" in record]:
                if key not in printed and len(printed) < MOST_LINES:
                    print(f"FAILED {key}\n    {trouble(records[key])}", flush=True)
                printed.add(key)
            write(args.json, state | figures_of(planned, records))

        with regularly(tell, WRITE_S):
            supervise_all(commands, logs, end)
        tell()
        return figures_of(planned, finished(*logs))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    count = min(MOST_PROCESSES, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=count)
    parser.add_argument("--patience", type=float, default=1.0, help=PATIENCE)
    for name, kind in (("--part", int), ("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    need_cutlass(device)
    planned = items(device, cuda_gemm.multiprocessors(device), args.patience)
    if args.log:
        warm_up(device)
        mine = planned[args.part :: args.processes]
        return work(mine, args.log, args.deadline, synchronizer(device))
    started = time.time()
    print(f"{len(planned)} trials of {native.find('quant_cuda')}", flush=True)
    found = run(args, [item.key for item in planned])
    counts = {name: len(found[name]) for name in ("failed", "given up", "no time")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{found['passed']} passed, {said}; {time.time() - started:.0f} s")
    return 1 if any(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
