"""Run an ablation: every row and seed quantized and measured, each step in a process of its own.

A step is a command of `quantize` with --json, so that its peak memory is its own, and what it wrote
is its result. Under DIR:

    work/ROW-seedS-HASH/{recipe.yaml, run.json, perplexity-HASH.json, tasks-HASH.json, log.txt}

The first hash is of what decides about the checkpoint (model, recipe, calibration text, versions),
the others of what is measured. A step whose file is there is not run again; other inputs have other
names, so two ablations in one DIR do not mix. An interrupted quantization goes on after its last
finished block. A checkpoint is removed when its row is measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from quant.checkpoint.source import resolve_model
from quant.device import select_device, select_dtype
from quant.errors import RequestError, WorkFailed
from quant.evaluation.ablation_spec import UNQUANTIZED, Ablation, Corpus, Row
from quant.evaluation.tasks import check_tasks, task_files
from quant.report import OnProgress, Progress, ignore_progress

CHECKPOINT = "checkpoint"
RUN_FILE = "run.json"
LOG_FILE = "log.txt"
HASH_LENGTH = 12
INTERRUPTED = 130  # exit code
LOG_LINES = 8  # of a failed step, in its error


@dataclass(frozen=True)
class Measurement:
    """One quantized model, or the unquantized one (seed None, and no costs).

    perplexities: by corpus label. accuracies: by task. seconds and peak_memory_bytes: of
    quantizing; bits_per_weight: in the quantized linears.
    """

    seed: int | None
    perplexities: dict[str, float]
    accuracies: dict[str, float]
    mean_accuracy: float | None
    seconds: float | None
    peak_memory_bytes: int | None
    bits_per_weight: float


@dataclass(frozen=True)
class RowResult:
    """measurements: one a seed. recipe: None for the unquantized model, which is the first row."""

    name: str
    recipe: dict[str, Any] | None
    measurements: tuple[Measurement, ...]


@dataclass(frozen=True)
class AblationResult:
    model: str
    corpora: tuple[Corpus, ...]
    tasks: tuple[str, ...]
    limit: int | None
    rows: tuple[RowResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_ablation(
    model: str,
    spec: Ablation,
    output: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    on_progress: OnProgress = ignore_progress,
) -> AblationResult:
    """Measure MODEL (as of `quantize`) as it is, then every row of spec; results are kept in DIR.

    Raises RequestError where a step was refused and WorkFailed where it failed, with the row and
    what the step said; what was finished before stays in DIR.
    """
    select_dtype(dtype)
    select_device(device)
    if spec.tasks:
        check_tasks(spec.tasks, spec.limit)
    directory = resolve_model(model)
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"DIR {str(folder)!r} is a file; give a directory to make or go on in")
    runner = _Runner(spec, directory, folder / "work", ["--dtype", dtype, "--device", device])
    cells = [(None, None), *((row, seed) for row in spec.rows for seed in row.seeds)]
    total = len(cells) * runner.steps_per_cell
    found: dict[str, list[Measurement]] = {}
    for i, (row, seed) in enumerate(cells):
        name = UNQUANTIZED if row is None else row.name
        title = name if seed is None else f"{name}, seed {seed}"

        def announce(done: int, what: str, i: int = i, title: str = title) -> None:
            step = i * runner.steps_per_cell + done
            on_progress(Progress("ablation", step, total, f"{title}: {what}"))

        cell = _Cell(runner, title, row, seed)
        found.setdefault(name, []).append(cell.measure(announce))
    on_progress(Progress("ablation", total, total))
    recipes = {row.name: row.recipe.to_dict() for row in spec.rows}
    return AblationResult(
        model=model,
        corpora=spec.corpora,
        tasks=spec.tasks,
        limit=spec.limit,
        rows=tuple(RowResult(name, recipes.get(name), tuple(rows)) for name, rows in found.items()),
    )


class _Runner:
    """What all cells share: the spec, the model, where results lie, and common options."""

    def __init__(self, spec: Ablation, model: Path, work: Path, options: list[str]) -> None:
        self.spec, self.model, self.work, self.options = spec, model, work, options
        self.versions = _versions()
        self.source = _files_state(model)
        self.steps_per_cell = 1 + len(spec.corpora) + bool(spec.tasks)

    def identity(self, recipe: dict[str, Any] | None) -> str:
        """A hash of what decides about a checkpoint."""
        text = None if recipe is None else _data_state(recipe["calibration"]["dataset"])
        return _hash([self.versions, self.source, self.options, recipe, text])


class _Cell:
    """One row under one seed: its folder, its checkpoint, and the steps that measure it."""

    def __init__(self, runner: _Runner, title: str, row: Row | None, seed: int | None) -> None:
        self.runner, self.title, self.seed = runner, title, seed
        self.recipe = None if row is None else row.recipe.override(seed=seed)
        plain = None if self.recipe is None else self.recipe.to_dict()
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower().replace(", seed ", "-seed")).strip("-")
        self.folder = runner.work / f"{slug}-{runner.identity(plain)}"

    def measure(self, announce: Any) -> Measurement:
        """The figures of all steps; those that are missing are run."""
        spec = self.runner.spec
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [files for files, _ in self._evaluations() if not files.is_file()]
        checkpoint = self.runner.model
        costs: dict[str, Any] = {}
        if self.recipe is not None:
            checkpoint = self.folder / CHECKPOINT
            announce(0, "quantize")
            costs = self._quantized(checkpoint, needed=bool(missing))
        perplexities, accuracies, mean = {}, {}, None
        for i, (file, arguments) in enumerate(self._evaluations(), 1):
            announce(i, arguments[1])
            figures = self._step(["eval", str(checkpoint), *arguments], file)
            if i <= len(spec.corpora):
                perplexities[spec.corpora[i - 1].label] = float(figures["perplexity"])
            else:
                accuracies = {row["name"]: float(row["accuracy"]) for row in figures["tasks"]}
                mean = float(figures["mean_accuracy"])
        if self.recipe is not None:
            shutil.rmtree(checkpoint, ignore_errors=True)
        return Measurement(
            seed=self.seed,
            perplexities=perplexities,
            accuracies=accuracies,
            mean_accuracy=mean,
            seconds=costs.get("seconds"),
            peak_memory_bytes=costs.get("peak_memory_bytes"),
            bits_per_weight=costs.get("bits_per_weight", 16.0),
        )

    def _quantized(self, checkpoint: Path, needed: bool) -> dict[str, Any]:
        """The figures of quantizing; needed: the checkpoint must be there too."""
        assert self.recipe is not None
        file, recipe = self.folder / RUN_FILE, self.folder / "recipe.yaml"
        if needed and not (file.is_file() and checkpoint.is_dir()):
            file.unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
        recipe.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")
        arguments = ["run", str(self.runner.model), "-o", str(checkpoint)]
        return self._step([*arguments, "--recipe", str(recipe), "--resume"], file)

    def _evaluations(self) -> Iterator[tuple[Path, list[str]]]:
        """Every evaluation's file of figures and options, the dataset or the tasks second."""
        spec = self.runner.spec
        for corpus in spec.corpora:
            arguments = ["--dataset", corpus.dataset]
            arguments += ["--max-seq-length", str(corpus.max_seq_length)]
            if corpus.max_windows:
                arguments += ["--max-windows", str(corpus.max_windows)]
            key = _hash([arguments, _data_state(corpus.dataset)])
            yield self.folder / f"perplexity-{key}.json", arguments
        if spec.tasks:
            arguments = [part for task in spec.tasks for part in ("--tasks", task)]
            arguments += ["--limit", str(spec.limit)] if spec.limit else []
            states = [_data_state(str(task)) for task in task_files(spec.tasks)]
            yield self.folder / f"tasks-{_hash([arguments, states])}.json", arguments

    def _step(self, arguments: list[str], file: Path) -> dict[str, Any]:
        """The figures in file, after `quantize ARGUMENTS --json file` where it is not there."""
        if not file.is_file():
            command = [sys.executable, "-P", "-m", "quant", *arguments, *self.runner.options]
            with (self.folder / LOG_FILE).open("w+", encoding="utf-8") as log:
                code = _wait([*command, "--json", str(file)], log)
                log.seek(0)
                said = log.read()
            if code == INTERRUPTED:  # it alone was told to stop: so is the whole
                raise KeyboardInterrupt
            if code:
                _fail(f"row {self.title!r}, `quantize {arguments[0]}`", code, said)
        figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return figures


