"""Sources: read as transformers reads them, or refused before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from quant.calibration.quantize import quantize
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.source import resolve_model
from quant.errors import RequestError


def test_sharded_source_reads_as_transformers_reads_it(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    directory = tiny_checkpoint("qwen2")
    assert len(list(directory.glob("*.safetensors"))) > 1
    reader = CheckpointReader(directory)
    state = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
    assert reader.names == set(state)
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(name), tensor)


def without_a_shard(directory: Path) -> None:
    next(iter(sorted(directory.glob("*.safetensors")))).unlink()


def with_an_index_that_points_outside(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../model.safetensors"
    index.write_text(json.dumps(content))


def without_the_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def with_pickles_only(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))


def with_a_truncated_shard(directory: Path) -> None:
    path = next(iter(sorted(directory.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-100])


def with_broken_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_shard, "names 'model-00001-of-00003.safetensors', which is not there"),
        (with_an_index_that_points_outside, "points outside its directory"),
        (without_the_index, "without an index"),
        (with_pickles_only, "pickles.*convert them to safetensors"),
        (with_a_truncated_shard, "not a readable safetensors file"),
        (with_broken_json, "not valid JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_sources_are_refused_before_anything_is_written(
    spoil, message, tiny_checkpoint, calibration, tmp_path
):
    directory = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model")
    spoil(directory)
    with pytest.raises(RequestError, match=message):
        quantize(str(directory), tmp_path / "out", device="cpu", **calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_source_that_is_not_there_or_not_a_directory_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no such directory or file"):
        resolve_model(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="is a file; give its directory"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "fake.gguf").write_bytes(b"GGML0000")
    with pytest.raises(RequestError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "fake.gguf"))
