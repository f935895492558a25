"""Humming's INT4 GEMMs, which vLLM and SGLang call, where `humming-kernels` is installed.

    out[m, n] = BF16(a[m] sum_k x[m, k] q[n, k] s[n, G(k)])     x E4M3 or INT8, s BF16

Weights are handed over as a checkpoint has them, which is Humming's own format: words of eight
codes, q + 8, the first in the lowest bits, and BF16 scales [N, G]. Its transform then brings them
into the kernel's order; w4afp8 weights without a code of -8 it stores as sign and magnitude, which
cost fewer instructions. Scales are applied to sums of a group, never rounded, so that what is
multiplied is q s, `exact` of `formats.py`, whatever the weight's numerics.

A kernel is compiled for a shape and a tile when it is first called, in two seconds of a core, and
kept in HUMMING_CACHE_DIR, ~/.humming by default. The tile is the one that Humming's heuristics
choose for M: asked for none, it would compile those of every M, up to a hundred for a shape.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import metric
from benchmarks.timing import first_line
from quant_kernels.formats import WeightFormat, effective_weight
from quant_kernels.packing import CODES_AT_ONCE, PackedWeight, unpack_int4
from quant_kernels.reference import dequantize_activation

ACTIVATIONS = {"fp8": "float8e4m3", "int8": "int8"}
COMPUTE = {"gemm_type": "dense"}
# BF16's rounding leaves 1e-6 of the error metric, a group that is out of place more than 1e-3.
MOST_ERROR = 1e-4
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class HummingWeight:
    """A linear as Humming runs it, and the weight that it was made of."""

    layer: Any
    source: PackedWeight


def why_unavailable(device: torch.device) -> str | None:
    """Why Humming is not in the tables, and what to do about it; None where it can be."""
    if device.type != "cuda":
        return f"Humming has no kernels for {device.type}"
    if importlib.util.find_spec("humming") is None:
        return "No Humming here: pip install humming-kernels"
    try:
        _humming()
    except Exception as error:  # whatever it imports, or links
        return f"Humming cannot be imported: {first_line(error)}"
    return None


def prepare(weight: PackedWeight) -> HummingWeight:
    """Checkpoint layout -> Humming's, on the weight's GPU."""
    (n, k), fmt = weight.shape, weight.fmt
    make_layer, _ = _humming()
    layer = make_layer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "int4", "group_size": 0 if fmt.per_channel else fmt.group_size},
        input_config={"dtype": ACTIVATIONS[fmt.activation]},
        torch_dtype=torch.bfloat16,
    ).to(weight.words.device)
    layer.load_from_tensors({"weight": weight.words, "weight_scale": weight.scales})
    layer.transform()
    return HummingWeight(layer, weight)


def calls(
    codes: Tensor, scale: Tensor, held: Sequence[HummingWeight], out: Tensor
) -> list[Callable[[], object]]:
    """A call for each of these weights, which are of one shape, to be timed.

    codes [M, K], scale [M, 1] FP32; out [M, N] BF16. The first one is run and checked; raises
    `checks.Wrong` where its result is not the product.
    """
    _, heuristics = _humming()
    tile = heuristics(
        held[0].layer.humming_config, shape_m=len(codes), device=codes.device, **COMPUTE
    )
    run: list[Callable[[], object]] = [
        functools.partial(
            weight.layer, codes, outputs=out, input_scale=scale,
            compute_config=json.dumps(COMPUTE), tuning_config=json.dumps(tile),
        )
        for weight in held
    ]  # fmt: skip
    out.fill_(float("nan"))
    run[0]()
    check(codes, scale, held[0].source, out)
    return run


def check(codes: Tensor, scale: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """Raise Wrong unless out is near a x (q s)^T, by some of its tokens and all of its features."""
    tokens = torch.linspace(0, len(out) - 1, CHECKED_TOKENS, device=out.device).long().unique()
    a = scale[tokens]  # products are compared without it, so that every token counts alike
    x = dequantize_activation(codes[tokens], torch.ones_like(a))
    exact = WeightFormat("w4afp8", weight.fmt.group_size, "exact")
    step = max(1, CODES_AT_ONCE // weight.shape[1])
    parts = [
        x @ effective_weight(unpack_int4(words), scales, exact).T
        for words, scales in zip(weight.words.split(step), weight.scales.split(step), strict=True)
    ]
    found = out[tokens].float() / a
    metric("Humming beside the dequantized product", torch.cat(parts, 1), found, MOST_ERROR)


def _humming() -> tuple[Any, Any]:
    """Its layer, and the heuristics that choose a tile.

    Its import starts processes that build what its wheel brings along, unless told not to: they
    would disturb measurements. Its default compiler, NVRTC, where it comes from PyPI, finds its
    second library by LD_LIBRARY_PATH alone: nvcc is taken, if it is where Humming looks for it.
    """
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    if any(home and Path(home, "bin", "nvcc").is_file() for home in homes):
        os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    return HummingLayer, get_heuristics_config
