"""Checkpoints: bytes that arrive as they were, files that change, what belongs to a decoder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant.checkpoint.tensor_bytes as tensor_bytes
from quant.checkpoint.headers import read_header
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.errors import RequestError, WorkFailed


def samples() -> dict[str, torch.Tensor]:
    """A tensor of every type that torch can save, of random bits, and of odd shapes."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, dtype in tensor_bytes.TORCH_DTYPES.items():
        raw = torch.randint(0, 256, (3 * 7 * 8,), dtype=torch.uint8, generator=generator)
        raw = raw & 1 if dtype is torch.bool else raw
        found[name] = raw.view(dtype).reshape(3, 7, -1)
    found["scalar"] = torch.tensor(1.5)
    found["empty"] = torch.empty(0, 5)
    found["odd"] = torch.ones(3, dtype=torch.uint8)  # what follows starts at no multiple of 2
    found["row"] = torch.arange(1000, dtype=torch.int32)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def reader_of(tiny_checkpoint: Any, tmp_path: Path) -> Callable[..., CheckpointReader]:
    """Tensors -> a reader of a directory with only them; its config.json is a llama's."""

    def make(tensors: dict[str, torch.Tensor]) -> CheckpointReader:
        config = (tiny_checkpoint("llama") / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return CheckpointReader(tmp_path)

    return make


def test_every_type_is_read_as_safetensors_reads_it(reader_of: Any, monkeypatch: Any) -> None:
    reader = reader_of(samples())
    theirs = load_file(reader.directory / "model.safetensors")
    assert reader.names == set(theirs) == set(samples())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: real(file, [views[0][:13]], at))
    for name, tensor in theirs.items():
        ours = reader.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert bits(ours) == bits(tensor), name
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.nbytes(name) == len(bits(tensor))


@pytest.mark.parametrize("max_bytes", [1, 56, 100, 10**6])
def test_rows_and_chunks_are_the_tensor(max_bytes: int, reader_of: Any) -> None:
    reader = reader_of(samples())
    for name, tensor in samples().items():
        parts = list(reader.chunks(name, max_bytes))
        assert bits(torch.cat(parts) if tensor.ndim else parts[0]) == bits(tensor)
        row_bytes = len(bits(tensor[:1])) if tensor.ndim else 4
        assert all(len(bits(part)) <= max(max_bytes, row_bytes) for part in parts)
        if tensor.ndim == 3:
            assert bits(reader.rows(name, 1, 3)) == bits(tensor[1:3])
    with pytest.raises(ValueError, match=r"rows 2\.\.4 of F32"):
        reader.rows("F32", 2, 4)


def test_a_type_that_torch_has_not_is_not_read(reader_of: Any) -> None:
    directory = reader_of({"w": torch.ones(5)}).directory
    header = b'{"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    content = len(header).to_bytes(8, "little") + header + b"12"
    (directory / "model.safetensors").write_bytes(content)
    reader = CheckpointReader(directory)
    assert (reader.dtype("w"), reader.nbytes("w")) == ("F4", 2)
    with pytest.raises(RequestError, match=r"tensor w has type F4, which is not read"):
        reader.read("w")


def test_a_name_that_is_not_there_is_named(reader_of: Any) -> None:
    reader = reader_of({"w": torch.ones(5)})
    for ask in (reader.read, reader.shape, reader.dtype, reader.nbytes):
        with pytest.raises(RequestError, match=r"model\.safetensors has no tensor ghost"):
            ask("ghost")
    with pytest.raises(RequestError, match="its tokenizer does not load"):
        load_tokenizer(reader.directory)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_shrinks_is_reported_and_kills_nobody(
    when: str, reader_of: Any, monkeypatch: Any
) -> None:
    reader = reader_of({"w": torch.ones(100, 100), "x": torch.ones(5)})
    path = reader.directory / "model.safetensors"
    real = os.preadv

    def truncating(file: int, views: Any, at: int) -> int:
        os.truncate(path, 1000)
        return real(file, views, at)

    if when == "before":
        os.truncate(path, 1000)
    else:
        monkeypatch.setattr(os, "preadv", truncating)
    with pytest.raises(WorkFailed, match=r"model\.safetensors: tensor w: .*truncated while"):
        reader.read("w")


