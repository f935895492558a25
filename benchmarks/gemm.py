"""The GEMMs of whole models: microseconds, rates, share of the roofline, and bf16 and FP8 beside.

    python benchmarks/gemm.py --json gemm.json --markdown gemm.md --plot gemm.png
    python benchmarks/gemm.py --device cpu --json gemm-cpu.json     (`gemm_cpu.py`)

For every linear [N, K] of `shapes.MODELS` and every M of `shapes.TOKENS`: both schemes in every
backend that runs there (Triton, and on Hopper cutlass; `baseline` is CUTLASS's own mixed-input GEMM
where libquant_cutlass.so is built), and in the same run BF16 (torch.mm, which is cuBLAS) and FP8
(torch._scaled_mm, scales per row and per token).
All of them rotate through copies of their weights larger than the L2 cache (`timing.py`). Weights
are random bytes, legal codes all of them, with legal random scales; activations are random too,
since zeros cost less power and run faster. Activation quantization is timed on its own, from a
tensor that may lie in the cache, as behind the op that wrote it; "with quantize" counts it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from benchmarks import humming_peer  # noqa: E402
from benchmarks.libraries import ALLOW_MISSING, require_cutlass  # noqa: E402
from benchmarks.roofline import Peaks, Work, gemm_work, measure_peaks, plot, rates  # noqa: E402
from benchmarks.shapes import MODELS, TOKENS, ModelShape  # noqa: E402
from benchmarks.timing import copies, first_line, gpu_state, l2_bytes, measure, said  # noqa: E402
from quant_kernels import cutlass_baseline, dispatch, ops, reference  # noqa: E402
from quant_kernels.formats import (  # noqa: E402
    CODE_MIN,
    INT8_ANCHOR,
    LUT_ANCHOR,
    LUT_SCALE_MIN,
    WeightFormat,
    round_row_unit,
)
from quant_kernels.packing import SCALE_DTYPES, SplitWeight, join_weight, span_of  # noqa: E402

FORMATS = (WeightFormat("w4afp8", 128, "lut"), WeightFormat("w4a8", 128, "int8"))
QUICK_TOKENS = (1, 16, 64, 512, 4096)
BACKENDS = ("triton", "cutlass", "baseline", "humming")
HEADER = """\
| linear | N x K | M | format | backend | us | spread | TFLOP/s | GB/s | roofline | bf16 us \
| x bf16 | fp8 us | x fp8 | quantize us | x bf16 with quantize |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Shape:
    """A linear [N, K], and the models' names for it."""

    n: int
    k: int
    names: tuple[str, ...]


def shapes(models: Sequence[ModelShape]) -> list[Shape]:
    """The distinct linears of these models, in their order."""
    names: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for linear, shape in model.linears.items():
            names.setdefault(shape, []).append(f"{model.name} {linear}")
    return [Shape(n, k, tuple(found)) for (n, k), found in names.items()]


