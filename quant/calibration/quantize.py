"""`quantize`: from a checkpoint and a recipe to a 4-bit checkpoint directory."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.architectures import SITES, check_length
from quant.calibration.activations import MemoryStore
from quant.calibration.choice import BLOCKS, WINDOWS, choose_rotation
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.pipeline import BlockPipeline
from quant.calibration.plan import RunPlan, make_plan, open_store
from quant.calibration.resume import (
    ACTIVATIONS,
    advising,
    begin,
    bytes_to_reuse,
    fingerprint_of,
    open_journal,
    with_threads,
)
from quant.calibration.site import MAX_ERROR, SiteFailed
from quant.calibration.streaming import (
    Run,
    check_on_failure,
    keys_of,
    quantize_blocks,
    write_outer,
)
from quant.checkpoint.compressed_tensors import (
    REPORT_FILE,
    SIDE_FILE,
    SIDE_VERSION,
    quantization_config,
)
from quant.checkpoint.journal import Journal
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.checkpoint.shards import header_bytes, parse_size
from quant.checkpoint.side import Side, side_keys, write_side_tensors
from quant.checkpoint.source import resolve_model
from quant.checkpoint.writer import (
    MAX_SHARD_SIZE,
    CheckpointWriter,
    check_output,
    check_space,
    remove_remains,
)
from quant.device import select_device, select_dtype
from quant.errors import RequestError, WorkFailed
from quant.memory import (
    peak_device_bytes,
    peak_memory_bytes,
    release_free_memory,
    reset_peak_memory,
    resident_bytes,
    return_large_arrays,
)
from quant.recipe import DEFAULT_PRESET, Recipe, load_recipe
from quant.report import (
    OnProgress,
    Progress,
    RunReport,
    ignore_progress,
    mean_bits_per_weight,
    to_jsonl,
)

# Windows that go through the block whose time is measured.
MEASURED_WINDOWS = 8


@dataclass(frozen=True)
class Options:
    """What a run needs to know beside model, output and recipe, checked; see `quantize`."""

    dtype: torch.dtype | None
    device: torch.device
    max_shard_bytes: int
    activation_offload: str
    on_failure: str
    max_error: float

    @property
    def settings(self) -> dict[str, Any]:
        """Those that decide about the output's bytes."""
        return {
            "dtype": str(self.dtype or "auto").removeprefix("torch."),
            "device": self.device.type,
            "max shard size": self.max_shard_bytes,
        }

    @property
    def rewindable(self) -> bool:
        return self.on_failure != "stop"