def _wait(command: list[str], log: Any) -> int:
    """Run to the end; where this process is told to stop, the other one is, and leaves its journal.

    It imports what this one imports, wherever it is started.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _fail(where: str, code: int, said: str) -> None:
    """The error of a step as ours, by its exit code."""
    _, found, reason = said.rpartition("error: ")
    text = reason if found else "\n".join(said.strip().splitlines()[-LOG_LINES:])
    text = " ".join(text.split()) or f"it ended with exit code {code}"
    raise (RequestError if code == 2 else WorkFailed)(f"{where}: {text}")


def _versions() -> dict[str, str]:
    """Of what computes, and of the interpreter, whose documentation is the built-in text."""
    from quant import __version__

    python = platform.python_version()
    return {"fourbyeight": __version__, "torch": torch.__version__, "python": python}


def _files_state(directory: Path) -> list[list[Any]]:
    """What tells that a model has changed without reading gigabytes: sizes and times of weights,
    contents of the rest."""
    return [
        [path.name, *_stamp(path)] if path.suffix == ".safetensors" else [path.name, _sha256(path)]
        for path in sorted(directory.iterdir())
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt")
    ]


def _data_state(name: str) -> list[str]:
    """A dataset or task by its name, and by its content where it is a local file."""
    path = Path(name).expanduser()
    return [name, _sha256(path)] if path.is_file() else [name]


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]
