"""10,000 broken checkpoints: each is read, or refused by the name of what is wrong with it.

Every case is a whole, valid, tiny checkpoint in which one file is changed in one place. The fuzzer
knows the place, and judges twice:

- by an oracle of its own, in plain Python, where there is one: this change must be refused, this
  one must be read. A reader that refuses everything, or believes everything, fails.
- by the message: it names the file and the field that was changed, or another field that no longer
  agrees with it (`AGREES`, `CONTRADICTION`: only for fields that tensors' shapes follow from).
"""

from __future__ import annotations

import copy
import gc
import json
import math
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quant.checkpoint.hf_config import decoder_config
from quant.checkpoint.reader import CheckpointReader
from quant.errors import RequestError
from quant.memory import peak_memory_bytes, reset_peak_memory, resident_bytes

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a case is one change: there is nothing to shrink
)
SECONDS = 2.0  # for a case; milliseconds are usual
# Python's memory during a case: a constant for what json, paths and transformers take, and a
# multiple of the changed file. Traced in every 25th case, because tracing is slow; torch's memory,
# which it does not see, is in the growth of the process during the case.
TRACED_BYTES, TRACED_TIMES, TRACED_EVERY = 512 << 10, 50, 25
GROWTH_BYTES = 32 << 20
# Errors with their tracebacks are cycles, which a process with much else in it seldom collects.
COLLECTED_EVERY = 250

Keys = tuple[str, ...]  # that lead to a field

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": ["full_attention", "full_attention"],
    "quantization_config": None,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "num_labels": 2,
    "torch_dtype": "bfloat16",
}
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

# Fields that the tensors' names and shapes follow from, so that no other value fits the tensors.
FIXED = {key for key in CONFIG if key.endswith(("_size", "_layers", "_heads", "_dim", "_bias"))}
FIXED |= {"tie_word_embeddings"}
IGNORED = {"num_labels", "torch_dtype"}
REQUIRED = FIXED - {"head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"}
REQUIRED |= {"model_type", "rms_norm_eps"}
# What may be named in place of a field, because it contradicts the changed one.
AGREES = {
    "num_hidden_layers": ("layer_types",),
    "hidden_size": ("num_attention_heads",),
    "num_attention_heads": ("num_key_value_heads", "hidden_size"),
    "num_key_value_heads": ("num_attention_heads",),
    "quantization_config": ("already quantized",),
    "rope_parameters": ("rope_type",),
}
CONTRADICTION = re.compile(r"tensor \S+ .*config\.json|config\.json does not describe")


@dataclass
class Checkpoint:
    """A valid directory: its index, and per shard the header and the data; and all files' bytes."""

    directory: Path
    index: dict[str, Any]
    headers: dict[str, dict[str, Any]]
    data: dict[str, bytes]
    content: dict[str, bytes]


@dataclass
class Tally:
    """What became of the cases of a test."""

    read: int = 0
    refused: int = 0

    @property
    def cases(self) -> int:
        return self.read + self.refused


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def with_header(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("fuzz")
    cfg = decoder_config(CONFIG, Path("config.json"))
    shapes = dict(cfg.outer_shapes())
    for layer in range(cfg.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": s for name, s in cfg.block_shapes().items()}
    names = sorted(shapes)
    parts = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :]), strict=True))
    found = Checkpoint(directory, {"metadata": {}, "weight_map": {}}, {}, {}, {})
    for file, part in parts.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in part:
            offsets = [end, end + 2 * math.prod(shapes[name])]
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": offsets}
            end = offsets[1]
        found.headers[file], found.data[file] = header, bytes(end)
        found.content[file] = with_header(encode(header), bytes(end))
        found.index["weight_map"] |= dict.fromkeys(part, file)
    found.content |= {"config.json": encode(CONFIG), INDEX: encode(found.index)}
    for file, text in found.content.items():
        (directory / file).write_bytes(text)
    CheckpointReader(directory).check_dense()
    return found