@pytest.mark.parametrize("how", ["rewritten", "gone"])
def test_a_file_that_is_another_by_now_is_reported(how: str, reader_of: Any) -> None:
    reader = reader_of({"w": torch.ones(5)})
    path = reader.directory / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if how == "rewritten":
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))
    with pytest.raises(WorkFailed, match=r"model\.safetensors: tensor w"):
        reader.read("w")
    reader.will_need(["w"])  # only a hint


def test_opening_reads_no_tensor_and_reading_ahead_changes_none(
    reader_of: Any, monkeypatch: Any
) -> None:
    def never(*_: Any) -> int:
        raise AssertionError("a tensor was read")

    real = os.preadv
    monkeypatch.setattr(os, "preadv", never)
    reader = reader_of(samples())
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _f, at, size, _: asked.append((at, size)))
    reader.will_need(["row", "F32"])
    info = read_header(reader.directory / "model.safetensors").tensors
    assert asked == [(info[n].start, info[n].stop - info[n].start) for n in ("row", "F32")]
    monkeypatch.setattr(os, "preadv", real)
    assert bits(reader.read("row")) == bits(samples()["row"])
    monkeypatch.delattr(os, "posix_fadvise")
    reader.will_need(["row"])


# The one pass over every byte.


def test_inspection_hashes_every_file_and_counts_every_byte(tiny_checkpoint: Any) -> None:
    reader = CheckpointReader(tiny_checkpoint("qwen2"))
    names = [path.name for path in reader.files]
    assert names == [
        "config.json",
        "model.safetensors.index.json",
        *sorted(path.name for path in reader.directory.glob("*.safetensors")),
    ]
    counted: list[int] = []
    found = reader.inspect_source(counted.append)
    assert sum(counted) == sum(path.stat().st_size for path in reader.files)
    assert list(found) == names
    for name, digest in found.items():
        content = (reader.directory / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inspection_counts_what_is_not_finite(
    dtype: torch.dtype, piece: int, reader_of: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tensor_bytes, "INSPECT_BYTES", piece)
    # Every pattern of 16 bits, in the high half where there are 32; the low half is random.
    low = torch.randint(-(2**15), 2**15, (65536,), generator=torch.Generator().manual_seed(1))
    high = torch.arange(-(2**15), 2**15)
    if dtype == torch.float32:
        values = ((high << 16) | (low & 0xFFFF)).to(torch.int32).view(dtype)
    else:
        values = high.to(torch.int16).view(dtype)
    reader = reader_of({"fine": values[values.isfinite()], "n": torch.full((9,), -1)})
    reader.inspect_source(lambda _: None)
    bad = int((~values.isfinite()).sum())
    assert bad > 200
    reader = reader_of({"fine": torch.ones(3), "some.weight": values})
    message = rf"model\.safetensors: tensor some\.weight holds {bad:,} NaN or Inf"
    with pytest.raises(RequestError, match=message):
        reader.inspect_source(lambda _: None)


# What belongs to a decoder, and what does not.


@pytest.fixture
def edited(tiny_checkpoint: Any, tmp_path: Path) -> Callable[..., CheckpointReader]:
    """Changes to a tiny llama's tensors (None: taken away) and config -> its reader."""

    def make(tensors: dict[str, Any], kind: str = "llama", **config: Any) -> CheckpointReader:
        source = tiny_checkpoint(kind)
        all_config = json.loads((source / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(all_config))
        state = {**load_file(source / "model.safetensors"), **tensors}
        save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "model.safetensors")
        return CheckpointReader(tmp_path)

    return make


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"lm_head.bias": ones(5)}, {}, r"would be lost: lm_head\.bias\. Correct config\.json"),
        (
            {f"x{i}": ones(1) for i in range(5)},
            {},
            r"model\.safetensors holds .* would be lost: x0, x1, x2 and 2 more",
        ),
        ({}, {"num_hidden_layers": 1}, r"would be lost: model\.layers\.1\..* and 6 more"),
        ({}, {"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\..*config\.json"),
        ({}, {"attention_bias": True}, r"has no tensor model\.layers\.0.*q_proj\.bias.*config"),
        ({UP: None}, {}, rf"has no tensor {re.escape(UP)} \(expected \[256, 128\]"),
        ({UP: ones(128, 256)}, {}, r"is \[128, 256\], but config\.json makes it \[256, 128\]"),
        (
            {UP: ones(256, 128, dtype=torch.float8_e4m3fn)},
            {},
            r"has type F8_E4M3.*FP8 weights are not read; give the BF16 checkpoint",
        ),
        ({UP: ones(16, 128, dtype=torch.int32)}, {}, "has type I32.*already quantized.*original"),
        ({UP: ones(256, 128, dtype=torch.float64)}, {}, "has type F64.*convert it to F32"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(fp8\)"),
        ({}, {"quantization_config": {"bits": 4}}, "already quantized"),
    ],
)
def test_what_is_not_the_decoder_of_the_config_is_refused(
    tensors: dict[str, Any], config: dict[str, Any], message: str, edited: Any
) -> None:
    with pytest.raises(RequestError, match=message):
        edited(tensors, **config).check_dense()