def plan(
    model: str,
    output_dir: str | Path,
    recipe: Recipe | str = DEFAULT_PRESET,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    activation_offload: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    on_failure: str = "stop",
    max_error: float = MAX_ERROR,
    measure: bool = False,
    on_progress: OnProgress = ignore_progress,
    **overrides: Any,
) -> RunPlan:
    """Check a request, its data too, and say what it would do; arguments as `quantize`.

    measure: also how long it would take, from the first block with a few of the windows. Makes
    nothing at OUT. A hub id is fetched and a GGUF file converted, into their caches.
    """
    recipe = _recipe(recipe, overrides)
    options = _options(dtype, device, max_shard_size, activation_offload, on_failure, max_error)
    output = Path(output_dir).expanduser()
    check_output(output)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    found = _plan(reader, recipe, options)
    windows = _windows(reader, recipe, trust_remote_code)
    check_space(output, found.disk_bytes)
    if measure:
        seconds = _estimate_seconds(reader, found, windows, options, on_progress)
        return dataclasses.replace(found, seconds=seconds)
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
    activation_offload: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    resume: bool = False,
    on_failure: str = "stop",
    max_error: float = MAX_ERROR,
    on_progress: OnProgress = ignore_progress,
    **overrides: Any,
) -> RunReport:
    """Quantize MODEL into OUT, a compressed-tensors checkpoint directory.

    model: an HF directory, a .gguf file, or a hub id. recipe: a Recipe, a preset's name, or a YAML
    file. overrides: fields of Recipe and Calibration (scheme, group_size, numerics, ignore,
    dataset, num_calibration_samples, max_seq_length, seed) that replace the recipe's. dtype: of the
    tensors that stay unquantized ("auto": as stored). device: "auto" is a GPU where there is one.

    One block's weights are in memory at a time. activation_offload: where activations wait between
    two steps: "none" (on the device), "cpu", "disk" (beside OUT), or "auto", the first with room.
    max_shard_size: of OUT's files, in bytes or as "5GB".

    Finished blocks survive whatever ends the process, in a hidden directory beside OUT; with resume
    the run goes on after them and writes the same bytes as one that was never interrupted. It is
    refused where model, recipe, data, versions or settings have changed. on_failure and max_error
    may change: what to do where a site cannot be quantized ("stop", or "skip-to-bf16", which leaves
    it as it is), and the share of its output's energy that a layer may lose.

    Raises RequestError, before anything is written, where the request cannot be met, and
    WorkFailed where the numbers break down or the disk is full. Nothing is at OUT before all of it
    is.
    """
    started = time.perf_counter()
    at_start = resident_bytes()
    output = Path(output_dir).expanduser()
    recipe = _recipe(recipe, overrides)
    options = _options(dtype, device, max_shard_size, activation_offload, on_failure, max_error)
    remove_remains(output)
    check_output(output)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    return_large_arrays()
    reset_peak_memory()  # a GGUF file's conversion, once, is not the run's
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    planned = _plan(reader, recipe, options)
    writer = CheckpointWriter(
        output,
        max_shard_bytes=options.max_shard_bytes,
        header_bytes=header_bytes(planned.tensors),
    )
    with writer, torch.inference_mode():
        journal = open_journal(writer, resume)
        check_space(output, planned.disk_bytes - bytes_to_reuse(writer, journal, planned))
        on_progress(Progress("calibration data", 0, 1, recipe.calibration.dataset))
        windows = _windows(reader, recipe, trust_remote_code)
        release_free_memory()  # the text and its encoding
        on_progress(Progress("calibration data", 1, 1, recipe.calibration.dataset))
        fingerprint = fingerprint_of(reader, recipe, options.settings, windows, on_progress)
        choice = ""
        if recipe.undecided:
            recipe, choice = _decide(
                recipe, reader, planned, windows, options, journal, writer.work, on_progress
            )
            planned = _plan(reader, recipe, options)
            fingerprint = dataclasses.replace(fingerprint, recipe=recipe.to_dict())
        begin(writer, journal, fingerprint)
        store = open_store(planned, options.device, writer.work / ACTIVATIONS)
        pipeline = BlockPipeline(
            reader,
            {row.name: row for row in planned.layers},
            recipe,
            windows,
            store,
            options.device,
            dtype=options.dtype,
            max_error=options.max_error,
            rewindable=options.rewindable or planned.activation_place == "disk",
            on_progress=on_progress,
        )
        run = Run(
            planned, reader, pipeline, writer, journal, options.dtype, on_failure, on_progress
        )
        resumed = journal.blocks
        with with_threads(journal.num_threads), advising(output, journal):
            try:
                rows, skipped = quantize_blocks(run)
            finally:
                store.close()
        if not rows:
            writer.keep(False)
            raise WorkFailed(f"no layer could be quantized; the first: {skipped[0].reason}")
        with advising(output, journal):
            on_progress(Progress("write", 0, 1, str(output)))
            ignored = tuple(row.name for row in pipeline.plan.values() if row.fmt is None)
            write_outer(run)
            keys = [keys_of(journal, layer) for layer in range(reader.config.num_layers)]
            side = Side(recipe.kv_format, tuple(k for k in keys if k is not None))
            _write_texts(reader, writer, recipe, model, ignored, options.dtype, side)
            write_side_tensors(writer.directory, side)
            writer.write_text(REPORT_FILE, to_jsonl(rows))
            writer.copy_companions(directory)
            writer.finish()
        on_progress(Progress("write", 1, 1, str(output)))
    return RunReport(
        output=str(output),
        recipe=recipe.to_dict(),
        layers=tuple(rows),
        ignored=ignored,
        skipped=tuple(skipped),
        rotation=choice,
        resumed_blocks=resumed,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=peak_device_bytes(options.device),
        start_memory_bytes=at_start,
        block_bytes=planned.block_bytes,
        activation_bytes=planned.activation_bytes,
        activation_place=planned.activation_place,
        size_bytes=directory_bytes(output),
        source_size_bytes=reader.size_bytes(),
        bits_per_weight=mean_bits_per_weight(rows),
    )