def judge(
    checkpoint: Checkpoint,
    tally: Tally,
    file: str,
    content: bytes,
    wanted: bool | None,
    named: Callable[[str], bool],
) -> None:
    """The property, with another content of one file. wanted: read or refused; None: either."""
    path = checkpoint.directory / file
    path.write_bytes(content)
    if tally.cases % COLLECTED_EVERY == 0:
        gc.collect()
    traced = tally.cases % TRACED_EVERY == 0
    if traced:
        tracemalloc.start()
    message = None
    reset_peak_memory()
    # The peak is the process's where it may not be reset.
    before = max(resident_bytes(), peak_memory_bytes())
    started = time.perf_counter()
    try:
        CheckpointReader(checkpoint.directory).check_dense()
    except RequestError as error:
        message = str(error)
    finally:
        seconds = time.perf_counter() - started
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.write_bytes(checkpoint.content[file])
    assert seconds < SECONDS
    assert peak_memory_bytes() - before < GROWTH_BYTES
    assert peak < TRACED_BYTES + TRACED_TIMES * len(content)
    if message is None:
        tally.read += 1
        assert wanted is not False, "it was read"
        return
    tally.refused += 1
    assert wanted is not True, message
    assert file in message, message
    assert named(message.replace(str(checkpoint.directory), "")), message
    assert len(message) < 2500
    message.encode()


def fuzz(cases: int, case: Callable[..., None], **strategies: Any) -> None:
    settings(FUZZ, max_examples=cases)(given(**strategies)(case))()


def changed(parsed: dict[str, Any], field: Keys, how: str, value: Any) -> bytes:
    """A JSON object's text with one field deleted, given twice, nested deep, or replaced."""
    root = copy.deepcopy(parsed)
    inside = root
    for key in field[:-1]:
        inside = inside[key]
    if how == "delete":
        del inside[field[-1]]
        return encode(root)
    inside[field[-1]] = "@here@"
    text, key = json.dumps(root), json.dumps(field[-1])
    if how == "twice":
        return text.replace(f'{key}: "@here@"', f"{key}: 1, {key}: 1").encode()
    return text.replace('"@here@"', NESTED if how == "nest" else json.dumps(value)).encode()


def beyond_json(value: Any) -> bool:
    """Whether a number in it, not a text, is NaN, infinite, or an integer beyond 64 bits."""

    def refuse(literal: str) -> None:
        raise ValueError(literal)

    def integer(literal: str) -> int:
        if len(literal) > 20:
            raise ValueError(literal)
        return int(literal)

    try:
        json.loads(json.dumps(value), parse_constant=refuse, parse_int=integer)
    except ValueError:
        return True
    return False


def json_is_to_blame(message: str, how: str, value: Any) -> bool:
    """Whether the message is the JSON parser's, about what this change did to the text."""
    no_json = how == "replace" and beyond_json(value)
    return (
        (how == "nest" and "nested" in message)
        or (how == "twice" and "occurs twice" in message)
        or bool(no_json and re.search("is no JSON number|beyond 64 bits", message))
    )


def same(value: Any, original: Any) -> bool:
    """Equal and of the same types: neither True nor 1.0 is 1."""
    return repr(value) == repr(original)


NESTED = "[" * 3000 + "]" * 3000
PATHS = ["../x", "/etc/passwd", "..", ".", "", "a/b", "x\0y", "\ud800", "config.json", SHARDS[0]]
NUMBERS = [0, 1, 2, 3, 4, -1, 10**9, 2**31, 2**53, 2**63, -(10**18), 10**19, 10**40, 0.0, 0.5, -0.5]
NUMBERS += [1e-300, 1e300, 1e999, -1e999, float("nan"), 2.0, 4.0]
STRINGS = [
    "4",
    "silu",
    "gelu",
    "yarn",
    "linear",
    "mistral",
    "qwen2",
    "\x1b[2J",
    "ü" * 40,
    "x" * 5000,
]
OTHERS: list[Any] = [None, True, False, [], {}, [1], [[]], ["full_attention"], [0] * 3000]
OTHERS += [["sliding_attention", "full_attention"], {"a": {"b": 1}}, {"rope_type": "yarn"}]
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *STRINGS, *PATHS, *OTHERS]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.none() | st.booleans() | st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.integers()), max_size=3),
)
HOW = st.sampled_from(["replace"] * 12 + ["delete", "twice", "nest"])


