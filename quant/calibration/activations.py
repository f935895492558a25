"""Where the activations of all calibration windows wait between two steps: memory or disk.

A store keeps tuples of tensors by (name, batch). Reading from the disk runs one batch ahead of the
computation, and writing behind it, on a thread of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.checkpoint.shards import flush_to_disk
from quant.errors import RequestError, WorkFailed

OFFLOADS = ("auto", "none", "cpu", "disk")

ALIGNMENT = 64

Key = tuple[str, int]
Shape = tuple[torch.dtype, tuple[int, ...]]


class ActivationStore(Protocol):
    """get returns what put was given, on the device of the computation."""

    place: str  # "device", "cpu" or "disk"

    def put(self, name: str, batch: int, *tensors: Tensor) -> None: ...

    def get(self, name: str, batch: int) -> tuple[Tensor, ...]: ...

    def forget(self, name: str, batch: int) -> None: ...

    def close(self) -> None: ...


class MemoryStore:
    """Activations on one device: that of the computation, or the host.

    They are copied into buffers that are used again and again: some hundred tensors of a megabyte
    that come and go among a batch's temporaries leave the heap full of holes. What `get` gives is
    a view, valid until the next `put` under its name and batch, or its `forget`.
    """

    def __init__(self, compute: torch.device, host: bool) -> None:
        self.place = "cpu" if host else "device"
        self._compute = compute
        self._kept_on = torch.device("cpu") if host else compute
        self._buffers: dict[Key, Tensor] = {}  # of bytes
        self._shapes: dict[Key, tuple[Shape, ...]] = {}
        self._free: list[Tensor] = []

    def put(self, name: str, batch: int, *tensors: Tensor) -> None:
        key = (name, batch)
        shapes = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        buffer = self._buffers.pop(key, None)
        if buffer is None and self._free:
            buffer = self._free.pop()
        if buffer is None or buffer.numel() < _room(shapes):
            buffer = torch.empty(_room(shapes), dtype=torch.uint8, device=self._kept_on)
        self._buffers[key], self._shapes[key] = buffer, shapes
        for kept, tensor in zip(_views(buffer, shapes), tensors, strict=True):
            kept.copy_(tensor)

    def get(self, name: str, batch: int) -> tuple[Tensor, ...]:
        key = (name, batch)
        views = _views(self._buffers[key], self._shapes[key])
        return tuple(view.to(self._compute) for view in views)

    def forget(self, name: str, batch: int) -> None:
        if self._shapes.pop((name, batch), None) is not None:
            self._free.append(self._buffers.pop((name, batch)))

    def close(self) -> None:
        self._buffers.clear()
        self._shapes.clear()
        self._free.clear()


class DiskStore:
    """Activations in files, one for each (name, batch), that a later process can take up.

    At most `QUEUED` batches wait to be written, so memory holds a few of them, however many there
    are. Raises WorkFailed where the disk is full.
    """

    QUEUED = 2
    place = "disk"

    def __init__(self, directory: Path, compute: torch.device) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._compute = compute
        self._shapes: dict[Key, tuple[Shape, ...]] = {}
        self._writing: dict[Key, Future[None]] = {}
        self._reading: dict[Key, Future[tuple[Tensor, ...]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="activations")

    def put(self, name: str, batch: int, *tensors: Tensor) -> None:
        key = (name, batch)
        while len(self._writing) >= self.QUEUED:
            self._writing.pop(next(iter(self._writing))).result()
        ready = [tensor.detach().cpu().contiguous() for tensor in tensors]
        self._reading.pop(key, None)
        self._shapes[key] = tuple((t.dtype, tuple(t.shape)) for t in ready)
        self._writing[key] = self._thread.submit(self._write, self._path(key), ready)

    def get(self, name: str, batch: int) -> tuple[Tensor, ...]:
        # One thread does both in the order of asking, so a read comes after the write of its file.
        if writing := self._writing.pop((name, batch), None):
            writing.result()
        ahead = self._reading.pop((name, batch), None) or self._read_later((name, batch))
        following = (name, batch + 1)
        if following in self._shapes and following not in self._reading:
            self._reading[following] = self._read_later(following)
        return tuple(tensor.to(self._compute) for tensor in ahead.result())

    def forget(self, name: str, batch: int) -> None:
        key = (name, batch)
        if self._shapes.pop(key, None) is not None:
            self._reading.pop(key, None)
            self._thread.submit(self._path(key).unlink, missing_ok=True)

    def seal(self, names: Sequence[str]) -> Callable[[], None]:
        """A function that returns when everything put under these names is on the disk.

        It may be called on another thread, while this one goes on to put other names.
        """
        keys = [key for key in self._shapes if key[0] in names]
        written = list(self._writing.values())

        def wait() -> None:
            for future in written:
                future.result()
            for key in keys:
                flush_to_disk(self._path(key))
            flush_to_disk(self.directory)

        return wait

    def adopt(self, names: Sequence[str], shapes: Sequence[Shape]) -> None:
        """Take over what an earlier process sealed under these names: one tensor in each batch.

        Removes what else it left. Raises RequestError where a file is missing or has another size.
        """
        for name, (batch, (dtype, shape)) in itertools.product(names, enumerate(shapes)):
            path = self._path((name, batch))
            size = torch.Size(shape).numel() * dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise RequestError(
                    f"{path}, kept for resuming, is not there with its {size} bytes; "
                    f"remove {self.directory.parent} and start again"
                )
            self._shapes[name, batch] = ((dtype, shape),)
        kept = {self._path(key) for key in self._shapes}
        for path in self.directory.iterdir():
            if path not in kept:
                path.unlink()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _path(self, key: Key) -> Path:
        return self.directory / f"{key[0]}-{key[1]:05d}.bin"

    def _read_later(self, key: Key) -> Future[tuple[Tensor, ...]]:
        return self._thread.submit(self._read, self._path(key), self._shapes[key])

    @staticmethod
    def _write(path: Path, tensors: list[Tensor]) -> None:
        try:
            with path.open("wb", buffering=0) as file:
                for tensor in tensors:
                    view = memoryview(_bytes(tensor))
                    while len(view):
                        view = view[file.write(view) :]
        except OSError as error:
            raise WorkFailed(f"{path} could not be written: {error.strerror or error}") from error

    @staticmethod
    def _read(path: Path, shapes: tuple[Shape, ...]) -> tuple[Tensor, ...]:
        tensors = tuple(torch.empty(shape, dtype=dtype) for dtype, shape in shapes)
        with path.open("rb", buffering=0) as file:
            for tensor in tensors:
                view = memoryview(_bytes(tensor))
                while len(view):
                    got = file.readinto(view)
                    if not got:
                        raise WorkFailed(f"{path} is shorter than what was written to it")
                    view = view[got:]
        return tensors


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the host, as a NumPy array of bytes."""
    return tensor.flatten().view(torch.uint8).numpy()


def _room(shapes: tuple[Shape, ...]) -> int:
    """Bytes of a buffer for such tensors, each at a multiple of ALIGNMENT."""
    sizes = (torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes)
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _views(buffer: Tensor, shapes: tuple[Shape, ...]) -> tuple[Tensor, ...]:
    """The tensors of such shapes that lie in a buffer of bytes."""
    views, start = [], 0
    for dtype, shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        views.append(buffer[start : start + size].view(dtype).view(shape))
        start += _room(((dtype, shape),))
    return tuple(views)
