"""Shards: what was added comes back bit for bit, and a writer that goes on writes the same."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quant.checkpoint.shards import DTYPE_NAMES, Entry, ShardWriter, header_bytes, parse_size
from quant.errors import RequestError, WorkFailed

DTYPES = list(DTYPE_NAMES)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=8)
no_empty_kinds = kinds.filter(lambda found: all(0 not in shape for _, shape in found))
limits = st.integers(1, 300)


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits as a tensor: NaN, infinities and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same_bits(x: Tensor, y: Tensor) -> bool:
    same_kind = (x.dtype, x.shape) == (y.dtype, y.shape)
    return same_kind and torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


def tensors_of(kinds: list[Any]) -> dict[str, Tensor]:
    return {f"t{i}": bits(shape, dtype, i) for i, (dtype, shape) in enumerate(kinds)}


def writer_of(folder: Path, tensors: dict[str, Tensor], limit: int) -> ShardWriter:
    room = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    return ShardWriter(folder, limit, header_bytes(room))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(kinds=kinds, limit=limits)
@settings(max_examples=40, deadline=None)
def test_everything_comes_back_from_aligned_bounded_shards(kinds: Any, limit: int) -> None:
    tensors = tensors_of(kinds)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        writer = writer_of(folder, tensors, limit)
        entries = [writer.add(name, tensor) for name, tensor in tensors.items()]
        for entry, tensor in zip(entries, tensors.values(), strict=True):
            assert same_bits(writer.read(entry), tensor)
        weight_map = writer.finish()
        names = sorted(path.name for path in folder.iterdir())
        assert names == [
            f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
        ]
        found = {}
        for file in names:
            held = load_file(folder / file)
            assert held
            assert {weight_map[name] for name in held} <= {file}
            sizes = [tensor.numel() * tensor.element_size() for tensor in held.values()]
            assert sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1
            found |= held
            head = (folder / file).read_bytes()
            length = int.from_bytes(head[:8], "little")
            assert length % 8 == 0
            header = json.loads(head[8 : 8 + length])
            assert header.pop("__metadata__") == {"format": "pt"}
            for name, row in header.items():
                assert (8 + length + row["data_offsets"][0]) % tensors[name].element_size() == 0
        assert set(found) == set(weight_map) == set(tensors)
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


@given(kinds=no_empty_kinds, limit=limits, data=st.data())
@settings(max_examples=25, deadline=None)
def test_restored_at_any_entry_it_writes_the_same_files(kinds: Any, limit: int, data: Any) -> None:
    tensors = tensors_of(kinds)
    items = list(tensors.items())
    with tempfile.TemporaryDirectory() as root:
        whole, other = Path(root, "whole"), Path(root, "other")
        whole.mkdir()
        other.mkdir()
        writer = writer_of(whole, tensors, limit)
        for name, tensor in items:
            writer.add(name, tensor)
        writer.finish()

        writer = writer_of(other, tensors, limit)
        for name, tensor in items:
            writer.add(name, bits(tuple(tensor.shape), tensor.dtype, 99))  # poison
        for keep in range(len(items) + 1):
            # What was added up to `keep` is right, the rest is poison.
            again = writer_of(other, tensors, limit)
            again.restore(writer.entries[:keep])
            assert again.entries == writer.entries[:keep]
            writer.close()
            if data.draw(st.booleans()):
                for name, tensor in items[keep:]:
                    again.add(name, bits(tuple(tensor.shape), tensor.dtype, 98))
                again.finish() if data.draw(st.booleans()) else again.sync()
                again.restore(again.entries[:keep])
            for name, tensor in items[keep : keep + 1]:
                assert same_bits(again.read(again.add(name, tensor)), tensor)
            for name, tensor in items[keep + 1 :]:
                again.add(name, bits(tuple(tensor.shape), tensor.dtype, 97))
            writer = again
        writer.finish()
        assert files_of(other) == files_of(whole)


def test_chunks_are_the_whole(tmp_path: Path) -> None:
    tensor = bits((7, 3), torch.bfloat16, 0)
    for folder, chunks in (("a", [tensor]), ("b", tensor.split(2)), ("c", tensor.split(1))):
        (tmp_path / folder).mkdir()
        writer = writer_of(tmp_path / folder, {"first": tensor, "t": tensor}, 10**6)
        writer.add("first", tensor[:1].clone())
        entry = writer.add_chunks("t", "BF16", (7, 3), chunks)
        assert (entry.start, entry.stop) == (6, 48)
        assert same_bits(writer.read(entry), tensor)
        writer.finish()
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") == files_of(tmp_path / "c")


def test_chunks_of_another_size_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**6, 1000)
    for chunks in ([torch.zeros(2, 3)], [torch.zeros(2, 3), torch.zeros(2, 3)]):
        with pytest.raises(ValueError, match=r"t: \d+ bytes came, \(3, 3\) F32 is 36"):
            writer.add_chunks("t", "F32", (3, 3), chunks)
    assert not writer.entries


def test_unfinished_shard_is_no_safetensors_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**6, 1000)
    writer.add("t", torch.ones(4))
    writer.sync()
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".tmp"
    assert path.read_bytes()[:8] == bytes(8)
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(path)


def test_room_for_the_header_is_enough_for_any_split_and_no_less_is(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.up_proj.weight": torch.zeros(9, 9) for i in range(12)}
    room = header_bytes({name: ("F32", (9, 9)) for name in tensors})
    writer = ShardWriter(tmp_path, 10**9, room)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    # Offsets have fewer digits than the bound has: that is all that is left over.
    assert room - 12 * 2 * 5 < len(
        json.dumps(
            {
                "__metadata__": {"format": "pt"},
                **{
                    e.name: {
                        "dtype": "F32",
                        "shape": [9, 9],
                        "data_offsets": [e.start, e.stop],
                    }
                    for e in writer.entries
                },
            },
            separators=(",", ":"),
        )
    )
    writer.finish()
    small = ShardWriter(tmp_path, 10**9, 100)
    small.add("a" * 100, torch.zeros(1))
    with pytest.raises(ValueError, match="a header of"):
        small.finish()


def test_sync_leaves_one_file_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = ShardWriter(tmp_path, 1, 1000)
    for i in range(20):
        writer.add(f"t{i}", torch.ones(4))
        writer.sync()
        assert len(os.listdir("/proc/self/fd")) == before + 1
    writer.finish()
    assert len(os.listdir("/proc/self/fd")) == before


def test_sync_reaches_every_shard_since_the_last(tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").rsplit("/", 1)[-1])
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    writer = ShardWriter(tmp_path, 16, 1000)
    for i in range(3):
        writer.add(f"t{i}", torch.ones(4))
    writer.sync()
    assert sorted(synced[:-1]) == [f"shard-{i + 1:05d}.tmp" for i in range(3)]
    assert synced[-1] == tmp_path.name  # their names


def test_refusals_of_the_system_name_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = ShardWriter(tmp_path, 10**6, 1000)
    writer.add("a", torch.ones(4))
    for call, step in (("fsync", writer.sync), ("pwrite", lambda: writer.add("b", torch.ones(4)))):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(WorkFailed, match=r"shard-00001\.tmp .*No space left on device"):
                step()


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: Any) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:5]], at))
    tensor = bits((10, 10), torch.float32, 3)
    writer = ShardWriter(tmp_path, 10**6, 1000)
    entry = writer.add("a", tensor)
    assert same_bits(writer.read(entry), tensor)


def test_missing_bytes_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**6, 1000)
    entries = [writer.add(name, torch.ones(4)) for name in "ab"]
    writer.close()
    path = tmp_path / "shard-00001.tmp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WorkFailed, match="ends before tensor b does"):
        ShardWriter(tmp_path, 10**6, 1000).read(entries[1])
    with pytest.raises(RequestError, match=r"has 1039 bytes, but its run's journal says 1040"):
        ShardWriter(tmp_path, 10**6, 1000).restore(entries)
    ShardWriter(tmp_path, 10**6, 1000).restore(entries[:1])
    with pytest.raises(RequestError, match="has 0 bytes"):
        ShardWriter(tmp_path, 10**6, 1000).restore([Entry(1, "c", "F32", (1,), 0, 4)])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5_000_000_000, 5_000_000_000),
        ("5GB", 5 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5 KB", 1500),
        ("1GiB", 2**30),
        ("3mib", 3 * 2**20),
        ("2KiB", 2048),
        (" 12 ", 12),
        (1, 1),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 TB", "-1GB", "5GBs", "1e9", "5 G B", "0x10", "5,0GB"]
)
def test_sizes_that_are_not_understood(text: str) -> None:
    with pytest.raises(RequestError, match="write 5GB, 500MB or 1GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", [0, -5, "0", "0GB", "0.5"])
def test_sizes_that_are_not_positive(text: int | str) -> None:
    with pytest.raises(RequestError, match="not positive"):
        parse_size(text)