def config_oracle(field: Keys, how: str, value: Any) -> bool | None:
    """Whether config.json with this change is to be read; None: the oracle does not know."""
    key = field[-1]
    if how == "delete":
        return False if key in REQUIRED else None
    if how != "replace" or beyond_json(value):
        return False
    number = type(value) in (int, float)
    if key in IGNORED or (key == "head_dim" and value is None):
        return True
    if key in FIXED:
        return same(value, CONFIG[key])
    if key == "rms_norm_eps":
        return number and 0 < value < 1
    if key == "max_position_embeddings":
        return type(value) is int and 0 < value < 2**31
    if key == "hidden_act":
        return bool(value == "silu")
    if len(field) == 2 and key != "rope_type" and value is not None and not (number and value > 0):
        return False
    return None


def test_any_field_of_config_json(checkpoint: Checkpoint) -> None:
    tally = Tally()
    fields = [(key,) for key in CONFIG]
    fields += [("rope_parameters", key) for key in CONFIG["rope_parameters"]]

    def case(field: Keys, how: str, value: Any) -> None:
        def named(message: str) -> bool:
            return (
                field[-1] in message
                or any(word in message for word in AGREES.get(field[-1], ()))
                or (field[-1] in FIXED | {"model_type"} and bool(CONTRADICTION.search(message)))
                or json_is_to_blame(message, how, value)
            )

        content = changed(CONFIG, field, how, value)
        wanted = config_oracle(field, how, value)
        judge(checkpoint, tally, "config.json", content, wanted, named)

    fuzz(4000, case, field=st.sampled_from(fields), how=HOW, value=VALUES)
    assert tally.cases >= 4000
    assert tally.read > 300


def test_any_entry_of_the_index(checkpoint: Checkpoint) -> None:
    tally = Tally()
    files: dict[str, str] = checkpoint.index["weight_map"]
    names = [*files, "x", "", "../x", "\ud800", "n" * 4000]

    def case(name: str, other: str, how: str, value: Any) -> None:
        if how == "rename":
            index = {"weight_map": {other if n == name else n: f for n, f in files.items()}}
            content, value, wanted = encode(index), other, name == other
        elif how == "add":
            content, value = encode({"weight_map": {**files, other: files[name]}}), other
            wanted = files.get(other) == files[name]
        else:
            content = changed(checkpoint.index, ("weight_map", name), how, value)
            wanted = how == "replace" and same(value, files[name])

        def named(message: str) -> bool:
            put_there = isinstance(value, str) and repr(value)[:290] in message
            return name in message or put_there or json_is_to_blame(message, how, value)

        judge(checkpoint, tally, INDEX, content, wanted, named)

    def whole(how: str, value: Any) -> None:
        def named(message: str) -> bool:
            empty = value == {} and "has no tensor" in message
            return "weight_map" in message or empty or json_is_to_blame(message, how, value)

        if not isinstance(value, dict) or not any(isinstance(v, str) for v in value.values()):
            content = changed(checkpoint.index, ("weight_map",), how, value)
            judge(checkpoint, tally, INDEX, content, False, named)

    hows = st.sampled_from(["replace"] * 6 + ["delete", "twice", "nest", "rename", "add"])
    fuzz(
        2200,
        case,
        name=st.sampled_from(list(files)),
        other=st.sampled_from(names),
        how=hows,
        value=st.sampled_from([*SHARDS, *PATHS]) | VALUES,
    )
    fuzz(300, whole, how=HOW, value=VALUES)
    assert tally.cases >= 2480
    assert tally.read > 20


