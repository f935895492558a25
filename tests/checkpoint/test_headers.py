"""safetensors headers: what is refused, and how it is said."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from quant.checkpoint.headers import MAX_HEADER_BYTES, read_header
from quant.errors import RequestError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """GOOD with other fields in one of its tensors; None takes a field away."""
    entry = {k: v for k, v in {**GOOD[name], **fields}.items() if v is not None}
    return {**GOOD, name: entry}


REFUSALS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "header is not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "header is not valid JSON.*utf-8"),
    "no object": (b"[1, 2]", "not an object"),
    "NaN": (b'{"__metadata__": {"x": NaN}}', "NaN is no JSON number"),
    "nested": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "long integer": (b'{"a": ' + b"9" * 5000 + b"}", "integer beyond 64 bits"),
    "key twice": (b'{"a": {}, "a": {}}', "'a' occurs twice"),
    "metadata": ({**GOOD, "__metadata__": []}, "__metadata__ is"),
    "metadata value": ({**GOOD, "__metadata__": {"k": 1}}, "__metadata__ 'k' is 1, not a string"),
    "entry": ({**GOOD, "b": 7}, "tensor b is described by 7"),
    "field missing": (changed("b", shape=None), "tensor b is described by"),
    "field unknown": (changed("b", strides=[1]), "tensor b is described by.*strides"),
    "dtype": (changed("b", dtype="F12"), "tensor b: dtype 'F12' is none of"),
    "dtype list": (changed("b", dtype=["F32"]), "tensor b: dtype"),
    "shape no list": (changed("b", shape="4"), "tensor b: shape '4' is not a list"),
    "shape negative": (changed("b", shape=[-2, -2]), "tensor b: shape"),
    "shape bool": (changed("b", shape=[True, 4]), "tensor b: shape"),
    "shape float": (changed("b", shape=[4.0]), "tensor b: shape"),
    "shape long": (changed("b", shape=[1] * 65), "tensor b: shape has 65 dimensions"),
    "shape huge": (changed("b", shape=[0, 2**60]), "tensor b: shape.*too large"),
    "shape lies": (changed("b", shape=[5]), r"tensor b: data_offsets span 8 bytes.*takes 10"),
    "dtype lies": (changed("b", dtype="F32"), r"tensor b: data_offsets span 8 bytes.*takes 16"),
    "half a byte": (changed("b", dtype="F4", shape=[3]), "tensor b: .*takes 1.5"),
    "offsets no list": (changed("b", data_offsets=24), "tensor b: data_offsets 24 are not"),
    "one offset": (changed("b", data_offsets=[24]), "tensor b: data_offsets"),
    "offsets bool": (changed("b", data_offsets=[False, 8]), "tensor b: data_offsets"),
    "offsets negative": (changed("a", data_offsets=[-24, 0]), "tensor a: data_offsets"),
    "offsets swapped": (changed("b", data_offsets=[32, 24]), "tensor b: data_offsets"),
    "overlap": (changed("b", data_offsets=[20, 28]), "tensors a and b overlap.*24.*20"),
    "same bytes": (
        {**GOOD, "c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}},
        "tensors b and c overlap",
    ),
    "hole": (
        {**GOOD, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [26, 32]}},
        "tensor b: data_offsets start at 26.*tensor a before it ends at 24",
    ),
    "far away": (changed("a", data_offsets=[2**62, 2**62 + 24]), "tensor a ends .* after the end"),
    "on another": (changed("a", data_offsets=[8, 32]), "tensors a and b overlap"),
    "hole in front": ({"b": GOOD["b"]}, "tensor b: data_offsets start at 24.*nothing lies before"),
    "name": ({**GOOD, "b\x1b[2J": GOOD["b"]}, "tensor name.*cannot be printed"),
    "surrogate": (b'{"\\ud800": {}}', "tensor name.*cannot be printed"),
    "long name": ({"n" * 600: GOOD["b"]}, "tensor name.*longer than 512"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_header_that_lies_is_refused_by_file_and_field(case: str, tmp_path: Path) -> None:
    header, message = REFUSALS[case]
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(RequestError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            bytes(31),
            "tensor b ends 1 bytes after the end of the file.*truncated.*download it again",
        ),
        (b"", "tensor b ends 32 bytes after the end of the file"),
        (bytes(35), "3 trailing bytes belong to no tensor"),
    ],
)
def test_data_of_another_length(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        read_header(write(tmp_path / "x.safetensors", GOOD, data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header length is 3 bytes, but the file has only 10"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header length is 18,446,744,073,709,551,615"),
    ],
)
def test_length_field_that_lies(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_header_of_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000))
    os.truncate(path, 100_000_008)  # sparse: it takes no room, and would be zeros to read
    started = time.perf_counter()
    with pytest.raises(RequestError, match=f"100,000,000 bytes; at most {MAX_HEADER_BYTES:,}"):
        read_header(path)
    assert time.perf_counter() - started < 0.05


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_refused_and_does_not_block(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="not a regular file"):
        read_header(tmp_path / "x.safetensors")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"x\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "x.safetensors")


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"k": "v"}, "b": GOOD["b"]} | GOOD)
    header = read_header(path)
    assert header.size == path.stat().st_size == header.data_start + 32
    assert list(header.tensors) == ["a", "b"]  # in the order of their bytes
    info = header.tensors["b"]
    assert (info.dtype, info.shape) == ("BF16", (4,))
    assert (info.start, info.stop) == (header.data_start + 24, header.data_start + 32)
    assert read_header(write(path, {}, b"")).tensors == {}
