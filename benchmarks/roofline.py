"""The roofline of a GPU, measured, and where the kernels stand under it.

    floor(work) = max(operations / peak, bytes / bandwidth),   share = floor / measured time

Operations are those of the product itself, 2 M N K, and the peak is that of the tensor cores' type
that multiplies them. Bytes are the fewest that must move: every input read and every output written
once, in the type they are stored in.

    python benchmarks/roofline.py --json peaks.json

measures bandwidth (a large copy, bytes read and written), and the dense BF16, FP8 and INT8 peaks
(cuBLAS on 8192 x 8192 x 8192 random numbers). A library's peak is no limit of nature: a kernel that
beats it has a share above 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks.timing import Call, first_line, gpu_state, measure  # noqa: E402
from quant_kernels.formats import WeightFormat  # noqa: E402

PEAK_SIZE = 8192
COPY_BYTES = 2**31


@dataclass(frozen=True)
class Peaks:
    """Bytes a second, and operations a second by type; a type the device lacks is absent."""

    bandwidth: float
    operations: dict[str, float]


@dataclass(frozen=True)
class Work:
    """Operations of a type ("bf16", "fp8", "int8"), and the fewest bytes that must move."""

    operations: float
    bytes: float
    type: str


def gemm_work(m: int, n: int, k: int, fmt: WeightFormat, out_bytes: int = 2) -> Work:
    """A W4A8 GEMM: 8-bit activations and their scales, codes, group scales, row units, output."""
    scale_bytes = {"lut": 2, "exact": 4, "int8": 1}[fmt.numerics]
    groups = 0 if fmt.per_channel else fmt.groups(k)
    moved = m * (k + 4) + n * (k / 2 + groups * scale_bytes + 4) + out_bytes * m * n
    return Work(2.0 * m * n * k, moved, fmt.activation)


def prefill_work(length: int, heads: int, kv_heads: int, dim: int) -> Work:
    """Causal attention of a whole prompt: half the score matrix, two products of 2 D each."""
    seen = length * (length + 1) / 2
    moved = length * heads * (dim + 4 + 2 * dim) + length * kv_heads * (dim + 8)
    return Work(4.0 * seen * dim * heads, moved, "fp8")


def decode_work(batch: int, length: int, heads: int, kv_heads: int, dim: int) -> Work:
    """One token a sequence over an INT4 cache: D bytes of codes and 8 of scales a token and head.

    The codes are multiplied as FP16 numbers, whose tensor-core peak is BF16's.
    """
    moved = batch * (length * kv_heads * (dim + 8) + heads * (dim + 4 + 2 * dim))
    return Work(4.0 * batch * length * dim * heads, moved, "bf16")


def floor_us(work: Work, peaks: Peaks) -> float:
    """Microseconds below which the work cannot be done; NaN without a peak of its type."""
    peak = peaks.operations.get(work.type)
    if not peak:
        return float("nan")
    return max(work.operations / peak, work.bytes / peaks.bandwidth) * 1e6


def rates(work: Work, us: float, peaks: Peaks | None) -> dict[str, float | None]:
    """TFLOP/s (or tera-operations), GB/s, and the shares of roofline and bandwidth in `us`."""
    share = floor_us(work, peaks) / us if peaks and us else float("nan")
    return {
        "tflops": work.operations / us / 1e6,
        "gbps": work.bytes / us / 1e3,
        "roofline": share if share == share else None,
        "bandwidth": work.bytes / us * 1e6 / peaks.bandwidth if peaks else None,
    }


def measure_peaks(device: torch.device, size: int = PEAK_SIZE, copied: int = COPY_BYTES) -> Peaks:
    """The ceilings of this device, now."""
    bandwidth = _copy_bandwidth(copied, device)
    operations = {}
    for kind, make in (("bf16", _bf16_product), ("fp8", _fp8_product), ("int8", _int8_product)):
        try:
            us = measure([make(size, device)], device, seconds=0.3).us
        except (RuntimeError, NotImplementedError) as error:
            print(f"roofline: no {kind} peak here: {first_line(error)}")
            continue
        operations[kind] = 2.0 * size**3 / us * 1e6
    return Peaks(bandwidth, operations)


def plot(rows: Sequence[dict[str, Any]], peaks: Peaks, path: Path) -> bool:
    """The roofline and a point a row (its "operations", "bytes", "type", "us"), as PNG.

    False, with a note, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"roofline: {path.name} is not drawn: matplotlib is not installed")
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [2.0**i for i in range(14)]
    for i, (kind, peak) in enumerate(peaks.operations.items()):
        roof = [min(peak, x * peaks.bandwidth) / 1e12 for x in intensities]
        axes.plot(intensities, roof, color=f"C{i}", label=f"{kind} roofline, measured")
        mine = [row for row in rows if row["type"] == kind]
        axes.scatter(
            [row["operations"] / row["bytes"] for row in mine],
            [row["operations"] / row["us"] / 1e6 for row in mine],
            color=f"C{i}",
            s=12,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10^12 operations/s")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def _copy_bandwidth(copied: int, device: torch.device) -> float:
    source = torch.empty(copied // 2, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    us = measure([functools.partial(target.copy_, source)], device, seconds=0.2).us
    return 2 * source.numel() / us * 1e6


def _bf16_product(size: int, device: torch.device) -> Call:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b.T, out=out)


def _fp8_product(size: int, device: torch.device) -> Call:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8_product(size: int, device: torch.device) -> Call:
    a, b = (
        torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2)
    )
    product: Callable[..., torch.Tensor] = torch._int_mm
    return lambda: product(a, b.T)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    peaks = measure_peaks(device)
    print(f"copy: {peaks.bandwidth / 1e9:.0f} GB/s")
    for kind, peak in peaks.operations.items():
        print(f"{kind}: {peak / 1e12:.0f} TFLOP/s")
    if args.json:
        args.json.write_text(json.dumps({**asdict(peaks), "gpu": gpu_state(device)}, indent=2))


if __name__ == "__main__":
    main()