def random_weight(
    n: int, k: int, fmt: WeightFormat, device: torch.device, seed: int = 0, least: int = CODE_MIN
) -> SplitWeight:
    """A legal weight in the split layout, made where it is used: codes are uniform.

    least: CODE_MIN, or one more, for codes that stop short of -8.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, device=device)

    span = span_of(k, fmt)
    codes = torch.empty(k // span, n, span // 2, dtype=torch.uint8, device=device)
    codes.random_(0, 256, generator=generator)
    if least > CODE_MIN:
        for shift in (0, 4):  # a nibble of 8 is -8, of 9 is -7
            codes += ((codes >> shift & 15) == 8).to(torch.uint8) << shift
    units = torch.rand(n, generator=generator, device=device) * 0.02 + 0.003
    groups = fmt.groups(k)
    if fmt.per_channel:
        t = torch.empty(0, n, dtype=SCALE_DTYPES[fmt.numerics], device=device)
        return SplitWeight(codes, t, units.bfloat16().float(), fmt)
    if fmt.numerics == "exact":
        scales = torch.rand(groups, n, generator=generator, device=device) * 0.02 + 0.003
        return SplitWeight(codes, scales.bfloat16().float(), torch.ones_like(units), fmt)
    if fmt.numerics == "lut":
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).half()
        legal = values[(values >= LUT_SCALE_MIN) & (values <= LUT_ANCHOR)].to(device)
        t, anchor = legal[integers(0, len(legal), groups, n)], LUT_ANCHOR
    else:
        t, anchor = integers(1, int(INT8_ANCHOR) + 1, groups, n).to(torch.uint8), INT8_ANCHOR
    # A group of every row has the largest scale: the file's scales are read by it.
    t.scatter_(0, integers(0, groups, 1, n), int(anchor))
    return SplitWeight(codes, t, round_row_unit(units.cpu()).to(device), fmt)


@dataclass(frozen=True)
class Contestant:
    """What multiplies: a backend with a weight format, or torch in "bf16" or "fp8"."""

    backend: str
    fmt: WeightFormat | None = None

    @property
    def label(self) -> str:
        return self.backend if self.fmt is None else f"{self.backend} {self.fmt.label}"


TORCH = (Contestant("bf16"), Contestant("fp8"))


def contestants(
    device: torch.device, formats: Sequence[WeightFormat] = FORMATS
) -> list[Contestant]:
    """Which of BACKENDS multiply these formats on a device."""
    found = [Contestant("triton", fmt) for fmt in formats]
    for fmt in formats:
        try:
            backend = dispatch.choose(f"gemm_{fmt.scheme}", device, "cutlass")
        except dispatch.BackendUnavailable:
            continue
        found.append(Contestant(backend, fmt))
        if fmt.numerics == "lut" and fmt.group_size == 128 and cutlass_baseline.available():
            found.append(Contestant("baseline", fmt))
    if humming_peer.why_unavailable(device) is None:
        found += [Contestant("humming", fmt) for fmt in formats]
    return found


# Shapes follow one another with growing M: only the last linear's weights are kept.
@functools.lru_cache(maxsize=1)
def weights(n: int, k: int, who: Contestant, device: torch.device) -> list[Any]:
    """As many copies of a linear's weight, as `who` reads it, as evict one another from the L2."""
    l2 = l2_bytes(device)
    if who.fmt is not None:
        seeds = range(copies(n * k // 2, l2))
        return [prepared(random_weight(n, k, who.fmt, device, i), who.backend) for i in seeds]
    number = copies((2 if who.backend == "bf16" else 1) * n * k, l2)
    wide = (torch.randn(n, k, dtype=torch.bfloat16, device=device) for _ in range(number))
    if who.backend == "bf16":
        return [weight * 0.02 for weight in wide]
    units = [torch.rand(1, n, device=device) * 0.01 + 0.001 for _ in range(number)]
    return [
        ((weight * 64).to(torch.float8_e4m3fn), unit)
        for weight, unit in zip(wide, units, strict=True)
    ]


def prepared(weight: SplitWeight, backend: str) -> Any:
    """The weight as a backend reads it."""
    if backend == "triton":
        return weight
    packed = join_weight(weight)
    if backend == "baseline":
        return cutlass_baseline.prepare(packed)
    if backend == "humming":
        return humming_peer.prepare(packed)
    return ops.prepare(packed, backend=backend)


def about(shape: Shape, m: int, who: Contestant) -> dict[str, Any]:
    """What a row says before it has a time."""
    row = {"names": shape.names, "n": shape.n, "k": shape.k, "m": m, "backend": who.backend}
    if who.fmt is not None:
        work = asdict(gemm_work(m, shape.n, shape.k, who.fmt))
        row |= {"format": who.fmt.label, "kind": who.fmt.activation, **work}
    return row


def measure_gemm(shape: Shape, m: int, who: Contestant, device: torch.device) -> dict[str, Any]:
    """The time of one contestant."""
    held = weights(shape.n, shape.k, who, device)
    x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
    out = torch.empty(m, shape.n, dtype=torch.bfloat16, device=device)
    if who.backend == "bf16":
        return asdict(measure(_bf16_calls(x, held, out), device))
    codes = reference.quantize_activation(x, "fp8" if who.fmt is None else who.fmt.activation)
    if who.fmt is None:
        return asdict(measure(_fp8_calls(*codes, held), device))
    return asdict(measure(_our_calls(who.backend, *codes, held, out), device))


def measure_quantize(m: int, k: int, kind: str, device: torch.device) -> dict[str, Any]:
    """BF16 [M, K] to codes and token scales, by the op."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    codes = torch.empty(m, k, dtype=dtype, device=device)
    scale = torch.empty(m, 1, device=device)
    call = functools.partial(ops.quantize_activation, x, codes, scale, backend="triton")
    return asdict(measure([call], device, seconds=0.02))


def joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a format and backend, with the times of what it stands beside and the ratios.

    parts: `about` with `measure_gemm`, or with an "error"; and {"m", "k", "kind", "backend":
    "quantize"} with `measure_quantize`.
    """
    beside: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        if "format" not in part:
            last = part["kind"] if part["backend"] == "quantize" else part["n"]
            beside[part["backend"], part["m"], part["k"], last] = part
    rows = []
    for row in (dict(part) for part in parts if "format" in part):
        for name, last in (("bf16", row["n"]), ("fp8", row["n"]), ("quantize", row["kind"])):
            found = beside.get((name, row["m"], row["k"], last), {})
            for field in ("us", "spread", "how", "error"):
                row[f"{name}_{field}"] = found.get(field)
        if "us" in row:
            row |= _ratios(row["us"], row["bf16_us"], row["fp8_us"], row["quantize_us"])
        rows.append(row)
    return rows


def compile_once(shape: Shape, m: int, who: Contestant, device: torch.device) -> None:
    """Run the kernels that `measure_gemm` will time: who compiles keeps the result on disk."""
    assert who.fmt is not None
    out = torch.empty(m, shape.n, dtype=torch.bfloat16, device=device)
    x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
    codes, scale = reference.quantize_activation(x, who.fmt.activation)
    if who.backend == "triton":
        ops.quantize_activation(x, codes, scale, backend="triton")
    held = prepared(random_weight(shape.n, shape.k, who.fmt, device), who.backend)
    _our_calls(who.backend, codes, scale, [held], out)[0]()


def add_rates(rows: Sequence[dict[str, Any]], peaks: Peaks) -> None:
    """TFLOP/s, GB/s and the share of the roofline into rows that have a time."""
    for row in rows:
        if "us" in row:
            work = Work(row["operations"], row["bytes"], row["type"])
            row |= rates(work, row["us"], peaks)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table; ratios above 1 are in our favour."""
    lines = HEADER.splitlines()
    for row in rows:
        head = [row["names"][0], f"{row['n']} x {row['k']}", str(row["m"])]
        head += [row["format"], row["backend"]]
        if "error" in row:
            lines.append("| " + " | ".join([*head, row["error"]]) + " |" * 11)
            continue
        share = row.get("roofline")
        cells = [
            f"{row['us']:.1f}", f"{row['spread']:.0%}",
            f"{row.get('tflops', 0):.0f}", f"{row.get('gbps', 0):.0f}",
            "" if share is None else f"{share:.0%}",
            number(row["bf16_us"], 1), number(row["x_bf16"], 2), number(row["fp8_us"], 1),
            number(row["x_fp8"], 2), number(row["quantize_us"], 1),
            number(row["x_bf16_with_quantize"], 2),
        ]  # fmt: skip
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def number(value: float | None, digits: int) -> str:
    """For a table; empty where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def _ratios(
    us: float, bf16: float | None, fp8: float | None, quantize: float | None
) -> dict[str, float | None]:
    return {
        "x_bf16": bf16 / us if bf16 else None,
        "x_fp8": fp8 / us if fp8 else None,
        "x_bf16_with_quantize": bf16 / (us + quantize) if bf16 and quantize else None,
    }


def _our_calls(
    backend: str, codes: Tensor, scale: Tensor, held: Sequence[Any], out: Tensor
) -> list[Callable[[], object]]:
    (m, n), k = out.shape, codes.shape[1]
    if backend == "humming":
        return humming_peer.calls(codes, scale, held, out)
    if backend == "baseline":
        return [
            functools.partial(cutlass_baseline.gemm, codes, scale, weight, out) for weight in held
        ]
    size = ops.workspace_bytes(codes.device, gemms=[(n, k)], max_tokens=m, backend=backend)
    workspace = torch.empty(size, dtype=torch.uint8, device=codes.device)
    return [
        functools.partial(ops.gemm, codes, scale, weight, out, workspace=workspace, backend=backend)
        for weight in held
    ]


def _bf16_calls(x: Tensor, held: Sequence[Tensor], out: Tensor) -> list[Callable[[], object]]:
    return [functools.partial(torch.mm, x, weight.T, out=out) for weight in held]


def _fp8_calls(
    codes: Tensor, scale: Tensor, held: Sequence[tuple[Tensor, Tensor]]
) -> list[Callable[[], object]]:
    return [
        functools.partial(
            torch._scaled_mm, codes, weight.T, scale_a=scale, scale_b=unit,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )
        for weight, unit in held
    ]  # fmt: skip


def _attempt(measure_it: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The figures, or why there are none."""
    try:
        return measure_it(*args)
    except Exception as error:
        return {"error": first_line(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="the first model, few M")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="the roofline, as PNG")
    parser.add_argument("--allow-missing", action="store_true", help=ALLOW_MISSING)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each library, on a CPU")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        from benchmarks import gemm_cpu

        some = gemm_cpu.SHAPES[: 1 if args.quick else None]
        gemm_cpu.run(some, args.tokens or gemm_cpu.TOKENS, args.rounds, args.json, args.markdown)
        return
    chosen = [model for model in MODELS if not args.models or model.name in args.models]
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    require_cutlass(device, args.allow_missing)
    peaks = measure_peaks(device)
    parts: list[dict[str, Any]] = []
    for shape in shapes(chosen[:1] if args.quick else chosen):
        for who in (*TORCH, *contestants(device)):
            for m in tokens:
                parts.append(about(shape, m, who) | _attempt(measure_gemm, shape, m, who, device))
                print(f"{shape.names[0]} M {m} {who.label}: {said(parts[-1])}", flush=True)
        for m, kind in itertools.product(tokens, ("fp8", "int8")):
            part = {"backend": "quantize", "m": m, "k": shape.k, "kind": kind}
            parts.append(part | _attempt(measure_quantize, m, shape.k, kind, device))
    rows = joined(parts)
    add_rates(rows, peaks)
    print(markdown(rows))
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    if args.plot:
        plot([row for row in rows if "us" in row], peaks, args.plot)
    if args.json:
        figures = {"gpu": gpu_state(device), "peaks": asdict(peaks), "gemm": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
