"""Writing a checkpoint directory so that it is there whole or not there at all.

Everything goes into a hidden directory beside the target; `finish` makes it durable and renames it.
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
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quant.errors import RequestError, WorkFailed

MAX_SHARD_BYTES = 5 * 10**9
# Held while a run writes; the system lets go of it when the process ends, however it ends.
LOCK = ".lock"
# Taken over from the source as they are; weights, indexes and config.json are written anew.
COPIED = (
    "tokenizer.json", "tekken.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE",
)  # fmt: skip


def check_output(output: Path) -> None:
    """RequestError where OUT exists or cannot be made; touches nothing."""
    if os.path.lexists(output):
        raise RequestError(f"OUT {str(output)!r} exists; give a new directory or remove it first")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RequestError(f"OUT {str(output)!r} cannot be made: {parent} is not writable")


class CheckpointWriter:
    """Collects tensors into shards of bounded size; a context manager.

    Leaving the context without `finish` removes everything that was written. Entering it raises
    RequestError while another process writes the same OUT.
    """

    def __init__(self, output: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        check_output(output)
        self.output = output
        self.directory = output.absolute().parent / f".{output.name}.partial"
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.tensor_bytes = 0
        self._finished = False

    def __enter__(self) -> CheckpointWriter:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RequestError(
                f"OUT {str(self.output)!r}: another run is writing it (into {self.directory})"
            ) from None
        for path in self.directory.iterdir():  # left by a run that was killed
            if path.name != LOCK:
                path.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor; a full shard goes to disk. WorkFailed where it is not finite."""
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WorkFailed(f"{name} would be written with NaN or Inf ({tensor.dtype})")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self.tensor_bytes += size

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
        """Write what is queued and the index, flush to disk, and give OUT its name."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.directory / _temporary(i), self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self.write_json("model.safetensors.index.json", index)
        (self.directory / LOCK).unlink()
        make_readable(self.directory)
        for path in self.directory.iterdir():
            _fsync(path)
        _fsync(self.directory)
        os.rename(self.directory, self.output)
        self._finished = True
        _fsync(self.output.absolute().parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.directory / _temporary(len(self._shards))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, among others
            raise WorkFailed(f"OUT {str(self.output)!r} could not be written: {error}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def make_readable(directory: Path) -> None:
    """Give a directory and its files the permissions that the user's umask leaves.

    safetensors and tempfile make theirs for the owner alone; weights are to be served by others.
    """
    umask = os.umask(0)
    os.umask(umask)
    directory.chmod(0o777 & ~umask)
    for path in directory.iterdir():
        path.chmod(0o666 & ~umask)


def _temporary(shard: int) -> str:
    return f"shard-{shard + 1:05d}.tmp"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
