"""Zero-shot accuracy on multiple-choice tasks, run by lm-eval (`pip install 'fourbyeight[tasks]'`).

A task is a name of lm-eval's own (its data come from the hub), or a local file NAME.jsonl, one item
a line, in one of two forms; a directory stands for every .jsonl file in it:

    {"query": "Question: ...\\nAnswer:", "choices": ["one", "two"], "gold": 1}
    {"ctxs": ["... so Sarah", "... so Maria"], "cont": " always got the easier cases.", "gold": 0}

In the first, every choice is scored as the continuation of the query and a space. In the second
(partial scoring, as WinoGrande is scored), the one continuation is scored after every context. The
answer is the index with the largest log-likelihood, the first of equals; `accuracy` is the share of
items where it is `gold`. `accuracy_norm` divides by the choice's length in characters first.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.reader import load_tokenizer
from quant.checkpoint.source import resolve_model
from quant.device import select_device, select_dtype
from quant.errors import RequestError
from quant.memory import peak_memory_bytes, reset_peak_memory
from quant.report import OnProgress, Progress, ignore_progress
from quant.runtime.model import load_model

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class TaskResult:
    """A task's accuracy over `items` items.

    standard_error: of the accuracy over items; None for a single one. accuracy_norm: None where the
    task does not define it.
    """

    name: str
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None
    items: int
    seconds: float


@dataclass(frozen=True)
class TaskResults:
    """mean_accuracy: over tasks, each counting once. limit: items a task at most; None: all."""

    tasks: tuple[TaskResult, ...]
    mean_accuracy: float
    limit: int | None
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class LocalTask:
    """A checked file: its rows hold `choices` or `ctxs` and `cont`, and `gold`."""

    name: str
    partial: bool
    rows: tuple[dict[str, Any], ...]

    def config(self) -> dict[str, Any]:
        """The task as lm-eval takes it. Values that name a column are read from it as they are."""
        from datasets import Dataset

        data = Dataset.from_list(list(self.rows))
        # An index instead of a text tells lm-eval that the choices are contexts.
        text, choices, target = (
            ("gold", "ctxs", "cont") if self.partial else ("query", "choices", "gold")
        )
        metrics = ("acc",) if self.partial else ("acc", "acc_norm")
        return {
            "task": self.name,
            "custom_dataset": lambda **_: {"test": data},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": choices,
            "doc_to_target": target,
            "target_delimiter": "" if self.partial else " ",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in metrics
            ],
        }


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> TaskResults:
    """Accuracy of MODEL (anything that `LLM` loads) on tasks: names, .jsonl files, directories.

    limit: only the first so many items of every task. Raises RequestError where a task is not
    there, is not multiple choice, or an item of a file is malformed, before the model is loaded.
    """
    started = time.perf_counter()
    reset_peak_memory()
    kept_dtype, target = select_dtype(dtype), select_device(device)
    chosen = check_tasks(tasks, limit)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    from quant.evaluation.harness import DecoderLM, quiet

    with quiet():
        loaded = _load(chosen)
    decoder = load_model(
        directory, device=target, dtype=kept_dtype, trust_remote_code=trust_remote_code
    )
    lm = DecoderLM(decoder, load_tokenizer(directory, trust_remote_code))
    rows = tuple(_run(lm, name, task, limit, on_progress) for name, task in loaded.items())
    return TaskResults(
        tasks=rows,
        mean_accuracy=sum(row.accuracy for row in rows) / len(rows),
        limit=limit,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def check_tasks(tasks: Sequence[str], limit: int | None = None) -> list[str | LocalTask]:
    """Names as they are, files and directories as checked `LocalTask`s.

    RequestError where there is none, a file is missing or malformed, a name occurs twice, or
    lm-eval is not installed.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"the limit is {limit} items; it must be at least 1")
    found = [read_task(task) if isinstance(task, Path) else task for task in task_files(tasks)]
    names = [task if isinstance(task, str) else task.name for task in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"task {name!r} is given twice; rename or leave out one of them")
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError("tasks need the package lm-eval: pip install 'fourbyeight[tasks]'")
    return found


