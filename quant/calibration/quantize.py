"""`quantize`: from a checkpoint and a recipe to a 4-bit checkpoint directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.architectures import EMBEDDING, FINAL_NORM, LM_HEAD, check_length
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.pipeline import quantize_blocks
from quant.checkpoint.compressed_tensors import (
    REPORT_FILE,
    SIDE_FILE,
    SIDE_VERSION,
    quantization_config,
)
from quant.checkpoint.reader import FLOAT_BITS, CheckpointReader, load_tokenizer
from quant.checkpoint.source import resolve_model
from quant.checkpoint.writer import CheckpointWriter, check_output
from quant.device import select_device, select_dtype
from quant.recipe import DEFAULT_PRESET, Recipe, load_recipe
from quant.report import (
    OnProgress,
    Progress,
    RunReport,
    ignore_progress,
    mean_bits_per_weight,
    peak_memory_bytes,
    reset_peak_memory,
    to_jsonl,
)
from quant.schemes import LayerPlan, plan_layers

# K x K matrices in FP32 while a site is compensated: the Hessian, it in activation order, damped,
# and the factors of its inverse.
HESSIANS_AT_ONCE = 6


@dataclass(frozen=True)
class RunPlan:
    """What a run would do, from the checkpoint's headers alone. Sizes in bytes."""

    source: str
    model_type: str
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    source_size_bytes: int
    size_bytes: int
    activation_bytes: int
    block_bytes: int
    hessian_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Over the layers to quantize."""
        return mean_bits_per_weight([row for row in self.layers if row.fmt])

    def to_dict(self) -> dict[str, Any]:
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "recipe": self.recipe.to_dict(),
            "layers": [
                {
                    "name": row.name,
                    "shape": row.shape,
                    "format": row.fmt.label if row.fmt else None,
                    "bits_per_weight": row.bits_per_weight,
                }
                for row in self.layers
            ],
            "bits_per_weight": self.bits_per_weight,
        }


def plan(
    model: str,
    output_dir: str | Path,
    recipe: Recipe | str = DEFAULT_PRESET,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> RunPlan:
    """Check a request, its data too, and say what it would do; arguments as `quantize`.

    Makes nothing at OUT. A hub id is fetched and a GGUF file converted, into their caches.
    """
    recipe = _recipe(recipe, overrides)
    kept_dtype = select_dtype(dtype)
    select_device(device)
    check_output(Path(output_dir).expanduser())
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    found = _plan(reader, recipe, kept_dtype)
    _windows(reader, recipe, trust_remote_code)
    return found


def quantize(
    model: str,
    output_dir: str | Path,
    recipe: Recipe | str = DEFAULT_PRESET,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = ignore_progress,
    **overrides: Any,
) -> RunReport:
    """Quantize MODEL into OUT, a compressed-tensors checkpoint directory.

    model: an HF directory, a .gguf file, or a hub id. recipe: a Recipe, a preset's name, or a YAML
    file. overrides: fields of Recipe and Calibration (scheme, group_size, numerics, ignore,
    dataset, num_calibration_samples, max_seq_length, seed) that replace the recipe's. dtype: of the
    tensors that stay unquantized ("auto": as stored). device: "auto" is a GPU where there is one.

    Raises RequestError, before anything is written, where the request cannot be met, and
    WorkFailed where the numbers break down; neither leaves anything behind at OUT.
    """
    started = time.perf_counter()
    reset_peak_memory()
    output = Path(output_dir).expanduser()
    recipe = _recipe(recipe, overrides)
    kept_dtype, target = select_dtype(dtype), select_device(device)
    check_output(output)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    run = _plan(reader, recipe, kept_dtype)
    on_progress(Progress("calibration data", 0, 1, recipe.calibration.dataset))
    windows = _windows(reader, recipe, trust_remote_code)
    on_progress(Progress("calibration data", 1, 1, recipe.calibration.dataset))
    by_name = {row.name: row for row in run.layers}
    ignored = tuple(row.name for row in run.layers if row.fmt is None)
    with CheckpointWriter(output) as writer, torch.inference_mode():
        rows = quantize_blocks(
            reader, by_name, recipe.passes[0], windows, writer, target, kept_dtype, on_progress
        )
        on_progress(Progress("write", 0, 1, str(output)))
        _write_rest(reader, writer, recipe, model, ignored, kept_dtype)
        writer.write_text(REPORT_FILE, to_jsonl(rows))
        writer.copy_companions(directory)
        writer.finish()
        on_progress(Progress("write", 1, 1, str(output)))
    return RunReport(
        output=str(output),
        recipe=recipe.to_dict(),
        layers=tuple(rows),
        ignored=ignored,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        size_bytes=directory_bytes(output),
        source_size_bytes=reader.size_bytes(),
        bits_per_weight=mean_bits_per_weight(rows),
    )


def directory_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _recipe(recipe: Recipe | str, overrides: dict[str, Any]) -> Recipe:
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    return recipe.override(**overrides)


def _plan(reader: CheckpointReader, recipe: Recipe, dtype: torch.dtype | None) -> RunPlan:
    reader.check_dense()
    cfg = reader.config
    layers = tuple(plan_layers(cfg, recipe).values())
    # What stays takes its stored type, all of one kind as a rule, or the type asked for.
    stored = reader.dtype(f"{EMBEDDING}.weight")
    kept_bits = FLOAT_BITS[stored] if dtype is None else 8.0 * dtype.itemsize
    saved = sum(
        row.shape[0] * row.shape[1] * (kept_bits - row.bits_per_weight) / 8
        for row in layers
        if row.fmt
    )
    calibration = recipe.calibration
    tokens = calibration.num_calibration_samples * calibration.max_seq_length
    widest = max(cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.intermediate_size)
    block_weights = sum(_elements(shape) for shape in cfg.block_shapes().values())
    outer = sum(_elements(shape) for shape in cfg.outer_shapes().values())
    return RunPlan(
        source=str(reader.directory),
        model_type=cfg.model_type,
        recipe=recipe,
        layers=layers,
        source_size_bytes=reader.size_bytes(),
        size_bytes=round(kept_bits / 8 * (block_weights * cfg.num_layers + outer) - saved),
        activation_bytes=4 * tokens * (cfg.hidden_size + widest),
        block_bytes=4 * block_weights,
        hessian_bytes=HESSIANS_AT_ONCE * 4 * widest**2,
    )


def _elements(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


def _windows(reader: CheckpointReader, recipe: Recipe, trust_remote_code: bool) -> torch.Tensor:
    calibration = recipe.calibration
    dataset = calibration.dataset
    if dataset == "builtin":
        dataset = "builtin:calibration"  # the other part is what `eval` measures on
    check_length(calibration.max_seq_length, reader.config)
    tokenizer = load_tokenizer(reader.directory, trust_remote_code)
    # Four times what the windows need, so that they lie apart and other seeds see other text.
    enough = 4 * calibration.num_calibration_samples * calibration.max_seq_length
    tokens = load_tokens(dataset, tokenizer, reader.config.vocab_size, enough)
    return calibration_windows(
        tokens, calibration.num_calibration_samples, calibration.max_seq_length, calibration.seed
    )


def _write_rest(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    recipe: Recipe,
    model: str,
    ignored: tuple[str, ...],
    dtype: torch.dtype | None,
) -> None:
    """The tensors outside the blocks, config.json and fourbyeight.json."""
    from quant import __version__

    for module in (EMBEDDING, FINAL_NORM, LM_HEAD):
        name = f"{module}.weight"
        if name in reader.config.outer_shapes():
            writer.add(name, reader.read(name, dtype))
    config = dict(reader.raw_config)
    config["quantization_config"] = quantization_config(recipe.weight_format, list(ignored))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    writer.write_json("config.json", config)
    side = {
        "format_version": SIDE_VERSION,
        "generator": f"fourbyeight {__version__}",
        "source": model,
        "scheme": recipe.scheme,
        "group_size": recipe.group_size,
        "numerics": recipe.weight_format.numerics,
        "recipe": recipe.to_dict(),
    }
    writer.write_json(SIDE_FILE, side)
