"""A run that is stopped anywhere and resumed writes the bytes of one that was not."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant.calibration.pipeline as pipeline
from quant.calibration.activations import DiskStore, MemoryStore
from quant.calibration.quantize import plan, quantize
from quant.calibration.resume import finished_blocks
from quant.checkpoint.journal import Journal, Part
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.shards import ShardWriter, header_bytes
from quant.errors import RequestError, WorkFailed
from quant.recipe import DEFAULT_PRESET, load_recipe
from quant.report import Progress

RECIPES = {
    "gptq": {"recipe": "gptq", "scheme": "w4afp8", "group_size": 64},
    "rtn": {"recipe": "rtn", "scheme": "w4a8", "group_size": 32},
    "gptq-int8": {"recipe": "gptq", "scheme": "w4a8", "group_size": -1},
    "rtn-exact": {"recipe": "rtn", "scheme": "w4afp8", "group_size": 128, "numerics": "exact"},
}
PLACES = ["cpu-cpu", "disk-disk", "cpu-disk", "disk-cpu"]
STRIDE = 4  # of the events at which one test stops; together the tests stop at all of them


class Stopped(BaseException):
    """As KeyboardInterrupt: no `except Exception` may swallow it."""


class Clock:
    """Counts the events of a run, and stops it at one of them, or where a site begins."""

    def __init__(self, stop_at: int = -1, site: int = -1) -> None:
        self.stop_at, self.site = stop_at, site
        self.events: list[Progress] = []
        self.threads: set[int] = set()

    def __call__(self, event: Progress) -> None:
        if event.stage == "check source (MB)" and self.events[-1].stage == event.stage:
            return  # one is as good as the other
        self.events.append(event)
        if event.stage == "quantize":
            self.threads.add(torch.get_num_threads())
            if event.done == self.site:
                raise Stopped
        if len(self.events) - 1 == self.stop_at:
            raise Stopped


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch, calibration: dict[str, Any]) -> None:
    """Six windows in batches of 2."""
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 2 * calibration["max_seq_length"])


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def begin(
    tiny_checkpoint: Callable[[str], Path], calibration: dict[str, Any], tmp_path: Path
) -> Callable[..., Any]:
    """A run to tmp_path / "out" on the tiny Llama, with changed options."""

    def run(**options: Any) -> Any:
        source = options.pop("source", tiny_checkpoint("llama"))
        output = options.pop("output", tmp_path / "out")
        options = {"recipe": "gptq", **calibration, **options}
        return quantize(str(source), output, device="cpu", **options)

    return run


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_stopped_at_any_event_and_resumed_is_the_same(
    name: str, places: str, begin: Any, tmp_path: Path
) -> None:
    clock = Clock()
    whole = begin(output=tmp_path / "whole", on_progress=clock, **RECIPES[name])
    expected = files_of(tmp_path / "whole")
    first, second = places.split("-")
    resumed = set()
    last = len(clock.events) - 1
    for stop_at in sorted({*range(PLACES.index(places), last, STRIDE), last - 2, last - 1, last}):
        output = tmp_path / f"out{stop_at}"
        with pytest.raises(Stopped):
            begin(
                output=output,
                on_progress=Clock(stop_at),
                activation_offload=first,
                **RECIPES[name],
            )
        work = tmp_path / f".out{stop_at}.partial"
        if stop_at == last:  # after everything
            assert files_of(output) == expected
            assert not work.exists()
            continue
        assert not output.exists()
        blocks = finished_blocks(output)
        assert work.exists() == (blocks > 0)
        if blocks:
            with pytest.raises(RequestError, match=rf"{blocks} blocks done.*--resume.*remove"):
                begin(output=output, **RECIPES[name])
        report = begin(output=output, resume=True, activation_offload=second, **RECIPES[name])
        assert files_of(output) == expected, clock.events[stop_at]
        assert report.resumed_blocks == blocks
        assert [row.name for row in report.layers] == [row.name for row in whole.layers]
        assert report.ignored == whole.ignored
        assert not work.exists()
        resumed.add(blocks)
    assert resumed == {0, 1, 2}  # nothing done; one block; both, and the rest not


@pytest.mark.parametrize("name", ["gptq-int8", "rtn-exact"])
def test_stopped_again_and_again_is_the_same(
    name: str, deep_checkpoint: Path, begin: Any, tmp_path: Path
) -> None:
    options = {"source": deep_checkpoint, **RECIPES[name]}
    clock = Clock()
    begin(output=tmp_path / "whole", on_progress=clock, **options)
    expected, total = files_of(tmp_path / "whole"), len(clock.events)
    source_of_chance = random.Random(3)
    most = 0
    for attempt in range(4):
        output = tmp_path / f"out{attempt}"
        stops, done = 0, []
        while True:
            place = source_of_chance.choice(["cpu", "disk"])
            clock = Clock(source_of_chance.randrange(total // 4, total))
            try:
                begin(
                    output=output,
                    resume=True,
                    activation_offload=place,
                    on_progress=clock,
                    max_shard_size=60_000,
                    **options,
                )
            except Stopped:
                stops += 1
                done.append(finished_blocks(output))
                continue
            break
        assert done == sorted(done)  # what is finished stays so
        most = max(most, stops)
        found = files_of(output)
        assert len([name for name in found if name.endswith(".safetensors")]) > 3
        begin(output=tmp_path / f"same{attempt}", max_shard_size=60_000, **options)
        assert found == files_of(tmp_path / f"same{attempt}")
        assert found["report.jsonl"] == expected["report.jsonl"]
    assert most > 1


def test_resume_without_an_unfinished_run_begins_one(begin: Any, tmp_path: Path) -> None:
    assert begin(resume=True).resumed_blocks == 0
    begin(output=tmp_path / "plain")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_finished_blocks_are_not_computed_again(begin: Any, tmp_path: Path) -> None:
    again: dict[str, Clock] = {}
    for place in ("cpu", "disk"):
        output = tmp_path / place
        with pytest.raises(Stopped):
            begin(output=output, on_progress=Clock(site=5), activation_offload=place)
        again[place] = Clock()
        begin(output=output, resume=True, on_progress=again[place], activation_offload=place)
    batches, sites = 3, 4
    steps = {
        place: sum(e.stage == "quantize" and e.done < sites for e in clock.events)
        for place, clock in again.items()
    }
    # From memory the tokens go through block 0 once more, without a Hessian. From disk they do not.
    assert steps == {"cpu": batches * (1 + sites), "disk": 0}
    with pytest.raises(Stopped):  # when only the rest of the files is to be written
        begin(on_progress=Clock(site=8), activation_offload="cpu")
    clock = Clock()
    assert begin(resume=True, on_progress=clock, activation_offload="cpu").resumed_blocks == 2
    assert [e.done for e in clock.events if e.stage == "quantize"] == [2 * sites]


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_block_that_could_not_be_written_is_not_passed_over(
    place: str, block: int, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(self: ShardWriter) -> None:
        calls.append(self)
        if len(calls) == 2 + block:  # after the embedding's and the blocks' before
            raise WorkFailed("a disk that fails once")
        original(self)

    calls: list[ShardWriter] = []
    original = ShardWriter.sync
    monkeypatch.setattr(ShardWriter, "sync", sync)
    with pytest.raises(WorkFailed, match="fails once"):
        begin(activation_offload=place)
    assert finished_blocks(tmp_path / "out") == block
    assert begin(activation_offload=place, resume=True).resumed_blocks == block
    begin(output=tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_block_is_recorded_when_what_enters_the_next_is_on_the_disk(
    begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, tensors: Any) -> None:
        time.sleep(0.02)
        original_write(path, tensors)

    def fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        original_fsync(descriptor)

    def append(self: Journal, part: Part) -> None:
        if part.name != "embedding":
            names = {f"hidden-{int(part.name) + 1:05d}-{i:05d}.bin" for i in range(3)}
            assert names <= synced
            sizes = {(tmp_path / ".out.partial/activations" / n).stat().st_size for n in names}
            assert sizes == {4 * 2 * 48 * 128}
            recorded.append(part.name)
        original_append(self, part)

    synced: set[str] = set()
    recorded: list[str] = []
    original_write, original_fsync, original_append = DiskStore._write, os.fsync, Journal.append
    monkeypatch.setattr(DiskStore, "_write", staticmethod(write))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Journal, "append", append)
    begin(activation_offload="disk")
    assert recorded == ["0", "1"]


@pytest.mark.parametrize("policy", ["stop", "skip-to-bf16"])
@pytest.mark.parametrize(("kind", "place"), [(MemoryStore, "cpu"), (DiskStore, "disk")])
def test_no_more_activations_are_kept_than_two_blocks_need(
    kind: Any,
    place: str,
    policy: str,
    deep_checkpoint: Path,
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def put(self: Any, name: str, batch: int, *tensors: Any) -> None:
        original_put(self, name, batch, *tensors)
        alive.add((name, batch))
        most.append(len({name for name, _ in alive if name.startswith("hidden")}))

    def forget(self: Any, name: str, batch: int) -> None:
        original_forget(self, name, batch)
        alive.discard((name, batch))

    most: list[int] = []
    alive: set[tuple[str, int]] = set()
    original_put, original_forget = kind.put, kind.forget
    monkeypatch.setattr(kind, "put", put)
    monkeypatch.setattr(kind, "forget", forget)
    options = {"source": deep_checkpoint, "activation_offload": place, "on_failure": policy}
    # What is measured to decide about a rotation has stores of its own.
    options["recipe"] = load_recipe(DEFAULT_PRESET).decided(False)
    bound = 3 if place == "disk" else 2
    begin(output=tmp_path / "whole", **options)
    assert max(most) == bound
    alive.clear()
    with pytest.raises(Stopped):
        begin(on_progress=Clock(site=14), **options)
    most.clear()
    alive.clear()
    begin(resume=True, **options)
    assert max(most) <= bound


def test_resumed_run_uses_the_threads_it_began_with(begin: Any, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    clock = Clock()
    begin(output=tmp_path / "whole", on_progress=clock)
    assert clock.threads == {2}
    with pytest.raises(Stopped):
        begin(on_progress=Clock(site=6))
    assert finished_blocks(tmp_path / "out") == 1
    torch.set_num_threads(1)
    clock = Clock()
    begin(resume=True, on_progress=clock)
    assert clock.threads == {2}
    assert torch.get_num_threads() == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_space_that_the_unfinished_run_takes_is_not_asked_for_twice(
    tiny_checkpoint: Any,
    calibration: dict[str, Any],
    begin: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Disk:
        """As much room as a run asks for, and the journal takes; what is written counts."""

        def __init__(self, _: Path) -> None:
            files = (path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            self.free = room - sum(files)

    source = str(tiny_checkpoint("llama"))
    options = {"recipe": DEFAULT_PRESET, "activation_offload": "disk"}
    asked = plan(source, tmp_path / "out", **options, **calibration).disk_bytes
    monkeypatch.setattr("quant.checkpoint.writer.shutil.disk_usage", Disk)
    room = asked - 1
    with pytest.raises(RequestError, match=r"needs 0\.\d+ GB, but .* GB left"):
        begin(**options)
    assert not list(tmp_path.iterdir())
    room = asked + 20_000
    with pytest.raises(Stopped):
        begin(**options, on_progress=Clock(site=6))
    assert finished_blocks(tmp_path / "out") == 1
    kept = sum(path.stat().st_size for path in (tmp_path / ".out.partial").rglob("*.bin"))
    assert kept > 20_000
    begin(**options, resume=True)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_run_takes_the_disk_space_that_the_plan_says(
    place: str, tiny_checkpoint: Any, calibration: dict[str, Any], begin: Any, tmp_path: Path
) -> None:
    def listen(_: Progress) -> None:
        files = [*(tmp_path / ".out.partial").glob("*/*"), *tmp_path.glob("out/*")]
        taken.append(sum(path.stat().st_size for path in files if path.exists()))

    taken: list[int] = []
    source = str(tiny_checkpoint("llama"))
    options = {"recipe": DEFAULT_PRESET, "activation_offload": place}
    asked = plan(source, tmp_path / "out", **options, **calibration).disk_bytes
    begin(**options, on_progress=listen)
    # The small files beside the weights, and what rounds a header up, are not in the plan.
    out = (tmp_path / "out").iterdir()
    texts = sum(path.stat().st_size for path in out if path.suffix != ".safetensors")
    assert 0.7 * asked < max(taken) - texts <= asked + 16


def test_plan_lists_what_the_checkpoint_holds(quantized: Any, tmp_path: Path) -> None:
    rotated = any("rotate" in step for step in quantized.report.recipe["passes"])
    recipe = load_recipe(DEFAULT_PRESET).decided(rotated)
    planned = plan(str(quantized.source), tmp_path / "out", recipe, **quantized.overrides)
    stored = CheckpointReader(quantized.output)
    assert planned.tensors == {
        name: (stored.dtype(name), stored.shape(name)) for name in stored.names
    }
    data = sum(stored.nbytes(name) for name in stored.names)
    # A file adds the length of its header (8 bytes), and rounds the header up to 8.
    assert 0 <= quantized.report.size_bytes - planned.size_bytes < 16
    assert planned.size_bytes - data == header_bytes(planned.tensors)
