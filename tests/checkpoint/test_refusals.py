"""Checkpoints and folders that look usable and are not."""

from __future__ import annotations

import fcntl
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.calibration.quantize import quantize
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.errors import RequestError, WorkFailed


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A directory -> a copy of it that a test may break."""

    def make(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "copy"))

    return make


def add_tensor(file: Path, name: str, tensor: torch.Tensor) -> None:
    save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})


def test_a_head_of_its_own_in_a_tied_checkpoint(
    tiny_checkpoint: Any, copy: Any, calibration: dict[str, Any], tmp_path: Path
) -> None:
    broken = copy(tiny_checkpoint("llama-tied"))
    embedding = load_file(broken / "model.safetensors")["model.embed_tokens.weight"]
    add_tensor(broken / "model.safetensors", "lm_head.weight", embedding.clone())
    CheckpointReader(broken).check_dense()  # the same values: tied all right
    add_tensor(broken / "model.safetensors", "lm_head.weight", embedding.flip(0))
    for load in (
        lambda: load_decoder(broken),
        lambda: quantize(str(broken), tmp_path / "out", **calibration, group_size=32),
    ):
        with pytest.raises(RequestError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
            load()


def test_dynamic_activation_order_is_refused(quantized_case: Any, copy: Any) -> None:
    broken = copy(quantized_case("exact-32").output)
    config = json.loads((broken / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["actorder"] = "group"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="actorder 'group' is not supported"):
        load_decoder(broken)
    weights["actorder"] = "static"
    (broken / "config.json").write_text(json.dumps(config))
    load_decoder(broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight_g_idx"
    file = index["weight_map"][name.replace("g_idx", "packed")]
    add_tensor(broken / file, name, torch.zeros(128, dtype=torch.int32))
    index["weight_map"][name] = file
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="weight_g_idx"):
        load_decoder(broken)


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with CheckpointWriter(output, max_shard_bytes=8) as first:
        first.add("a", torch.ones(4))
        first.add("b", torch.ones(4))
        with pytest.raises(RequestError, match="another run is writing it"):
            CheckpointWriter(output).__enter__()
        first.finish()
    assert {p.name for p in output.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("again", [False, True])
def test_lock_of_a_directory_that_is_gone_meanwhile_is_none(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        original(*arguments)
        shutil.rmtree(tmp_path / ".out.partial")  # as the run that had it does when it finishes
        if again:
            (tmp_path / ".out.partial").mkdir()  # and a third one begins
            (tmp_path / ".out.partial" / ".lock").touch()

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RequestError, match="another run is writing it"):
        CheckpointWriter(tmp_path / "out").__enter__()


def test_what_a_killed_run_left_is_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "checkpoint").mkdir()
    (left / "checkpoint" / "shard-00001.tmp").write_bytes(b"half")
    (left / "activations").mkdir()
    (left / "activations" / "hidden-00000-00000.bin").write_bytes(b"half")
    (left / "journal.jsonl").write_bytes(b"{}")
    with CheckpointWriter(tmp_path / "out") as writer:
        assert (left / "checkpoint" / "shard-00001.tmp").exists()  # it might be resumed
        writer.clear()
        assert sorted(path.name for path in left.rglob("*")) == [".lock", "checkpoint"]
        writer.add("a", torch.ones(4))
        writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_written_is_readable_by_others_and_finite(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(4))
        with pytest.raises(WorkFailed, match=r"lm_head\.weight.*NaN or Inf"):
            writer.add("lm_head.weight", torch.tensor([1.0, float("inf")]))
        writer.finish()
    for path in (tmp_path / "out", *(tmp_path / "out").iterdir()):
        mode = stat.S_IMODE(path.stat().st_mode)
        reference = tmp_path / ("directory" if path.is_dir() else "file")
        reference.mkdir() if path.is_dir() else reference.touch()
        assert mode == stat.S_IMODE(reference.stat().st_mode)
