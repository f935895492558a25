"""The Hopper GEMMs' configurations, timed on this GPU: the table that `cuda_tuning.py` reads.

    python benchmarks/tune_cutlass.py --models Llama-3-8B --minutes 9

Every case (kind, group size, bucket of tokens, weight [n, k], silu_mul) of the models is timed in
each of `cuda_tuning.candidates`, and the fastest enters cuda_tuned/sm_90.json; what the model of
clocks would choose stays where nothing beats it by more than NOISE. Nothing is compiled, so that is
all there is to do. Timing runs in a process that may die with a kernel (`worker.py`); cases that
time ran out for are left out, and entries of other cases stay.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.gemm import prepared, random_weight  # noqa: E402
from benchmarks.shapes import MODELS  # noqa: E402
from benchmarks.timing import copies, gpu_state, l2_bytes, measure, synchronizer  # noqa: E402
from benchmarks.tune import LAST_SECONDS, NOISE, TOKENS_OF_LAST  # noqa: E402
from benchmarks.worker import Item, supervise, work  # noqa: E402
from quant_kernels import cuda_gemm, cuda_tuning, reference  # noqa: E402
from quant_kernels.cuda_tuning import BUCKETS, Case, Config  # noqa: E402
from quant_kernels.formats import WeightFormat  # noqa: E402
from quant_kernels.fragments import FragmentWeight  # noqa: E402

FORMATS = {
    "int8": WeightFormat("w4a8", 128, "int8"),
    "int8-channel": WeightFormat("w4a8", -1, "int8"),
    "lut": WeightFormat("w4afp8", 128, "lut"),
    "fp8-channel": WeightFormat("w4afp8", -1, "lut"),
    "exact": WeightFormat("w4afp8", 128, "exact"),
}


def cases(models: Sequence[str], formats: Sequence[str], buckets: Sequence[int]) -> list[Case]:
    """The distinct cases of these models; gate_up also with SiLU in its epilogue.

    Random weights have codes of -8, as real ones do.
    """
    found: dict[Case, None] = {}
    for model in MODELS:
        for linear, (n, k) in model.linears.items() if model.name in models else ():
            for name in formats:
                kind = name if name.startswith("int8") else f"{name}-8"
                for bucket in buckets:
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
    """The fastest configuration and its microseconds, of cases that were timed in all of them."""
    found = {}
    for case in wanted:
        every = configurations(case, sms)
        mine = [records.get(key_of(case, config), {}) for config in every]
        if all(mine):
            times = [record.get("result", float("inf")) for record in mine]
            fastest = min(range(len(times)), key=times.__getitem__)
            chosen = 0 if times[0] <= times[fastest] * (1 + NOISE) else fastest
            if times[chosen] < float("inf"):
                found[case] = every[chosen], times[chosen]
    return found


@functools.lru_cache(maxsize=1)
def weights(kind: str, n: int, k: int, device: torch.device) -> list[FragmentWeight]:
    fmt, number = FORMATS[kind.removesuffix("-8")], copies(n * k // 2, l2_bytes(device))
    return [prepared(random_weight(n, k, fmt, device, seed), "cutlass") for seed in range(number)]


def time_of(device: torch.device, case: Case, config: Config) -> float:
    """Microseconds with cold weights."""
    m, held = tokens_of(case), weights(case.kind, case.n, case.k, device)
    codes, scale = reference.quantize_activation(
        torch.randn(m, case.k, device=device), held[0].fmt.activation
    )
    columns = case.n // 2 if case.silu_mul else case.n
    out = torch.empty(m, columns, dtype=torch.bfloat16, device=device)
    workspace = torch.empty(cuda_gemm.needed_bytes(config), dtype=torch.uint8, device=device)
    calls = [
        functools.partial(
            cuda_gemm.run, config, codes, scale, w, out, None, None, case.silu_mul, workspace
        )
        for w in held
    ]
    return measure(calls, device, seconds=0.02, least=8).us


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [model.name for model in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["lut", "int8"])
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=cuda_tuning.TABLES / "sm_90.json")
    for name, kind in (("--log", Path), ("--deadline", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    sms = cuda_gemm.multiprocessors(device)
    wanted = cases(args.models, args.formats, args.buckets)
    if args.log:
        items = [
            Item(key_of(case, config), functools.partial(time_of, device, case, config))
            for case in wanted
            for config in configurations(case, sms)
        ]
        sys.exit(work(items, args.log, args.deadline, synchronizer(device)))
    end = time.time() + args.minutes * 60 - LAST_SECONDS
    with tempfile.TemporaryDirectory(prefix="tune-") as name:
        log = Path(name) / "time.jsonl"
        command = [sys.executable, *sys.argv, "--log", str(log), "--deadline", str(end)]
        records = supervise(command, log, end)
    found = best(wanted, sms, records)
    before = json.loads(args.output.read_text()) if args.output.exists() else {"entries": []}
    table = cuda_tuning.parse_table(before, str(args.output))
    table |= {case: config for case, (config, _) in found.items()}
    made = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **gpu_state(device)}
    entries = [{**asdict(case), "config": asdict(config)} for case, config in table.items()]
    content = {"measured": made, "entries": sorted(entries, key=json.dumps)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    for case, (config, us) in found.items():
        usual = records[key_of(case, configurations(case, sms)[0])].get("result")
        print(f"{case}: {us:.1f} us in {config}; by the model {usual and round(usual, 1)} us")
    failed = sum("error" in record for record in records.values())
    print(f"{len(found)} of {len(wanted)} cases into {args.output}; {failed} failed")


if __name__ == "__main__":
    main()
