"""Writing a checkpoint directory so that it is there whole or not there at all.

Everything goes into a hidden directory beside OUT, which a killed run leaves for `--resume`:

    .OUT.partial/.lock           held by the process that writes
    .OUT.partial/journal.jsonl   what is finished (`journal.py`)
    .OUT.partial/activations/    where they are kept on disk
    .OUT.partial/checkpoint/     becomes OUT by one rename, when it is complete and durable
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quant.checkpoint.shards import ShardWriter, flush_to_disk
from quant.errors import RequestError, WorkFailed

MAX_SHARD_SIZE = "5GB"
# Taken over from the source as they are; weights, indexes and config.json are written anew.
COPIED = (
    "tokenizer.json", "tekken.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE",
)  # fmt: skip


def work_directory(output: Path) -> Path:
    """Where a run collects what will be OUT."""
    return output.absolute().parent / f".{output.name}.partial"


def check_output(output: Path) -> None:
    """RequestError where OUT exists or cannot be made; touches nothing."""
    if os.path.lexists(output):
        raise RequestError(f"OUT {str(output)!r} exists; give a new directory or remove it first")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"OUT {str(output)!r} cannot be made: {parent} is not writable")


def remove_remains(output: Path) -> None:
    """Remove what a run that was killed between its last two steps left beside a finished OUT."""
    work = work_directory(output)
    if output.is_dir() and work.is_dir() and not (work / "checkpoint").exists():
        shutil.rmtree(work, ignore_errors=True)


def check_space(output: Path, needed: int) -> None:
    """RequestError where the disk of OUT has not `needed` bytes left."""
    folder = work_directory(output)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RequestError(
            f"OUT {str(output)!r} needs {needed / 1e9:.3f} GB, but {folder} has {free / 1e9:.3f} "
            "GB left; free some, or give a directory on another disk"
        )


class CheckpointWriter:
    """A context manager that owns the work directory of OUT while a run writes it.

    Leaving the context without `finish` removes the work directory, unless `keep` was called. What
    an earlier run left there is kept until `clear`. Entering raises RequestError while another
    process writes the same OUT.
    """

    def __init__(
        self, output: Path, *, max_shard_bytes: int = 5 * 10**9, header_bytes: int = 1 << 16
    ) -> None:
        check_output(output)
        self.output = output
        self.work = work_directory(output)
        self.directory = self.work / "checkpoint"
        self.shards = ShardWriter(self.directory, max_shard_bytes, header_bytes)
        self._keep = self._finished = False

    def __enter__(self) -> CheckpointWriter:
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = (self.work / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have finished meanwhile, and taken the directory with it.
            if not os.path.samestat(os.fstat(self._lock.fileno()), (self.work / ".lock").stat()):
                raise BlockingIOError
        except OSError:
            self._lock.close()
            raise RequestError(
                f"OUT {str(self.output)!r}: another run is writing it (into {self.work})"
            ) from None
        try:
            check_output(self.output)  # a run may have finished it since
        except RequestError:
            self._lock.close()
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        self.directory.mkdir(exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shards.close()
        if not self._finished and not self._keep:
            shutil.rmtree(self.work, ignore_errors=True)
        self._lock.close()

    def keep(self, wanted: bool = True) -> None:
        """Whether what is in the work directory is worth resuming."""
        self._keep = wanted

    def clear(self) -> None:
        """Remove what an earlier run left; only the lock stays."""
        for path in self.work.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.directory.mkdir()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. WorkFailed where it is not finite."""
        self.shards.add(name, finite(name, tensor))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text, encoding="utf-8")

    def copy_companions(self, source: Path) -> None:
        """Tokenizer, chat template and generation config of the source directory."""
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, self.directory / name)

    def finish(self) -> None:
        """Write headers and the index, flush to disk, and give OUT its name."""
        size = sum(entry.stop - entry.start for entry in self.shards.entries)
        weight_map = self.shards.finish()
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_json("model.safetensors.index.json", index)
        make_readable(self.directory)
        for path in self.directory.iterdir():
            flush_to_disk(path)
        flush_to_disk(self.directory)
        os.rename(self.directory, self.output)
        self._finished = True
        flush_to_disk(self.output.absolute().parent)
        shutil.rmtree(self.work, ignore_errors=True)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor on the host; WorkFailed where it holds NaN or Inf, which a file must not."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WorkFailed(f"{name} would be written with NaN or Inf ({tensor.dtype})")
    return tensor.detach().cpu().contiguous()


def make_readable(directory: Path) -> None:
    """Give a directory and its files the permissions that the user's umask leaves.

    safetensors and tempfile make theirs for the owner alone; weights are to be served by others.
    """
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~umask)
