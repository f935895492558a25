"""What may differ between a run and the one that resumes it, and what may not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quant
from quant.calibration.quantize import quantize
from quant.calibration.resume import finished_blocks
from quant.errors import RequestError
from quant.report import Progress


class Stopped(BaseException):
    """As KeyboardInterrupt: no `except Exception` may swallow it."""


def stop_in_block_1(event: Progress) -> None:
    if event.stage == "quantize" and event.done == 6:
        raise Stopped


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Stage:
    """A model, a text and a recipe of one's own, and a run of them that stopped in block 1."""

    def __init__(self, folder: Path, source: Path, text: Path) -> None:
        self.folder, self.work, self.output = folder, folder / ".out.partial", folder / "out"
        self.model = Path(shutil.copytree(source, folder / "model"))
        self.text = Path(shutil.copy(text, folder / "text.txt"))
        self.recipe = folder / "mine.yaml"
        self.recipe.write_text("passes:\n  - compensate: {damping: 0.02}\n")
        self.options: dict[str, Any] = {
            "recipe": str(self.recipe),
            "dataset": str(self.text),
            "num_calibration_samples": 6,
            "max_seq_length": 48,
            "group_size": 64,
            "device": "cpu",
            "activation_offload": "disk",
        }
        with pytest.raises(Stopped):
            self.run(on_progress=stop_in_block_1)
        assert finished_blocks(self.output) == 1

    def run(self, output: str = "out", **changes: Any) -> Any:
        options = {**self.options, **changes}
        return quantize(str(self.model), self.folder / output, **options)

    def refused(self, **changes: Any) -> str:
        """Resume with changes; nothing is lost by it. Returns the message."""
        before = contents(self.work)
        with pytest.raises(RequestError) as caught:
            self.run(resume=True, **changes)
        assert contents(self.work) == before
        assert not self.output.exists()
        assert str(self.work) in str(caught.value)  # what to remove
        return str(caught.value)

    def finishes(self, **changes: Any) -> None:
        """Resume with changes; the bytes are those of a run in one go."""
        assert self.run(resume=True, **changes).resumed_blocks == 1
        assert not self.work.exists()
        self.run("whole", **changes)
        assert contents(self.output) == contents(self.folder / "whole")


@pytest.fixture
def stage(tiny_checkpoint: Callable[[str], Path], calibration_text: Path, tmp_path: Path) -> Stage:
    return Stage(tmp_path, tiny_checkpoint("llama"), calibration_text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"group_size": 32}, "recipe group_size: 64 then, 32 now"),
        ({"numerics": "exact"}, "recipe numerics: lut then, exact now"),
        ({"scheme": "w4a8"}, "recipe scheme: w4afp8 then, w4a8 now"),
        ({"ignore": ("model.layers.1.mlp.up_proj",)}, "recipe ignore.0: nothing then, model.laye"),
        ({"seed": 1}, "recipe calibration.seed: 0 then, 1 now"),
        ({"num_calibration_samples": 5}, "num_calibration_samples: 6 then, 5 now"),
        ({"max_seq_length": 47}, "max_seq_length: 48 then, 47 now"),
        ({"dtype": "float32"}, "setting dtype: auto then, float32 now"),
        ({"max_shard_size": "1MB"}, "setting max shard size: 5000000000 then, 1000000 now"),
        ({"recipe": "rtn"}, "recipe passes.0.round.scales: nothing then, absmax now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused(changes: dict[str, Any], said: str, stage: Stage) -> None:
    message = stage.refused(**changes)
    assert said in message
    assert "cannot be resumed with this" in message


def edit_the_damping(stage: Stage) -> str:
    stage.recipe.write_text("passes:\n  - compensate: {damping: 0.03}\n")
    return "recipe passes.0.compensate.damping: 0.02 then, 0.03 now"


def edit_the_text(stage: Stage) -> str:
    stage.text.write_text(stage.text.read_text()[::-1])
    return "calibration data tokens: "


def change_a_byte(stage: Stage) -> str:
    file = stage.model / "model.safetensors"
    found = file.stat()
    data = bytearray(file.read_bytes())
    data[-6] ^= 1  # the last bit of a weight's mantissa
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    return "file model.safetensors: "


def change_the_config(stage: Stage) -> str:
    file = stage.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": "new"}))
    return "file config.json: "


def change_the_tokenizer(stage: Stage) -> str:
    file = stage.model / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    return "file tokenizer.json: "


def remove_a_companion(stage: Stage) -> str:
    (stage.model / "chat_template.jinja").unlink()
    return "file chat_template.jinja: "


@pytest.mark.parametrize(
    "change",
    [
        edit_the_damping,
        edit_the_text,
        change_a_byte,
        change_the_config,
        change_the_tokenizer,
        remove_a_companion,
    ],
)
def test_other_files_under_the_same_names_are_refused(change: Any, stage: Stage) -> None:
    said = change(stage)
    message = stage.refused()
    assert said in message
    assert message.count(" then, ") == 1  # that and nothing else


def test_another_version_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "__version__", "9.9.9")
    assert "version of fourbyeight: " in (message := stage.refused())
    assert "9.9.9 now" in message


