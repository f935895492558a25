"""`quantize run` on checkpoints that are broken: one screen that says where, and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant import cli

SCREEN = 24  # lines
INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
Spoil = Callable[[Path], None]


def shard_of(model: Path, name: str = NAME) -> Path:
    return model / json.loads((model / INDEX).read_text())["weight_map"][name]


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_tensor(edit: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(model: Path) -> None:
        shard = shard_of(model)
        tensors = load_file(shard)
        tensors[NAME] = edit(tensors[NAME])
        save_file(tensors, shard, metadata={"format": "pt"})

    return spoil


def edit_header(edit: Callable[[dict[str, Any]], None]) -> Spoil:
    """Change the header of NAME's shard and leave the data."""

    def spoil(model: Path) -> None:
        shard = shard_of(model)
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def poison(value: float) -> Spoil:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return edit_tensor(edit)


def overlap(header: dict[str, Any]) -> None:
    first, second = [name for name in header if not name.startswith("__")][:2]
    start = header[first]["data_offsets"][0]
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [start, start + size]


def lie(header: dict[str, Any]) -> None:
    header[NAME]["shape"] = [2 * n for n in header[NAME]["shape"]]


def truncate(model: Path) -> None:
    os.truncate(shard_of(model), shard_of(model).stat().st_size - 100)


def header_of_100_mb(model: Path) -> None:
    with shard_of(model).open("r+b") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(200 << 20)  # sparse: the file is as long as the header says


def point_outside(model: Path) -> None:
    edit_json(model / INDEX, lambda index: index["weight_map"].update({NAME: "../secret"}))


BROKEN: dict[str, tuple[Spoil, str]] = {
    "missing shard": (lambda model: shard_of(model).unlink(), "not there"),
    "truncated shard": (truncate, "100 bytes"),
    "overlapping tensors": (edit_header(overlap), "overlap"),
    "lying shape": (edit_header(lie), NAME),
    "header of 100 MB": (header_of_100_mb, "104,857,600"),
    "index that leaves the directory": (point_outside, "../secret"),
    "NaN": (poison(float("nan")), NAME),
    "Inf": (poison(float("-inf")), NAME),
    "integer weights": (edit_tensor(lambda t: t.to(torch.int8)), "I8"),
    "FP8 weights": (edit_tensor(lambda t: t.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "vocabulary of another size": (
        lambda model: edit_json(model / "config.json", lambda c: c.update(vocab_size=300)),
        "model.embed_tokens.weight",
    ),
    "one layer more than config.json says": (
        lambda model: edit_json(model / "config.json", lambda c: c.update(num_hidden_layers=1)),
        "model.layers.1",
    ),
    "one layer fewer": (
        lambda model: edit_json(model / "config.json", lambda c: c.update(num_hidden_layers=3)),
        "model.layers.2",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_source_is_refused_on_one_screen_and_leaves_nothing(
    what: str,
    tiny_checkpoint: Any,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil, message = BROKEN[what]
    model = Path(shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model"))
    edit_json(model / "config.json", lambda c: c.pop("layer_types", None))  # has one per layer
    spoil(model)
    options = ["--dataset", calibration_text, "--num-calibration-samples", 4]
    options += ["--max-seq-length", 32, "--group-size", 32, "--device", "cpu"]
    arguments = ["quantize", "run", model, "-o", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capfd.readouterr().err
    assert ended.value.code == 2, err
    assert 0 < len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert message in "".join(err.split("\n")), err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
