"""The on-disk format: compressed-tensors `pack-quantized`, which vLLM and transformers read.

Per quantized linear, with N = out_features, K = in_features, G groups a row:

    weight_packed int32 [N, K / 8]   codes + 8, eight to a word (`packing.py`)
    weight_scale  bf16  [N, G]       s = t * c (`formats.py`)
    weight_shape  int64 [2]          [N, K]

What that format cannot say (numerics, recipe, provenance) is in `fourbyeight.json`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.architectures import LM_HEAD
from quant.checkpoint.source import read_json
from quant.errors import RequestError
from quant_kernels.formats import PER_CHANNEL, FormatError, WeightFormat
from quant_kernels.packing import CODES_PER_WORD, PackedWeight

SIDE_FILE = "fourbyeight.json"
REPORT_FILE = "report.jsonl"
SIDE_VERSION = 1


def linear_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix."""
    rows, words = weight.words.shape
    return {
        "weight_packed": weight.words,
        "weight_scale": weight.scales.to(torch.bfloat16),
        "weight_shape": torch.tensor([rows, words * CODES_PER_WORD], dtype=torch.int64),
    }


def packed_shapes(
    name: str, shape: tuple[int, int], fmt: WeightFormat
) -> dict[str, tuple[int, ...]]:
    """The stored tensors of a linear [N, K] that a reader needs: full name -> shape."""
    out_features, in_features = shape
    return {
        f"{name}.weight_packed": (out_features, in_features // CODES_PER_WORD),
        f"{name}.weight_scale": (out_features, fmt.groups(in_features)),
    }


def quantization_config(fmt: WeightFormat, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Only keys that every compressed-tensors reader accepts: its argument class forbids unknown ones.
    """
    weights: dict[str, Any] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if fmt.per_channel else "group",
        "group_size": None if fmt.per_channel else fmt.group_size,
        "dynamic": False,
    }
    activations: dict[str, Any] = {
        "num_bits": 8,
        "type": "float" if fmt.activation == "fp8" else "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [LM_HEAD, *ignored],
        "kv_cache_scheme": None,
    }


def parse_quantization_config(directory: Path, raw_config: dict[str, Any]) -> WeightFormat | None:
    """The weight format of a checkpoint directory, or None where it is not quantized.

    Numerics come from fourbyeight.json; a checkpoint of another tool means what its scales say
    (`exact`). Raises RequestError where it is quantized in a way that does not run here.
    """
    config = raw_config.get("quantization_config")
    if not config:
        return None
    where = directory / "config.json"
    if config.get("quant_method") != "compressed-tensors":
        raise RequestError(
            f"{where}: quant_method {config.get('quant_method')!r} is not supported; "
            "only 'compressed-tensors' is"
        )
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise RequestError(f"{where}: {len(groups)} config groups; exactly one is supported")
    group = groups[0]
    layout = group.get("format") or config.get("format")
    if layout != "pack-quantized":
        raise RequestError(f"{where}: format {layout!r} is not supported; only 'pack-quantized' is")
    if config.get("kv_cache_scheme"):
        raise RequestError(f"{where}: a quantized KV cache (kv_cache_scheme) is not supported")
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    _require(where, "weights", weights, num_bits=4, type="int", symmetric=True)
    _require(where, "input_activations", inputs, num_bits=8, symmetric=True, dynamic=True)
    _require(where, "input_activations", inputs, strategy="token")
    if weights.get("actorder") in ("group", "dynamic"):
        raise RequestError(f"{where}: weights.actorder {weights['actorder']!r} is not supported")
    if weights.get("strategy") not in ("group", "channel"):
        raise RequestError(
            f"{where}: weights.strategy {weights.get('strategy')!r} is not supported"
        )
    scheme = "w4afp8" if inputs.get("type") == "float" else "w4a8"
    per_channel = weights["strategy"] == "channel"
    numerics = "int8" if scheme == "w4a8" else "exact"
    if (directory / SIDE_FILE).is_file():
        numerics = str(read_side_file(directory).get("numerics"))
    group_size = PER_CHANNEL if per_channel else int(weights.get("group_size") or 0)
    try:
        return WeightFormat(scheme, group_size, numerics)
    except FormatError as error:
        raise RequestError(f"{where}: {error}") from error


def read_side_file(directory: Path) -> dict[str, Any]:
    side = read_json(directory / SIDE_FILE)
    if side.get("format_version") != SIDE_VERSION:
        raise RequestError(
            f"{directory / SIDE_FILE}: format_version {side.get('format_version')!r} is not "
            f"{SIDE_VERSION}; this checkpoint was written by another version of fourbyeight"
        )
    return side


def is_ignored(name: str, patterns: list[str]) -> bool:
    """Whether a module's full name matches an ignore list: exact names, or `re:` and a regex."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name
        for pattern in patterns
    )


def _require(where: Path, section: str, found: dict[str, Any], **wanted: Any) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise RequestError(
                f"{where}: {section}.{key} is {found.get(key)!r}; only {value!r} is supported"
            )
