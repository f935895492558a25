"""What the grid of the group scales costs: E4M3 with FireQ's tensor scale, or with a unit per row.

    python benchmarks/scale_grids.py MODEL --group-size 128

`lut` numerics multiply E4M3(q * t), t an E4M3 group scale. Group scales of a trained model lie
where E4M3 has few bits left or none, so they are multiplied by something first:

    none        nothing
    smallest    FireQ: per tensor, the smallest power of two with which the fewest scales fall below
                the smallest subnormal (those that remain keep one or two bits)
    largest     per tensor, the largest power of two that does not overflow
    row unit    this project: a unit per output row, so that its largest t is 56 (`formats.py`)
    exact       BF16 group scales, on FP32 partial sums: no E4M3 at all

Every grid gets the same scales to start from, max|W| / 7.5, and the nearest codes on what the
kernel multiplies. The figures are |W - W^|^2 / |W|^2 over all linears of the blocks, and the share
of group scales that E4M3 holds as a subnormal or not at all. Weights of larger models are smaller:
--deviation 0.02, the usual initializer_range of decoders, scales every linear to it first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from quant.architectures import LINEARS  # noqa: E402
from quant.calibration.scales import HALF_RANGE, choose_scales  # noqa: E402
from quant.checkpoint.reader import CheckpointReader  # noqa: E402
from quant.checkpoint.source import resolve_model  # noqa: E402
from quant_kernels.formats import (  # noqa: E402
    CODE_MAX,
    CODE_MIN,
    E4M3_MAX,
    WeightFormat,
    effective_weight,
    nearest_codes,
    round_e4m3,
    split_scales,
)

SMALLEST_SUBNORMAL, SMALLEST_NORMAL = 2.0**-9, 2.0**-6
# FireQ's search: 2^0 .. 2^14, scales max|W| / 7, and no group's maximum beyond E4M3.
POWERS = range(15)
FIREQ_RANGE = 7
GRIDS = ("none", "smallest", "largest", "row unit", "exact")


def tensor_scale(weight: Tensor, group_size: int, grid: str) -> float:
    """The power of two that FireQ multiplies a weight [N, K] by, or the largest it may."""
    amax = weight.view(len(weight), -1, group_size).abs().amax(dim=-1)
    admissible = [2.0**i for i in POWERS if float(amax.max()) * 2.0**i <= E4M3_MAX] or [1.0]
    if grid == "largest":
        return admissible[-1]
    limit = FIREQ_RANGE * SMALLEST_SUBNORMAL
    below = [float((1 - amax * s / limit).clamp_min(0).sum()) for s in admissible]
    return admissible[below.index(min(below))]


def on_tensor_grid(weight: Tensor, group_size: int, power: float) -> tuple[Tensor, Tensor]:
    """W^ [N, K] with E4M3 group scales of power * W, and those scales [N, G]."""
    groups = (weight * power).view(len(weight), -1, group_size)
    t = round_e4m3(groups.abs().amax(dim=-1) / HALF_RANGE).clamp_min(SMALLEST_SUBNORMAL)
    q = torch.arange(CODE_MIN, CODE_MAX + 1).float()
    levels = round_e4m3(t.unsqueeze(-1) * q)  # [N, G, 16]
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    codes = torch.searchsorted(middles, groups)
    return (levels.gather(-1, codes) / power).view_as(weight), t


def on_row_grid(weight: Tensor, group_size: int, numerics: str) -> tuple[Tensor, Tensor]:
    """W^ [N, K] in the project's format with absmax scales, and the group scales t [N, G]."""
    fmt = WeightFormat("w4afp8", group_size, numerics)
    scales = choose_scales(weight, fmt, "absmax")
    codes = nearest_codes(weight, scales, fmt)
    return effective_weight(codes, scales, fmt), split_scales(scales, fmt)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="HF directory, .gguf file, or hub id")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--deviation", type=float, help="scale every linear's weights to it first")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reader = CheckpointReader(resolve_model(args.model))
    lost = dict.fromkeys(GRIDS, 0.0)
    poor = dict.fromkeys(GRIDS, 0)
    powers: dict[str, list[float]] = {"smallest": [], "largest": []}
    energy, groups = 0.0, 0
    for layer in range(reader.config.num_layers):
        for name, weight in reader.read_block(layer, [f"{n}.weight" for n in LINEARS]).items():
            w = weight.float()
            if args.deviation:
                w = w * (args.deviation / w.std())
            if w.shape[1] % args.group_size:
                parser.error(f"{name} has {w.shape[1]} columns: choose another --group-size")
            energy += float(w.double().square().sum())
            groups += w.numel() // args.group_size
            for grid in GRIDS:
                if grid in ("row unit", "exact"):
                    numerics = "lut" if grid == "row unit" else "exact"
                    found, t = on_row_grid(w, args.group_size, numerics)
                else:
                    power = 1.0 if grid == "none" else tensor_scale(w, args.group_size, grid)
                    powers.setdefault(grid, []).append(power)
                    found, t = on_tensor_grid(w, args.group_size, power)
                lost[grid] += float((w - found).double().square().sum())
                if grid != "exact":
                    poor[grid] += int((t < SMALLEST_NORMAL).sum())
    figures = {
        "model": args.model,
        "group_size": args.group_size,
        "deviation": args.deviation,
        "relative_error": {grid: lost[grid] / energy for grid in GRIDS},
        "subnormal_scales": {grid: poor[grid] / groups for grid in GRIDS if grid != "exact"},
        "tensor_scales_log2": {
            grid: [math.log2(min(found)), math.log2(max(found))]
            for grid, found in powers.items()
            if grid != "none"
        },
    }
    table = Table("group scales", "|W - W^|^2 / |W|^2", "x exact", "subnormal scales")
    for grid in GRIDS:
        ratio = f"{lost[grid] / lost['exact']:.3f}"
        share = "" if grid == "exact" else f"{poor[grid] / groups:.1%}"
        table.add_row(grid, f"{lost[grid] / energy:.4%}", ratio, share)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