def task_files(tasks: Sequence[str]) -> list[str | Path]:
    """Every task as a name or the path of its file; a directory is the .jsonl files in it."""
    if not tasks:
        raise RequestError("no task: name one of lm-eval's, or give a .jsonl file or a directory")
    found: list[str | Path] = []
    for task in tasks:
        path = Path(task).expanduser()
        if path.is_dir():
            files = sorted(path.glob(f"*{SUFFIX}"))
            if not files:
                raise RequestError(f"task {task!r}: the directory has no {SUFFIX} file")
            found += files
        elif path.is_file():
            if path.suffix != SUFFIX:
                raise RequestError(
                    f"task {task!r}: files of type {path.suffix!r} are not read; a task is a "
                    f"{SUFFIX} file, a directory of them, or a name of lm-eval's"
                )
            found.append(path)
        elif path.suffix == SUFFIX or "/" in task:
            raise RequestError(f"task {task!r}: there is no such file or directory")
        else:
            found.append(task)
    return found


def read_task(path: Path) -> LocalTask:
    """The items of a file, checked. RequestError names the file, the line and the key."""
    rows: list[dict[str, Any]] = []
    partial = False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"task {path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"task {path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise RequestError(f"{where}: an item is an object, got {type(row).__name__}")
        if not rows:
            partial = "ctxs" in row
        rows.append(_check_row(row, partial, where))
    if not rows:
        raise RequestError(f"task {path} is empty")
    return LocalTask(path.stem, partial, tuple(rows))


def _check_row(row: dict[str, Any], partial: bool, where: str) -> dict[str, Any]:
    text, several = ("cont", "ctxs") if partial else ("query", "choices")
    for key in (text, several, "gold"):
        if key not in row:
            form = "`ctxs`, `cont`" if partial else "`query`, `choices`"
            raise RequestError(f"{where}: {key!r} is missing; an item has {form} and `gold`")
    choices, gold = row[several], row["gold"]
    if not isinstance(row[text], str) or (partial and not row[text]):
        raise RequestError(f"{where}: {text!r} must be a text, got {row[text]!r:.60}")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2:
        raise RequestError(
            f"{where}: {several!r} must be at least two non-empty texts, got {choices!r:.60}"
        )
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise RequestError(
            f"{where}: 'gold' is the index of the right one of {len(choices)} {several}, "
            f"0..{len(choices) - 1}; got {gold!r:.60}"
        )
    return {text: row[text], several: choices, "gold": gold}


def _load(chosen: Sequence[str | LocalTask]) -> dict[str, Any]:
    """lm-eval's task objects by name; a group of its own gives all of its tasks."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in chosen))
    loaded: dict[str, Any] = {}
    for task in chosen:
        if isinstance(task, LocalTask):
            found = manager.load([task.config()])["tasks"]
        else:
            found = _load_named(manager, task)
        for name, item in found.items():
            if name in loaded:
                raise RequestError(f"task {name!r} is asked for twice: {task!r} holds it too")
            _check_task(name, item)
            loaded[name] = item
    return loaded


def _load_named(manager: Any, name: str) -> dict[str, Any]:
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"task {name!r} is no file, no directory and no task of lm-eval{hint}")
    try:
        return dict(manager.load([name])["tasks"])
    except Exception as error:  # data sets and their network clients raise errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"task {name!r} could not be loaded: {reason}") from error


def _check_task(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood") or (
        "acc" not in task.aggregation()
    ):
        raise RequestError(
            f"task {name!r} is of the type {task.OUTPUT_TYPE} and reports "
            f"{', '.join(task.aggregation())}; supported are tasks that choose between texts and "
            "report acc"
        )


def _run(lm: Any, name: str, task: Any, limit: int | None, on_progress: OnProgress) -> TaskResult:
    from quant.evaluation.harness import run_task

    started = time.perf_counter()
    lm.on_batch = lambda done, total: on_progress(Progress(name, done, total))
    metrics, items = run_task(lm, name, task, limit)
    error, norm = metrics.get("acc_stderr"), metrics.get("acc_norm")
    known = isinstance(error, int | float) and math.isfinite(error)
    return TaskResult(
        name=name,
        accuracy=float(metrics["acc"]),
        standard_error=float(error) if known and error is not None else None,
        accuracy_norm=None if norm is None else float(norm),
        items=items,
        seconds=time.perf_counter() - started,
    )
