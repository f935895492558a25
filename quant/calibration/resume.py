"""A run's journal, opened and begun or taken up, and the fingerprint of what decides its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quant.calibration.plan import RunPlan
from quant.checkpoint.journal import JOURNAL_VERSION, Fingerprint, Journal
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import COPIED, CheckpointWriter, work_directory
from quant.errors import RequestError, WorkFailed
from quant.recipe import Recipe
from quant.report import OnProgress, Progress

JOURNAL_FILE = "journal.jsonl"
ACTIVATIONS = "activations"


def finished_blocks(output: str | Path) -> int:
    """How many blocks of an unfinished run to OUT `resume` would not do again."""
    path = work_directory(Path(output).expanduser()) / JOURNAL_FILE
    return Journal(path).blocks if path.is_file() else 0


def open_journal(writer: CheckpointWriter, resume: bool) -> Journal:
    """The journal of OUT; an unfinished run is neither continued nor thrown away unasked."""
    path = writer.work / JOURNAL_FILE
    writer.keep(path.is_file())  # also where it turns out to be unreadable
    journal = Journal(path)
    writer.keep(journal.blocks > 0)
    if journal.blocks and not resume:
        raise RequestError(
            f"an unfinished run to OUT {str(writer.output)!r} has {journal.blocks} blocks done; "
            f"continue it with --resume, or remove {writer.work} to start again"
        )
    return journal


def fingerprint_of(
    reader: CheckpointReader,
    recipe: Recipe,
    settings: dict[str, Any],
    windows: torch.Tensor,
    on_progress: OnProgress,
) -> Fingerprint:
    """Of everything that decides about the output's bytes; reads the whole source once.

    Raises RequestError where a weight of the source is NaN or Inf.
    """
    from quant import __version__

    total, done = reader.size_bytes() // 10**6, 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(Progress("check source (MB)", min(done // 10**6, total), total))

    files = reader.inspect_source(count)
    for name in COPIED:
        if (path := reader.directory / name).is_file():
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    on_progress(Progress("check source (MB)", total, total))
    tokens = windows.cpu().contiguous().numpy().tobytes()
    return Fingerprint(
        versions={
            "fourbyeight": __version__,
            "torch": torch.__version__,
            "journal": JOURNAL_VERSION,
        },
        recipe=recipe.to_dict(),
        settings=settings,
        files=files,
        data={
            "dataset": recipe.calibration.dataset,
            "tokens": hashlib.sha256(tokens).hexdigest(),
        },
    )


def bytes_to_reuse(writer: CheckpointWriter, journal: Journal, planned: RunPlan) -> int:
    """What an earlier run has left on the disk, and this one goes on with or removes."""
    folders = [writer.work]
    if journal.blocks:
        on_disk = planned.activation_place == "disk"
        folders = [writer.directory, *([writer.work / ACTIVATIONS] if on_disk else [])]
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def begin(writer: CheckpointWriter, journal: Journal, fingerprint: Fingerprint) -> None:
    """Start the journal, or go back to where it ends. RequestError where it is of another run."""
    if not journal.blocks:
        writer.clear()
        journal.begin(fingerprint, torch.get_num_threads())
        return
    assert journal.fingerprint is not None
    if differences := journal.fingerprint.differences(fingerprint):
        raise RequestError(
            f"the unfinished run to OUT {str(writer.output)!r} is of something else, and cannot be "
            f"resumed with this:\n  "
            + "\n  ".join(differences)
            + f"\nGive what it was begun with, or remove {writer.work} to start again"
        )
    writer.shards.restore(journal.entries)


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """As many threads as the run began with: how a sum is split decides about its last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def advising(output: Path, journal: Journal) -> Iterator[None]:
    """Add to a failure what is not lost."""
    try:
        yield
    except (WorkFailed, OSError) as error:
        if not journal.blocks:
            raise
        raise WorkFailed(
            f"{error}\n{journal.blocks} blocks are done and kept in {work_directory(output)}; "
            "when the cause is gone, run the same command with --resume"
        ) from error
