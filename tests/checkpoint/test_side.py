"""The side file comes back as it was written, and whatever is wrong in it is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint.inspection import inspect_checkpoint
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.side import (
    SIDE_TENSORS,
    Side,
    key_names,
    read_side,
    side_keys,
    write_side_tensors,
)
from quant.checkpoint.writer import CheckpointWriter
from quant.decoder import KeyTransform
from quant.errors import RequestError, WorkFailed
from quant_kernels.kv4 import KVFormat

SHAPE = (2, 32)  # KV heads and head_dim of the tiny checkpoints


def random_keys(layers: int = 2) -> tuple[KeyTransform, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(
        KeyTransform(
            torch.randn(SHAPE, generator=generator).exp(), torch.randn(SHAPE, generator=generator)
        )
        for _ in range(layers)
    )


def write_side(directory: Path, side: Side, **changes: Any) -> None:
    path = directory / "fourbyeight.json"
    found = json.loads(path.read_text()) if path.is_file() else {"format_version": 1}
    path.write_text(json.dumps({**found, **side_keys(side), **changes}))
    write_side_tensors(directory, side)


@pytest.fixture
def dense(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "dense"))


@pytest.fixture
def packed(quantized_case: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_case("lut-128").output, tmp_path / "packed"))


@pytest.mark.parametrize("which", ["dense", "packed"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_comes_back_and_reaches_the_decoder(
    which: str, symmetric: bool, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    before = load_decoder(directory)
    assert before.kv is None
    assert all(block.keys is None for block in before.blocks)
    keys = random_keys()
    write_side(directory, Side(KVFormat(symmetric=symmetric), keys))
    decoder = load_decoder(directory)
    assert decoder.kv == KVFormat(symmetric=symmetric)
    for block, wanted in zip(decoder.blocks, keys, strict=True):
        assert block.keys is not None
        assert torch.equal(block.keys.scale, wanted.scale)
        assert torch.equal(block.keys.shift, wanted.shift)


@pytest.mark.parametrize("which", ["dense", "packed"])
def test_other_readers_of_the_directory_do_not_see_it(
    which: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    names, rows = CheckpointReader(directory).names, inspect_checkpoint(directory).layers
    size = CheckpointReader(directory).size_bytes()
    write_side(directory, Side(KVFormat(), random_keys()))
    reader = CheckpointReader(directory)
    assert reader.names == names
    assert reader.size_bytes() == size
    assert SIDE_TENSORS not in {path.name for path in reader.files}
    assert inspect_checkpoint(directory).layers == rows
    if which == "dense":
        reader.check_dense()


def test_transformers_loads_a_checkpoint_with_a_side_file(dense: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_side(dense, Side(KVFormat(), random_keys()))
    _, info = AutoModelForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not any(info.values())


def test_without_key_transforms_there_is_no_file(dense: Path) -> None:
    write_side(dense, Side(KVFormat()))
    assert not (dense / SIDE_TENSORS).exists()
    assert read_side(dense, CheckpointReader(dense).config) == Side(KVFormat())


@pytest.mark.parametrize("found", [{}, {"kv_cache": None, "side_tensors": None}])
def test_nothing_said_is_nothing_done(dense: Path, found: dict[str, Any]) -> None:
    (dense / "fourbyeight.json").write_text(json.dumps({"format_version": 1, **found}))
    assert read_side(dense, CheckpointReader(dense).config) == Side()


def test_the_file_is_written_with_the_checkpoint_or_not_at_all(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("x", torch.zeros(3))
        write_side_tensors(writer.directory, Side(KVFormat(), random_keys()))
        assert not (tmp_path / "out").exists()
        writer.finish()
    assert set(load_file(tmp_path / "out" / SIDE_TENSORS)) == {*key_names(0), *key_names(1)}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"x"}


def test_a_transform_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    keys = random_keys()
    keys[1].shift[0, 3] = torch.nan
    with pytest.raises(WorkFailed, match=r"layers\.1\.self_attn\.key_shift"):
        write_side_tensors(tmp_path, Side(KVFormat(), keys))
    assert not (tmp_path / SIDE_TENSORS).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "kv4"}, r"kv_cache is 'kv4'"),
        ({"kv_cache": {"scheme": "kv8"}}, r"kv_cache\.scheme is 'kv8'; only 'kv4'"),
        ({"kv_cache": {}}, r"kv_cache\.scheme is None"),
        ({"kv_cache": {"scheme": "kv4", "symmetric": 1}}, r"kv_cache\.symmetric is 1"),
        ({"kv_cache": {"scheme": "kv4", "group_size": 32}}, r"kv_cache has the key 'group_size'"),
        ({"kv_cache": None}, r"side_tensors is 'fourbyeight\.safetensors', but kv_cache is null"),
        ({"side_tensors": "../x.safetensors"}, r"side_tensors is '\.\./x\.safetensors'; only"),
        ({"side_tensors": 7}, r"side_tensors is 7"),
        ({"format_version": 2}, r"format_version 2"),
    ],
)
def test_a_bad_value_names_file_and_key(dense: Path, changes: Any, message: str) -> None:
    write_side(dense, Side(KVFormat(), random_keys()), **changes)
    with pytest.raises(RequestError, match=rf"fourbyeight\.json: {message}"):
        load_decoder(dense)


def test_a_missing_file_is_named(dense: Path) -> None:
    write_side(dense, Side(KVFormat(), random_keys()))
    (dense / SIDE_TENSORS).unlink()
    with pytest.raises(RequestError, match=r"side_tensors names 'fourbyeight\.safetensors'"):
        load_decoder(dense)


SCALE, SHIFT = key_names(1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (SCALE, None, r"no tensor model\.layers\.1\.self_attn\.key_scale \(expected F32 \[2, 32\]"),
        (SHIFT, None, r"no tensor model\.layers\.1\.self_attn\.key_shift"),
        (SCALE, torch.ones(32, 2), r"key_scale is F32 \[32, 2\], .*F32 \[2, 32\]"),
        (SCALE, torch.ones(SHAPE).bfloat16(), r"key_scale is BF16"),
        (SCALE, torch.zeros(SHAPE), r"key_scale holds 0"),
        (SCALE, torch.full(SHAPE, torch.nan), r"key_scale holds NaN or Inf"),
        (SHIFT, torch.full(SHAPE, torch.inf), r"key_shift holds NaN or Inf"),
        ("model.layers.2.self_attn.key_scale", torch.ones(SHAPE), r"layers\.2\..*of 2 layers"),
    ],
)
def test_a_bad_tensor_is_named(dense: Path, name: str, value: Any, message: str) -> None:
    write_side(dense, Side(KVFormat(), random_keys()))
    path = dense / SIDE_TENSORS
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, path)
    with pytest.raises(RequestError, match=rf"fourbyeight\.safetensors.*{message}"):
        load_decoder(dense)


def test_a_truncated_file_is_refused(dense: Path) -> None:
    write_side(dense, Side(KVFormat(), random_keys()))
    path = dense / SIDE_TENSORS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RequestError, match=r"fourbyeight\.safetensors"):
        load_decoder(dense)
