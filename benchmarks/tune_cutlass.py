"""The Hopper GEMMs' configurations, timed on this GPU: the table that `cuda_tuning.py` reads.

    python benchmarks/tune_cutlass.py --models Llama-3-8B --minutes 9 --output sm_90.json

Every case (kind, group size, bucket of tokens, weight [n, k], silu_mul) of the models is timed in
each of `cuda_tuning.candidates`, and the fastest enters the table; what the model of clocks would
choose stays where nothing beats it by more than NOISE. A candidate whose output is not the
reference's, by the error metric, or for INT8 not bit for bit that of the candidates before it, is
left out and named. Nothing is compiled, so that is all there is to do.

The table is written every WRITE_S seconds with the cases that are through, to --output: by default
cuda_tuned/sm_90.json beside the kernels, where it is read from and where an installed package may
not be written. Entries of other cases stay. Timing runs in a process that may die with a kernel
(`worker.py`); cases that time ran out for are left out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.checks import metric, poison  # noqa: E402
from benchmarks.gemm import prepared, random_weight  # noqa: E402
from benchmarks.gemm_trials import metric_bound  # noqa: E402
from benchmarks.libraries import need_cutlass  # noqa: E402
from benchmarks.progress import regularly, write  # noqa: E402
from benchmarks.shapes import MODELS  # noqa: E402
from benchmarks.timing import (  # noqa: E402
    TIMED,
    copies,
    gpu_state,
    l2_bytes,
    measure,
    synchronizer,
    warm_up,
)
from benchmarks.tune import LAST_SECONDS, NOISE, TOKENS_OF_LAST  # noqa: E402
from benchmarks.worker import Item, finished, supervise, trouble, work  # noqa: E402
from quant_kernels import cuda_gemm, cuda_tuning, reference  # noqa: E402
from quant_kernels.cuda_tuning import BUCKETS, Case, Config  # noqa: E402
from quant_kernels.formats import CODE_MIN, WeightFormat  # noqa: E402
from quant_kernels.fragments import FragmentWeight  # noqa: E402
from quant_kernels.packing import join_weight  # noqa: E402

FORMATS = {
    "int8": WeightFormat("w4a8", 128, "int8"),
    "int8-channel": WeightFormat("w4a8", -1, "int8"),
    "lut": WeightFormat("w4afp8", 128, "lut"),
    "fp8-channel": WeightFormat("w4afp8", -1, "lut"),
    "exact": WeightFormat("w4afp8", 128, "exact"),
}
USUAL_KINDS = ("lut-8", "int8")  # of real weights, some of whose codes are -8
# Seconds of a candidate until it counts as hanging, its case's reference and weights with it.
LIMIT_S, WRITE_S = 30.0, 15.0


def cases(models: Sequence[str], kinds: Sequence[str], buckets: Sequence[int]) -> list[Case]:
    """The distinct cases of these models; gate_up also with SiLU in its epilogue."""
    found: dict[Case, None] = {}
    for model in MODELS:
        for linear, (n, k) in model.linears.items() if model.name in models else ():
            for kind, bucket in itertools.product(kinds, buckets):
                for silu_mul in (False, True) if linear == "gate_up" else (False,):
                    found[Case(kind, 128, bucket, n, k, silu_mul)] = None
    return list(found)


def configurations(case: Case, sms: int) -> list[Config]:
    """What is timed: the model's choice first, and every candidate."""
    first = cuda_tuning.by_model(case, tokens_of(case), sms)
    return list(dict.fromkeys([first, *cuda_tuning.candidates(case, sms)]))


def tokens_of(case: Case) -> int:
    return TOKENS_OF_LAST if case.bucket == BUCKETS[-1] else case.bucket


def key_of(case: Case, config: Config) -> str:
    return json.dumps([asdict(case), asdict(config)])


def best(
    wanted: Sequence[Case], sms: int, records: dict[str, dict[str, Any]]
) -> dict[Case, tuple[Config, float]]:
    """The fastest right configuration and its microseconds, of cases that were timed in all."""
    found = {}
    for case in wanted:
        every = configurations(case, sms)
        mine = [records.get(key_of(case, config), {}) for config in every]
        if all(mine):
            others = different(case, mine)
            times = [
                record["result"]["us"] if "result" in record and i not in others else math.inf
                for i, record in enumerate(mine)
            ]
            fastest = min(range(len(times)), key=times.__getitem__)
            chosen = 0 if times[0] <= times[fastest] * (1 + NOISE) else fastest
            if times[chosen] < math.inf:
                found[case] = every[chosen], times[chosen]
    return found


def different(case: Case, records: Sequence[dict[str, Any]]) -> list[int]:
    """Which INT8 candidates give other bits than the first that gives any."""
    bits = [record.get("result", {}).get("bits") for record in records]
    first = next(filter(None, bits), None)
    exact = case.kind.startswith("int8")
    return [i for i, mine in enumerate(bits) if exact and mine not in (None, first)]


def troubles(
    wanted: Sequence[Case], sms: int, records: dict[str, dict[str, Any]]
) -> dict[tuple[Case, Config], str]:
    """Candidates that are left out, and why."""
    found = {}
    for case in wanted:
        every = configurations(case, sms)
        mine = [records.get(key_of(case, config), {}) for config in every]
        others = different(case, mine)
        for i, (config, record) in enumerate(zip(every, mine, strict=True)):
            if i in others:
                found[case, config] = "other bits than the candidates before it"
            elif record and trouble(record):
                found[case, config] = str(trouble(record))
    return found


