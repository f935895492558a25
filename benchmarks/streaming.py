"""Quantize a checkpoint larger than memory: a synthetic one, under a limit, with its peak.

    python benchmarks/streaming.py --layers 40 --limit-gb 3

The limit is RLIMIT_AS (`ulimit -v`): every byte of address space counts, touched or not, also the
interpreter's and its libraries'. What those take before any work is measured and printed beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.synthetic import Shape, write_checkpoint, write_tokens  # noqa: E402

LENGTH = 512
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
# Hessian compensation without the search for scales, which costs time and no memory.
RECIPE = """\
scheme: w4a8
group_size: 128
passes:
  - compensate: {scales: absmax}
"""
# Of the run's figures: long, or of this machine.
LEFT_OUT = ("layers", "recipe", "ignored", "output", "command", "dry_run")
INTERPRETER = """\
import re, quant
status = open("/proc/self/status").read()
print(*(int(re.search(key + r":\\s*(\\d+)", status)[1]) * 1024 for key in ("VmSize", "VmRSS")))
"""


def run_under_limit(
    directory: Path, model: Path, tokens: Path, samples: int, limit: int | None, offload: str
) -> dict[str, Any]:
    """Quantize in a process of its own; the figures of its --json. limit: of address space."""
    recipe, figures = directory / "recipe.yaml", directory / "figures.json"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "quant", "run", str(model), "-o", str(directory / "out")]
    command += ["--recipe", str(recipe), "--dataset", str(tokens), "--device", "cpu"]
    command += ["--num-calibration-samples", str(samples), "--max-seq-length", str(LENGTH)]
    command += ["--activation-offload", offload, "--max-shard-size", "2GB"]
    subprocess.run(
        [*command, "--json", str(figures)],
        check=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        preexec_fn=lambda: limit and resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def interpreter_bytes() -> tuple[int, int]:
    """What `import quant` alone takes: address space, and resident."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETER],
        check=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    space, resident = map(int, done.stdout.split())
    return space, resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--samples", type=int, default=16, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--limit-gb", type=float, default=3.0, help="of address space; 0: none")
    parser.add_argument("--activation-offload", default="auto")
    parser.add_argument("--work", type=Path, default=None, help="a directory with room; temporary")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    shape = Shape(args.hidden, args.intermediate, args.heads, args.kv_heads, args.layers)
    limit = int(args.limit_gb * 1e9) or None
    out = Console()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="streaming-") as name:
        directory = Path(name)
        started = time.perf_counter()
        size = write_checkpoint(shape, directory / "model")
        write_tokens(directory / "tokens.npy", args.samples * LENGTH)
        out.print(f"{size / 1e9:.2f} GB of checkpoint in {time.perf_counter() - started:.0f} s")
        space, resident = interpreter_bytes()
        figures = run_under_limit(
            directory,
            directory / "model",
            directory / "tokens.npy",
            args.samples,
            limit,
            args.activation_offload,
        )
    result = {
        "shape": vars(shape),
        "checkpoint_bytes": size,
        "address_space_limit_bytes": limit,
        "interpreter_address_space_bytes": space,
        "interpreter_resident_bytes": resident,
        **{key: figures[key] for key in figures if key not in LEFT_OUT},
    }
    out.print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
