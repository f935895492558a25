"""Output shards: safetensors files that grow tensor by tensor and can be taken up again.

A safetensors file begins with a header that describes all of its tensors, and they are not known
before the last one is there. So room for the longest possible header is left at the front and
filled in at the end, padded with spaces as the format allows:

    u64 header length | header, padded | tensor | tensor | ...

Until then the length is zero, which no reader takes for a safetensors file. What lies in a shard is
said by `Entry`s alone; a run that was killed goes on from the entries that its journal holds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quant.errors import RequestError, WorkFailed

LENGTH_BYTES = 8
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Entry(NamedTuple):
    """Where a tensor lies: shard number from 0, and bytes [start, stop) of that shard's data."""

    shard: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class ShardWriter:
    """Writes tensors, in the order in which they come, into shards of at most max_bytes of data.

    A tensor larger than max_bytes has a shard of its own. header_bytes: room for a shard's header.
    Raises WorkFailed where the system refuses to write.
    """

    def __init__(self, directory: Path, max_bytes: int, header_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.header_bytes = -(-header_bytes // 8) * 8  # tensors begin at a multiple of 8
        self.entries: list[Entry] = []
        self._files: dict[int, int] = {}  # descriptors of shards that are not synced yet
        self._shard = 0
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> Entry:
        """Write a whole tensor."""
        return self.add_chunks(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [tensor])

    def add_chunks(
        self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Tensor]
    ) -> Entry:
        """Write a tensor that comes as consecutive slices of its first dimension."""
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        full = self._end > 0 and self._end + size > self.max_bytes
        if full or self._end % DTYPES[dtype].itemsize:  # readers want tensors aligned
            self._shard, self._end = self._shard + 1, 0
        start = self._end
        for chunk in chunks:
            data = _bytes(chunk.detach().cpu().contiguous())
            self._write(data, LENGTH_BYTES + self.header_bytes + self._end)
            self._end += len(data)
        if self._end - start != size:
            raise ValueError(f"{name}: {self._end - start} bytes came, {shape} {dtype} is {size}")
        entry = Entry(self._shard, name, dtype, shape, start, self._end)
        self.entries.append(entry)
        return entry

    def read(self, entry: Entry) -> Tensor:
        """A tensor that was written before."""
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        view = _bytes(tensor)
        done, offset = 0, LENGTH_BYTES + self.header_bytes + entry.start
        with self._path(entry.shard).open("rb", buffering=0) as file:
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done:]], offset + done)
                if not got:
                    raise WorkFailed(f"{file.name} ends before tensor {entry.name} does")
                done += got
        return tensor

    def sync(self) -> None:
        """Return when everything that was added is on the disk."""
        for shard, descriptor in list(self._files.items()):
            with _refusals(self._path(shard)):
                os.fsync(descriptor)
            if shard != self._shard:
                os.close(self._files.pop(shard))
        with _refusals(self.directory):
            flush_to_disk(self.directory)  # a new file's name

    def restore(self, entries: Sequence[Entry]) -> None:
        """Go on after `entries`, in a directory where they were written; the rest is cut off.

        Raises RequestError where a shard is missing or shorter than its entries.
        """
        self.close()
        for path in self.directory.glob("model-*-of-*.safetensors"):  # killed while finishing
            if number := re.match(r"model-(\d+)-of-", path.name):
                path.rename(self._path(int(number[1]) - 1))
        self.entries = list(entries)
        self._shard, self._end = (entries[-1].shard, entries[-1].stop) if entries else (0, 0)
        ends = {entry.shard: LENGTH_BYTES + self.header_bytes + entry.stop for entry in entries}
        for shard, end in ends.items():
            path = self._path(shard)
            found = path.stat().st_size if path.is_file() else 0
            if found < end:
                raise RequestError(
                    f"{path} has {found} bytes, but its run's journal says {end}; the run cannot "
                    f"be resumed: remove {self.directory.parent} and start again"
                )
            os.truncate(path, end)
        for path in self.directory.iterdir():
            if path not in {self._path(shard) for shard in ends}:
                path.unlink()

    def finish(self) -> dict[str, str]:
        """Write the headers and give the shards their final names; returns tensor name -> file."""
        count = self._shard + 1
        weight_map: dict[str, str] = {}
        for shard in range(count):
            entries = [entry for entry in self.entries if entry.shard == shard]
            header = _header(entries)
            if len(header) > self.header_bytes:
                raise ValueError(f"a header of {len(header)} bytes; {self.header_bytes} were left")
            length = self.header_bytes.to_bytes(LENGTH_BYTES, "little")
            self._write(memoryview(length + header.ljust(self.header_bytes)), 0, shard)
        self.sync()
        for shard in range(count):
            final = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            self._path(shard).rename(self.directory / final)
            weight_map |= {entry.name: final for entry in self.entries if entry.shard == shard}
        self.close()
        return weight_map

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard + 1:05d}.tmp"

    def _write(self, data: memoryview, offset: int, shard: int | None = None) -> None:
        shard = self._shard if shard is None else shard
        path = self._path(shard)
        with _refusals(path):
            if shard not in self._files:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._files[shard] = os.open(path, flags, 0o666)
            done = 0
            while done < len(data):
                done += os.pwrite(self._files[shard], data[done:], offset + done)


def flush_to_disk(path: Path) -> None:
    """Return when a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Room for the header of any shard that holds some of `tensors`: name -> dtype, shape."""
    largest = sum(torch.Size(shape).numel() * 8 for _, shape in tensors.values())
    every = [Entry(0, name, *kind, largest, largest) for name, kind in tensors.items()]
    return len(_header(every))


def parse_size(size: int | str) -> int:
    """Bytes from 5000000000, "5GB", "500MB" or "1GiB", as transformers writes them."""
    if isinstance(size, int):
        number, unit = float(size), 1
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", size, re.IGNORECASE)
        if found is None:
            raise RequestError(f"size {size!r} is not understood; write 5GB, 500MB or 1GiB")
        number, unit = float(found[1]), UNITS[found[2].upper()] if found[2] else 1
    if number * unit < 1:
        raise RequestError(f"size {size!r} is not positive")
    return int(number * unit)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    return json.dumps(header, separators=(",", ":")).encode()


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """The system's refusals to write (a full disk, a quota, a device that fails) as WorkFailed."""
    try:
        yield
    except OSError as error:
        raise WorkFailed(f"{path} could not be written: {error.strerror or error}") from error