@functools.lru_cache(maxsize=1)
def weights(kind: str, n: int, k: int, device: torch.device) -> list[FragmentWeight]:
    """Copies that evict one another."""
    fmt, number = FORMATS[kind.removesuffix("-8")], copies(n * k // 2, l2_bytes(device))
    return [
        prepared(random_weight(n, k, fmt, device, seed, least_code(kind)), "cutlass")
        for seed in range(number)
    ]


def least_code(kind: str) -> int:
    """The smallest code of a kind's weights."""
    fewer = kind in cuda_tuning.KINDS and f"{kind}-8" in cuda_tuning.KINDS
    return CODE_MIN + 1 if fewer else CODE_MIN


@functools.lru_cache(maxsize=1)
def problem(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The case's activations, codes and scales, and its output by the reference, in BF16."""
    fmt = FORMATS[case.kind.removesuffix("-8")]
    generator = torch.Generator(device).manual_seed(case.n + case.k)
    # Gates where SiLU bends.
    shape, deviation = (tokens_of(case), case.k), 0.25 if case.silu_mul else 2.0
    x = torch.randn(shape, generator=generator, device=device) * deviation
    codes, scale = reference.quantize_activation(x, fmt.activation)
    packed = join_weight(random_weight(case.n, case.k, fmt, device, 0, least_code(case.kind)))
    y = reference.gemm(codes, scale, packed, None, torch.float32)
    return codes, scale, (reference.silu_mul(y) if case.silu_mul else y).bfloat16()


def time_of(device: torch.device, case: Case, config: Config) -> dict[str, Any]:
    """Microseconds with cold weights, of a configuration whose output is right."""
    held = weights(case.kind, case.n, case.k, device)
    codes, scale, wanted = problem(case, device)
    out = poison(tuple(wanted.shape), torch.bfloat16, device)
    workspace = torch.empty(cuda_gemm.needed_bytes(config), dtype=torch.uint8, device=device)
    calls = [
        functools.partial(
            cuda_gemm.run, config, codes, scale, w, out, None, None, case.silu_mul, workspace
        )
        for w in held
    ]
    calls[0]()
    error = metric("out", wanted, out, metric_bound(held[0].fmt, case.k, out.dtype, device))
    bits = zlib.crc32(out.cpu().view(torch.uint8).numpy().tobytes())
    timing = measure(calls, device, seconds=0.02, least=8)
    return {"us": timing.us, "how": timing.how, "metric": error, "bits": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    kinds = cuda_tuning.KINDS
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=list(USUAL_KINDS))
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--minutes", type=float, default=9.0)
    table = cuda_tuning.TABLES / "sm_90.json"
    parser.add_argument("--output", type=Path, default=table, help="the table; where it is read")
    for name, kind in (("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    need_cutlass(torch.device("cuda"))
    device = torch.device("cuda", torch.cuda.current_device())
    sms = cuda_gemm.multiprocessors(device)
    wanted = cases(args.models, args.kinds, args.buckets)
    if args.log:
        warm_up(device)
        items = [
            item_of(device, case, config) for case in wanted for config in configurations(case, sms)
        ]
        sys.exit(work(items, args.log, args.deadline, synchronizer(device)))
    end = time.time() + args.minutes * 60 - LAST_SECONDS
    before = json.loads(args.output.read_text()) if args.output.exists() else {"entries": []}
    so_far = cuda_tuning.parse_table(before, str(args.output))
    made = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **gpu_state(device)}
    with tempfile.TemporaryDirectory(prefix="tune-") as name:
        log = Path(name) / "time.jsonl"
        command = [sys.executable, *sys.argv, "--log", str(log), "--deadline", str(end)]

        def save() -> None:
            found = best(wanted, sms, finished(log))
            write(args.output, content_of(so_far, found, made))

        with regularly(save, WRITE_S):
            records = supervise(command, log, end)
        save()
    found = best(wanted, sms, records)
    for case, (config, us) in found.items():
        usual = records[key_of(case, configurations(case, sms)[0])].get("result")
        print(f"{case}: {us:.1f} us in {config}; by the model {usual and round(usual['us'], 1)} us")
    for record in (record["result"] for record in records.values() if "result" in record):
        if record["how"] not in TIMED:
            print(f"not by graph: {record['how']}")
    left_out = troubles(wanted, sms, records)
    for (case, config), why in left_out.items():
        print(f"left out: {case} in {config}: {why[:300]}")
    print(f"{len(found)} of {len(wanted)} cases into {args.output}; {len(left_out)} left out")


def item_of(device: torch.device, case: Case, config: Config) -> Item:
    """A candidate; tiles of a kind are given up together."""
    subject = f"{case.kind} in tiles of {config.tile_tokens}, clusters of {config.cluster}"
    subject += ", split" if config.split else ""
    run = functools.partial(time_of, device, case, config)
    return Item(key_of(case, config), run, LIMIT_S, subject)


def content_of(
    table: Mapping[Case, Config], found: Mapping[Case, tuple[Config, float]], made: dict[str, Any]
) -> dict[str, Any]:
    """A table with these choices in it."""
    whole = {**table, **{case: config for case, (config, _) in found.items()}}
    entries = [{**asdict(case), "config": asdict(config)} for case, config in whole.items()]
    return {"measured": made, "entries": sorted(entries, key=json.dumps)}


if __name__ == "__main__":
    main()