def test_what_only_repeats_the_config_may_be_there(edited: Any) -> None:
    edited({"model.layers.0.self_attn.rotary_emb.inv_freq": ones(16)}).check_dense()


def test_a_tied_head_is_compared_in_chunks(edited: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(CheckpointReader.chunks, "__defaults__", (1000,))
    embedding = edited({}, "llama-tied").read("model.embed_tokens.weight")
    edited({"lm_head.weight": embedding.clone()}, "llama-tied").check_dense()
    edited({"lm_head.weight": embedding.float()}, "llama-tied").check_dense()
    last = embedding.clone()
    last[-1, -1] += 1
    for head in (last, last.float(), embedding[:-1].clone()):
        with pytest.raises(RequestError, match=r"lm_head\.weight differs from the embedding"):
            edited({"lm_head.weight": head}, "llama-tied").check_dense()


# The index.


@pytest.fixture
def indexed(tiny_checkpoint: Any, tmp_path: Path) -> Callable[..., Path]:
    """A function of the index -> a directory of three shards and what the function left of it."""

    def make(spoil: Callable[[dict[str, Any]], Any]) -> Path:
        for path in tiny_checkpoint("qwen2").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        index = json.loads((tmp_path / INDEX).read_text())
        spoil(index)
        (tmp_path / INDEX).write_text(json.dumps(index))
        return tmp_path

    return make


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def points_to(file: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].__setitem__(NORM, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (points_to("../model-00001-of-00003.safetensors"), "points outside its directory"),
        (points_to("/etc/x.safetensors"), "points outside its directory"),
        (points_to(".."), "points outside its directory"),
        (points_to(""), "points outside its directory"),
        (points_to("a\0.safetensors"), "points outside its directory"),
        (points_to("x.safetensors"), "names 'x.safetensors', which is not there"),
        (points_to("\ud800.safetensors"), "which is not there"),
        (points_to("x" * 5000 + ".safetensors"), "which is not there"),
        (points_to("config.json"), "'config.json', which is no \\*.safetensors file"),
        (points_to(["x"]), "weight_map has .* for 'model.norm.weight'"),
        (lambda index: index.pop("weight_map"), "no 'weight_map' object"),
        (lambda index: index.update(weight_map=[]), "no 'weight_map' object"),
        (
            lambda index: index["weight_map"].pop(NORM),
            rf"holds tensor {NORM}, but .*{INDEX} does not list it",
        ),
        (
            lambda index: index["weight_map"].update(ghost=index["weight_map"][NORM]),
            f"has no tensor 'ghost', but .*{INDEX} says so",
        ),
    ],
)
def test_an_index_that_is_not_its_shards_is_refused(spoil: Any, message: str, indexed: Any) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        CheckpointReader(indexed(spoil))
    assert INDEX in str(caught.value)
    str(caught.value).encode()  # printable anywhere