def _decide(
    recipe: Recipe,
    reader: CheckpointReader,
    planned: RunPlan,
    windows: torch.Tensor,
    options: Options,
    journal: Journal,
    work: Path,
    on_progress: OnProgress,
) -> tuple[Recipe, str]:
    """An undecided recipe, decided; and what decided it. A run that goes on has done so before."""
    if journal.fingerprint is not None and journal.blocks:
        begun = journal.fingerprint.recipe
        rotated = recipe.decided(True)
        if begun == rotated.to_dict():
            return rotated, "rotated, as the run was begun"
        return recipe.decided(False), "not rotated, as the run was begun"
    choice = choose_rotation(
        reader, planned, windows, options.device, options.dtype, work, on_progress
    )
    release_free_memory()
    return recipe.decided(choice.rotates), str(choice)


def _estimate_seconds(
    reader: CheckpointReader,
    planned: RunPlan,
    windows: torch.Tensor,
    options: Options,
    on_progress: OnProgress,
) -> float | None:
    """How long a run should take, without the reading of the source that comes before it.

    Part of a block's time grows with the tokens, part does not; they are measured apart. None where
    a site of the first block is to be skipped, so that its time says nothing of the others.
    """
    few = windows[:MEASURED_WINDOWS]
    undecided = planned.recipe.undecided
    with torch.inference_mode():
        pipeline = BlockPipeline(
            reader,
            {row.name: row for row in planned.layers},
            planned.recipe.decided(False) if undecided else planned.recipe,
            few,
            MemoryStore(options.device, host=False),
            options.device,
            dtype=options.dtype,
            max_error=math.inf,
            on_progress=lambda p: on_progress(Progress("measure a block", p.done, len(SITES))),
        )
        pipeline.embed()
        try:
            pipeline.quantize(0)
        except SiteFailed as failure:
            if options.on_failure == "stop":
                raise WorkFailed(f"{failure}; the run would stop there") from failure
            return None
    on_progress(Progress("measure a block", len(SITES), len(SITES)))
    spent = pipeline.seconds
    each_token = spent.tokens / len(few)
    seconds = (spent.weights + each_token * len(windows)) * reader.config.num_layers
    if undecided:
        chosen = spent.weights + each_token * min(len(windows), WINDOWS)
        seconds += 2 * min(BLOCKS, reader.config.num_layers) * chosen
    return seconds


def directory_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _recipe(recipe: Recipe | str, overrides: dict[str, Any]) -> Recipe:
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    return recipe.override(**overrides)


def _options(
    dtype: str,
    device: str,
    max_shard_size: int | str,
    activation_offload: str,
    on_failure: str,
    max_error: float,
) -> Options:
    check_on_failure(on_failure)
    if not max_error > 0:
        raise RequestError(f"max error is {max_error}; it must be positive")
    return Options(
        select_dtype(dtype),
        select_device(device),
        parse_size(max_shard_size),
        activation_offload,
        on_failure,
        max_error,
    )


def _plan(reader: CheckpointReader, recipe: Recipe, options: Options) -> RunPlan:
    return make_plan(
        reader,
        recipe,
        dtype=options.dtype,
        device=options.device,
        activation_offload=options.activation_offload,
        rewindable=options.rewindable,
    )


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


def _write_texts(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    recipe: Recipe,
    model: str,
    ignored: tuple[str, ...],
    dtype: torch.dtype | None,
    kept: Side,
) -> None:
    """config.json and fourbyeight.json."""
    from quant import __version__

    config = dict(reader.raw_config)
    config["quantization_config"] = quantization_config(recipe.weight_format, list(ignored))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if recipe.rotate is not None and recipe.rotate.residual:
        config["tie_word_embeddings"] = False
    writer.write_json("config.json", config)
    side = {
        "format_version": SIDE_VERSION,
        "generator": f"fourbyeight {__version__}",
        "source": model,
        "scheme": recipe.scheme,
        "group_size": recipe.group_size,
        "numerics": recipe.weight_format.numerics,
        **side_keys(kept),
        "recipe": recipe.to_dict(),
    }
    writer.write_json(SIDE_FILE, side)