def test_refused_run_can_still_be_resumed_with_what_it_began_with(stage: Stage) -> None:
    stage.refused(group_size=32)
    stage.finishes()


@pytest.mark.parametrize(
    "changes",
    [
        {"on_failure": "skip-to-bf16"},
        {"max_error": 0.4},
        {"activation_offload": "cpu"},
        {"activation_offload": "none"},
        {"activation_offload": "auto"},
    ],
    ids=str,
)
def test_what_does_not_decide_about_finished_blocks_may_change(
    changes: dict[str, Any], stage: Stage
) -> None:
    stage.finishes(**changes)


# What else may have happened to the work directory.


def test_torn_last_line_is_no_line(stage: Stage) -> None:
    journal = stage.work / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"part": {"name": "1", "entries": [[0, "model.lay')
    assert finished_blocks(stage.output) == 1
    stage.finishes()


def test_lost_last_line_is_done_again(stage: Stage) -> None:
    journal = stage.work / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-1])
    assert finished_blocks(stage.output) == 0
    assert stage.run(resume=True).resumed_blocks == 0
    stage.run("whole")
    assert contents(stage.output) == contents(stage.folder / "whole")


@pytest.mark.parametrize("line", [0, 1])
@pytest.mark.parametrize("rubbish", [b"{}\n", b"\xff\xfe\n", b"[]\n", b'{"part": {}}\n', b"\n"])
def test_corrupt_journal_is_refused_and_kept(line: int, rubbish: bytes, stage: Stage) -> None:
    journal = stage.work / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # fingerprint, embedding, block 0
    lines[line] = rubbish
    journal.write_bytes(b"".join(lines))
    message = stage.refused()
    assert "journal.jsonl cannot be read" in message
    assert "remove" in message


def test_journal_without_its_first_line_is_refused(stage: Stage) -> None:
    journal = stage.work / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    assert "cannot be read" in stage.refused()


@pytest.mark.parametrize("loss", [1, 10_000, None])
def test_partial_shard_that_lost_bytes_is_refused(loss: int | None, stage: Stage) -> None:
    shard = stage.work / "checkpoint" / "shard-00001.tmp"
    if loss is None:
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - loss)
    message = stage.refused()
    assert "shard-00001.tmp" in message
    assert "journal says" in message


@pytest.mark.parametrize("loss", [1, None])
def test_kept_activations_that_lost_bytes_are_refused_and_can_be_computed(
    loss: int | None, stage: Stage
) -> None:
    file = stage.work / "activations" / "hidden-00001-00000.bin"
    size = file.stat().st_size
    assert size == 4 * 6 * 48 * 128
    file.unlink() if loss is None else os.truncate(file, size - loss)
    message = stage.refused()
    assert "hidden-00001-00000.bin" in message
    assert f"{size} bytes" in message
    stage.finishes(activation_offload="cpu")


def test_bytes_beyond_the_journal_do_not_get_into_the_checkpoint(stage: Stage) -> None:
    with (stage.work / "checkpoint" / "shard-00001.tmp").open("ab") as file:
        file.write(b"half of a tensor" * 100_000)  # more than is still to come
    (stage.work / "checkpoint" / "shard-00002.tmp").write_bytes(b"and of the next")
    (stage.work / "checkpoint" / "config.json").write_text("{}")
    (stage.work / "activations" / "inputs-00000.bin").write_bytes(b"stale")
    stage.finishes()