def test_a_shard_that_holds_another_shards_tensor_is_refused(indexed: Any) -> None:
    directory = indexed(lambda _: None)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    state = load_file(directory / other)
    save_file({**state, NORM: torch.ones(128)}, directory / other)
    with pytest.raises(RequestError, match=rf"{other} holds tensor {NORM}, but .*looks for it in"):
        CheckpointReader(directory)


def test_links_as_in_the_hubs_cache_are_followed(tiny_checkpoint: Any, tmp_path: Path) -> None:
    for path in tiny_checkpoint("qwen2").iterdir():
        (tmp_path / path.name).symlink_to(path)
    CheckpointReader(tmp_path).check_dense()


@pytest.mark.parametrize(("name", "limit"), [(INDEX, 64 << 20), ("config.json", 16 << 20)])
def test_json_files_of_absurd_size_are_refused_unread(name: str, limit: int, indexed: Any) -> None:
    directory = indexed(lambda _: None)
    os.truncate(directory / name, limit + 1)
    started = time.perf_counter()
    with pytest.raises(RequestError, match=rf"{re.escape(name)} has {limit + 1:,} bytes"):
        CheckpointReader(directory)
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": [-Infinity]}', "-Infinity is no JSON number"),
        ('{"a": ' + "9" * 21 + "}", "integer beyond 64 bits"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "'a' is nested deeper than 64"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not an object"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_parsers_disagree_about_is_refused(text: str, message: str, indexed: Any) -> None:
    directory = indexed(lambda _: None)
    for name in (INDEX, "config.json"):  # config.json is read first, so it is spoiled last
        (directory / name).write_text(text)
        with pytest.raises(RequestError, match=message) as caught:
            CheckpointReader(directory)
        assert name in str(caught.value)


def test_a_pipe_in_the_place_of_config_json_does_not_block(indexed: Any) -> None:
    directory = indexed(lambda _: None)
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    with pytest.raises(RequestError, match=r"config\.json is not a regular file"):
        CheckpointReader(directory)


def test_json_that_cannot_be_read_is_named(indexed: Any, monkeypatch: Any) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    directory = indexed(lambda _: None)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(RequestError, match=r"config\.json cannot be read: Permission denied"):
        CheckpointReader(directory)


@pytest.mark.parametrize("how", ["device", "gone"])
def test_a_disk_that_fails_is_reported(how: str, reader_of: Any, monkeypatch: Any) -> None:
    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    reader = reader_of({"w": torch.ones(5)})
    monkeypatch.setattr(os, "preadv" if how == "device" else "open", broken)
    with pytest.raises(WorkFailed, match=r"model\.safetensors: tensor w: Input/output error"):
        reader.read("w")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"has no config\.json"),
        ("{}", r"config\.json has no 'model_type'"),
        ('{"model_type": ["llama"]}', r"config\.json: model_type is \['llama'\], not a string"),
        ('{"model_type": "gpt_neox"}', r"config\.json: model_type 'gpt_neox' is not supported"),
        ('{"model_type": "llama"}', r"has no \*\.safetensors file"),
    ],
)
def test_a_directory_that_is_no_checkpoint(
    config: str | None, message: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(RequestError, match=message):
        CheckpointReader(tmp_path)
