"""What a checkpoint holds, layer by layer, from its headers and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.architectures import LINEARS, block_prefix
from quant.checkpoint.compressed_tensors import (
    REPORT_FILE,
    SIDE_FILE,
    is_ignored,
    packed_shapes,
    parse_quantization_config,
    read_side_file,
)
from quant.checkpoint.reader import FLOAT_BITS, CheckpointReader
from quant.checkpoint.side import read_side
from quant.report import mean_bits_per_weight, read_jsonl
from quant_kernels.formats import bits_per_weight


@dataclass(frozen=True)
class LayerRow:
    """One linear of a block. error: `LayerReport.error_after`, None where no report says it."""

    name: str
    shape: tuple[int, int]
    format: str
    activations: str
    bits_per_weight: float
    error: float | None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint directory. bits_per_weight is over the linears of the blocks. kv_cache: how keys
    and values are rounded, None: not at all."""

    directory: str
    model_type: str
    scheme: str | None
    group_size: int | None
    numerics: str | None
    kv_cache: str | None
    size_bytes: int
    bits_per_weight: float
    recipe: dict[str, Any] | None
    layers: tuple[LayerRow, ...]


def inspect_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Read a checkpoint's headers; RequestError where it is none that runs here."""
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    fmt = parse_quantization_config(directory, reader.raw_config)
    ignore = (reader.raw_config.get("quantization_config") or {}).get("ignore") or []
    side = read_side(directory, reader.config)
    ours = (directory / SIDE_FILE).is_file()
    report = read_jsonl(directory / REPORT_FILE) if ours else []
    errors = {row.name: row.error_after for row in report}
    rows = []
    for layer in range(reader.config.num_layers):
        for linear in LINEARS:
            name, shape = block_prefix(layer) + linear, reader.config.linear_shape(linear)
            if fmt is None or is_ignored(name, ignore):
                stored = reader.dtype(f"{name}.weight")
                rows.append(LayerRow(name, shape, stored, stored, FLOAT_BITS[stored], None))
                continue
            reader.check_shapes(packed_shapes(name, shape, fmt))
            bits = bits_per_weight(shape[1], fmt)
            rows.append(LayerRow(name, shape, fmt.label, fmt.activation, bits, errors.get(name)))
    return Inspection(
        directory=str(directory),
        model_type=reader.config.model_type,
        scheme=fmt.scheme if fmt else None,
        group_size=fmt.group_size if fmt else None,
        numerics=fmt.numerics if fmt else None,
        kv_cache=side.kv.label if side.kv else None,
        size_bytes=reader.size_bytes(),
        bits_per_weight=mean_bits_per_weight(rows),
        recipe=read_side_file(directory).get("recipe") if ours else None,
        layers=tuple(rows),
    )
