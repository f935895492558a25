"""OUT is there whole or not at all; what is finished of it survives beside it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quant.calibration.pipeline as pipeline
from quant.calibration.quantize import quantize
from quant.calibration.resume import finished_blocks
from quant.checkpoint.journal import Fingerprint, Journal, Part
from quant.checkpoint.writer import CheckpointWriter
from quant.errors import RequestError, WorkFailed


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` may swallow it."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("deep", ["out", "new/parents/out"])
@pytest.mark.parametrize(("call", "blocks"), [(3, 0), (7, 1)])
def test_failure_in_the_middle_keeps_finished_blocks_only(
    call, blocks, deep, error, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    calls = []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            assert snapshot(tmp_path)  # something is there, hidden
            assert not (tmp_path / deep).exists()
            raise error("now")
        return original(*arguments)

    original = pipeline.advance
    monkeypatch.setattr(pipeline, "advance", fail_once)
    source, output = str(tiny_checkpoint("llama")), tmp_path / deep
    with pytest.raises(error, match="now"):
        quantize(source, output, "gptq", device="cpu", **calibration)
    assert not output.exists()
    assert finished_blocks(output) == blocks
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith("partial")]
    assert left == ([".out.partial"] if blocks else [])
    if deep == "out" and not blocks:
        assert not snapshot(tmp_path)
    monkeypatch.undo()
    report = quantize(source, output, "gptq", device="cpu", resume=True, **calibration)
    assert report.resumed_blocks == blocks
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("module", "step", "nth"),
    [
        (os, "rename", 1),  # of the first shard
        (os, "rename", 2),  # of the second
        (os, "rename", -1),  # of the directory
        (os, "fsync", -1),  # of a finished file
        (shutil, "copyfile", 1),
    ],
)
def test_failure_while_finishing_can_be_resumed(
    module, step, nth, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    def request(name, **options):
        options |= {**calibration, "device": "cpu", "max_shard_size": 100_000}
        quantize(str(tiny_checkpoint("llama")), tmp_path / name, "gptq", **options)

    calls = []

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise OSError("disk full")
        return original(*arguments)

    original, fails_at = getattr(module, step), -1
    monkeypatch.setattr(module, step, count)
    request("whole")
    fails_at = nth if nth > 0 else len(calls) + 1 + nth - (step == "fsync")  # last: its folder
    calls.clear()
    with pytest.raises(WorkFailed, match=r"(?s)disk full.*2 blocks are done.*--resume"):
        request("out")
    assert len(calls) == fails_at
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.partial"}
    monkeypatch.undo()
    request("out", resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_failure_before_the_first_block_leaves_nothing(
    tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WorkFailed, match="No space left on device"):
        quantize(
            str(tiny_checkpoint("llama")), tmp_path / "out", "gptq", device="cpu", **calibration
        )
    assert not snapshot(tmp_path)


def test_every_file_is_on_the_disk_before_the_directory_gets_its_name(
    tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    def fsync(descriptor):
        found = os.fstat(descriptor)
        synced.add((found.st_ino, found.st_mtime_ns))  # a file that changes later is not meant
        original_fsync(descriptor)

    def rename(source, target):
        if Path(target) == tmp_path / "out":
            files = [path.stat() for path in Path(source).iterdir()]
            missing.append([f for f in files if (f.st_ino, f.st_mtime_ns) not in synced])
        original_rename(source, target)

    synced, missing = set(), []
    original_fsync, original_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    quantize(str(tiny_checkpoint("llama")), tmp_path / "out", "gptq", device="cpu", **calibration)
    assert missing == [[]]


def test_what_a_killed_run_left_does_not_get_into_the_next(
    quantized_case, tiny_checkpoint, calibration, tmp_path
):
    left = tmp_path / ".out.partial"
    (left / "checkpoint").mkdir(parents=True)
    (left / "checkpoint" / "shard-00001.tmp").write_bytes(b"half a shard" * 100_000)
    (left / "checkpoint" / "model-00007-of-00009.safetensors").write_bytes(b"rubbish")
    quantize(str(tiny_checkpoint("llama")), tmp_path / "out", "gptq", device="cpu", **calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in quantized_case("lut-128").output.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_what_a_killed_run_left_before_its_first_block_is_removed_by_one_that_fails(
    tiny_checkpoint, calibration, tmp_path
):
    def stop(event):
        if event.stage == "quantize":
            raise Interrupted

    left = tmp_path / ".out.partial"
    left.mkdir()
    journal = Journal(left / "journal.jsonl")
    journal.begin(Fingerprint({}, {}, {}, {}, {}), 1)
    journal.append(Part("embedding", ()))
    with pytest.raises(Interrupted):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "out", on_progress=stop, **calibration)
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("what", ["directory", "empty directory", "file", "link", "dangling link"])
def test_output_that_exists_is_refused_and_untouched(what, tiny_checkpoint, calibration, tmp_path):
    output = tmp_path / "out"
    if what == "file":
        output.write_text("precious")
    elif what.endswith("link"):
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / ("elsewhere" if what == "link" else "nowhere"))
    else:
        output.mkdir()
        if what == "directory":
            (output / "config.json").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(RequestError, match="exists"):
        quantize(str(tiny_checkpoint("llama")), output, device="cpu", **calibration)
    assert snapshot(tmp_path) == before
    assert output.is_symlink() == what.endswith("link")


def test_output_below_a_file_is_refused(tiny_checkpoint, calibration, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RequestError, match="cannot be made"):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "file" / "out", **calibration)


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_shards_are_bounded_and_hold_everything(limit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 100, generator=generator) for i in range(9)}
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = {1: 9, 3000: 7, 10**9: 1}[limit]
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    found = {}
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        assert size <= limit or len(held) == 1
        assert all(index["weight_map"][name] == shard for name in held)
        found |= held
    assert set(found) == set(index["weight_map"]) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_context_left_without_finish_writes_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", torch.zeros(8))
        writer.add("b", torch.zeros(8))
        assert snapshot(tmp_path)
    assert not snapshot(tmp_path)


def test_what_a_kill_in_the_last_step_left_goes_with_the_next_command(
    quantized_case, calibration, tmp_path
):
    output, left = tmp_path / "out", tmp_path / ".out.partial"
    shutil.copytree(quantized_case("lut-128").output, output)
    before = snapshot(tmp_path)
    left.mkdir()
    (left / "journal.jsonl").write_text("{}")
    with pytest.raises(RequestError, match="exists"):
        quantize(str(quantized_case("lut-128").source), output, resume=True, **calibration)
    assert snapshot(tmp_path) == before


def test_output_that_another_run_finishes_meanwhile_is_not_overwritten(tmp_path):
    writer = CheckpointWriter(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(RequestError, match="exists"):
        writer.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_run_that_quantizes_nothing_fails(tiny_checkpoint, calibration, tmp_path):
    options = {"max_error": 1e-9, "on_failure": "skip-to-bf16", "device": "cpu", **calibration}
    with pytest.raises(WorkFailed, match=r"no layer could be quantized; .*the bound is"):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