def test_any_field_of_a_header(checkpoint: Checkpoint) -> None:
    tally = Tally()
    tensors = [(f, n) for f, header in checkpoint.headers.items() for n in header if n[0] != "_"]
    dtypes = ["F16", "F32", "F64", "I16", "U16", "F8_E4M3", "F4", "BOOL", "I64", "bf16", "Q4"]

    def case(
        tensor: tuple[str, str], field: str, how: str, value: Any, factor: int, twin: int
    ) -> None:
        file, name = tensor
        header = checkpoint.headers[file]
        original = header[name].get(field, header[name])
        if how in ("scale", "shift") and isinstance(original, list):
            value = [x * factor if how == "scale" else x + factor for x in original]
        elif how == "turn" and isinstance(original, list):
            value = original[::-1]
        elif how == "swap":  # with another tensor: its shape, its bytes, or all there is
            others = [entry for n, entry in header.items() if n[0] != "_"]
            value = others[twin % len(others)].get(field, others[twin % len(others)])
        how = how if how in ("delete", "twice", "nest") else "replace"
        where: Keys = (name,) if field == "entry" else (name, field)
        content = with_header(changed(header, where, how, value), checkpoint.data[file])
        wanted = how == "replace" and (
            same(value, original) or (field == "dtype" and value in ("F16", "BF16"))
        )

        def named(message: str) -> bool:
            # Who is not in the header cannot be named, but his bytes are.
            left = how == "delete" and re.search("bytes .*belong to no tensor", message)
            return name in message or bool(left) or json_is_to_blame(message, how, value)

        judge(checkpoint, tally, file, content, wanted, named)

    fuzz(
        2500,
        case,
        tensor=st.sampled_from(tensors),
        field=st.sampled_from(["dtype", "shape", "data_offsets"] * 3 + ["entry"]),
        how=st.sampled_from(
            ["replace"] * 6 + ["scale", "shift", "turn", "swap"] * 2 + ["delete", "twice", "nest"]
        ),
        value=st.sampled_from(dtypes) | st.lists(st.integers(-9, 99), max_size=3) | VALUES,
        factor=st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31, 2**62]),
        twin=st.integers(0, 30),
    )
    assert tally.cases >= 2500
    assert tally.read > 20


def test_any_bytes_of_any_file(checkpoint: Checkpoint) -> None:
    tally = Tally()

    def case(file: str, how: str, at: float, raw: bytes, length: int) -> None:
        before = checkpoint.content[file]
        # Half of the places lie in the first tenth: in a shard, most of what can break is there.
        where = int(len(before) * (at if at > 0.5 else at / 5))
        content = {
            "overwrite": before[:where] + raw + before[where + len(raw) :],
            "insert": before[:where] + raw + before[where:],
            "cut": before[:where] + before[where + len(raw) :],
            "truncate": before[:where],
            "append": before + raw,
            "length": struct.pack("<Q", length) + before[8:],
            "random": raw,
        }[how]
        # Bytes more or fewer cannot fit a shard; the JSON files may take spaces, for example.
        resized = file in SHARDS and (len(content) != len(before) or how == "length")
        wanted = True if content == before else False if resized else None
        judge(checkpoint, tally, file, content, wanted, lambda _: True)

    fuzz(
        1000,
        case,
        file=st.sampled_from([*SHARDS, "config.json", INDEX]),
        how=st.sampled_from(
            ["overwrite", "insert", "cut", "truncate", "append", "length", "random"]
        ),
        at=st.floats(0, 1),
        raw=st.binary(max_size=20),
        length=st.integers(0, 2**64 - 1) | st.integers(0, 3000),
    )
    assert tally.cases >= 1000
    assert tally.read > 20
