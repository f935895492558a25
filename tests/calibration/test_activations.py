"""Stores give back what they were given, whatever was put, read ahead or forgotten in between."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.calibration.activations import DiskStore, MemoryStore
from quant.errors import RequestError, WorkFailed

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int64]
Key = tuple[str, int]


def bits(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bits as a tensor: NaN and infinities among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    return [
        (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).tolist())
        for t in tensors
    ]


@pytest.fixture(params=["device", "cpu", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "disk":
        made: Any = DiskStore(tmp_path / "activations", CPU)
    else:
        made = MemoryStore(CPU, host=request.param == "cpu")
    assert made.place == request.param
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slow", [False, True])
def test_any_schedule_gives_back_what_was_put(
    seed: int, slow: bool, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    if slow and isinstance(store, DiskStore):
        # So that reads ahead and writes behind are still waiting when the next call comes.
        for name in ("_read", "_write"):
            original = getattr(DiskStore, name)

            def later(*arguments: Any, original: Any = original) -> Any:
                time.sleep(0.002)
                return original(*arguments)

            monkeypatch.setattr(DiskStore, name, staticmethod(later))
    expected: dict[Key, tuple[Tensor, ...]] = {}
    for _ in range(150):
        key = (chance.choice(["inputs", "hidden-00001", "hidden-00002"]), chance.randrange(4))
        what = chance.choice(["put", "put", "get", "get", "get", "forget"])
        if what == "put":
            tensors = tuple(
                bits(generator, (chance.randrange(4), 3), chance.choice(DTYPES))
                for _ in range(chance.randrange(1, 4))
            )
            if chance.random() < 0.3:
                tensors = tuple(tensor.T for tensor in tensors)  # not contiguous
            store.put(*key, *tensors)
            expected[key] = tensors
        elif what == "forget":
            store.forget(*key)
            expected.pop(key, None)
        elif key in expected:
            assert raw(store.get(*key)) == raw(expected[key])
    for key, tensors in expected.items():
        assert raw(store.get(*key)) == raw(tensors)


def test_what_was_forgotten_is_gone(store: Any) -> None:
    store.put("a", 0, torch.ones(3))
    store.put("a", 1, torch.ones(3))
    store.get("a", 0)  # reads the other ahead
    store.forget("a", 1)
    store.forget("a", 7)  # was never there
    with pytest.raises(KeyError):
        store.get("a", 1)
    assert raw(store.get("a", 0)) == raw((torch.ones(3),))


def files_of(store: DiskStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_forgotten_files_are_removed(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "activations", CPU)
    for batch in range(3):
        store.put("a", batch, torch.ones(3))
    store.forget("a", 1)
    store.put("b", 0, torch.ones(3))
    store.seal(["b"])()
    assert files_of(store) == ["a-00000.bin", "a-00002.bin", "b-00000.bin"]
    store.put("a", 1, torch.zeros(2))  # written after the old one is removed
    assert raw(store.get("a", 1)) == raw((torch.zeros(2),))
    store.close()


def test_few_batches_wait_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, tensors: list[Tensor]) -> None:
        time.sleep(0.01)
        begun.append(path)
        original(path, tensors)

    begun: list[Path] = []
    original = DiskStore._write
    monkeypatch.setattr(DiskStore, "_write", staticmethod(write))
    store = DiskStore(tmp_path / "activations", CPU)
    for batch in range(12):
        store.put("a", batch, torch.ones(3))
        assert batch + 1 - len(begun) <= DiskStore.QUEUED + 1
    store.close()


def test_sealed_activations_are_taken_up_by_another_store(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, generator=generator) for _ in range(4)]
    first = DiskStore(tmp_path / "activations", CPU)
    for i, batch in enumerate(batches):
        first.put("hidden-00001", i, batch)
        first.put("inputs", i, batch.to(torch.int8))
    seal = first.seal(["hidden-00001"])
    for i, batch in enumerate(batches):
        first.put("hidden-00002", i, 2 * batch)  # goes on meanwhile
    seal()
    second = DiskStore(tmp_path / "activations", CPU)
    shapes = [(torch.float32, (2, 5))] * 4
    second.adopt(["hidden-00001"], shapes)
    assert files_of(second) == [f"hidden-00001-{i:05d}.bin" for i in range(4)]
    for i, batch in enumerate(batches):
        assert raw(second.get("hidden-00001", i)) == raw((batch,))
    first.close()
    second.close()


def test_seal_waits_for_every_batch_and_syncs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, tensors: list[Tensor]) -> None:
        time.sleep(0.02)
        original(path, tensors)
        written.append(path.name)

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync_original(descriptor)

    written: list[str] = []
    synced: list[str] = []
    original, fsync_original = DiskStore._write, os.fsync
    monkeypatch.setattr(DiskStore, "_write", staticmethod(write))
    monkeypatch.setattr(os, "fsync", fsync)
    store = DiskStore(tmp_path / "activations", CPU)
    names = [f"a-{i:05d}.bin" for i in range(5)]
    for i in range(5):
        store.put("a", i, torch.ones(3))
    store.put("b", 0, torch.ones(3))
    store.seal(["a"])()
    assert set(names) <= set(written)
    assert synced == [*names, "activations"]  # the files, and then their names
    store.close()


@pytest.mark.parametrize("loss", [1, None])
def test_adopting_what_is_not_whole_is_refused(loss: int | None, tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "activations", CPU)
    for i in range(2):
        store.put("a", i, torch.ones(3))
    store.seal(["a"])()
    path = tmp_path / "activations" / "a-00001.bin"
    path.unlink() if loss is None else path.write_bytes(path.read_bytes()[:-loss])
    with pytest.raises(RequestError, match=r"a-00001\.bin.* 12 bytes.*remove .* start again"):
        DiskStore(tmp_path / "activations", CPU).adopt(["a"], [(torch.float32, (3,))] * 2)
    with pytest.raises((WorkFailed, FileNotFoundError)):
        store.get("a", 1)
    store.close()


def put_many(store: DiskStore) -> None:
    for i in range(1, 5):
        store.put("a", i, torch.zeros(50_000))
    store.seal(["a"])()


@pytest.mark.parametrize(
    "call", [put_many, lambda store: store.get("a", 0), lambda store: store.seal(["a"])()]
)
def test_failed_write_is_reported_by_what_comes_next(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    store = DiskStore(tmp_path / "activations", CPU)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        store.put("a", 0, torch.ones(3))
        store._thread.submit(int).result()  # the write has been tried
    with pytest.raises(WorkFailed, match=r"a-00000\.bin could not be written: No space left"):
        call(store)
    store.close()


def test_full_disk_fails_with_the_files_name(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip("mounting a small file system is not permitted")
    try:
        store = DiskStore(tmp_path / "activations", CPU)
        with pytest.raises(WorkFailed, match=r"a-0000\d\.bin could not be written: No space left"):
            put_many(store)
        store.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
