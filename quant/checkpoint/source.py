"""From what a user typed as MODEL to a local Hugging Face directory of safetensors files."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.architectures import check_model_type
from quant.errors import RequestError

# What is fetched from a hub: weights as safetensors, configs, tokenizer. Never pickles or code,
# unless remote code was asked for.
HUB_IGNORED = ["consolidated*", "*/*"]  # the same weights in another layout; subfolders
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")

# Published config.json files are a few KB. A parser's objects take some 30 times the text.
MAX_JSON_BYTES = 16 << 20
# What is read may be written again later, and Python's encoder stops at a few hundred levels.
MAX_JSON_DEPTH = 64
# 64-bit integers have at most 20 characters. Thousands of digits take quadratic time to print.
MAX_INTEGER_CHARACTERS = 20


def cache_directory() -> Path:
    """Where fetched and converted models are kept: $FOURBYEIGHT_CACHE, or the user's cache."""
    if named := os.environ.get("FOURBYEIGHT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fourbyeight"


def resolve_model(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """A local directory for MODEL: an HF directory, a .gguf file, or a hub id.

    Raises RequestError where there is no such model, its weights are pickles, or its architecture
    is not supported. A GGUF file is converted once, into the cache.
    """
    if not model:
        raise RequestError("MODEL is empty; give a directory, a .gguf file or a hub id")
    path = Path(model).expanduser()
    if path.is_dir():
        directory = path
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise RequestError(f"MODEL {model!r}: there is no such file")
        from quant.checkpoint.gguf import convert_gguf

        directory = convert_gguf(path, cache_directory() / "gguf")
    elif path.exists():
        raise RequestError(
            f"MODEL {model!r} is a file; give its directory, a .gguf file or a hub id"
        )
    elif _looks_like_path(model):
        raise RequestError(
            f"MODEL {model!r}: there is no such directory or file, and a hub id is ORG/NAME"
        )
    else:
        directory = _download(model, revision, trust_remote_code)
    check_directory(directory)
    return directory


def check_directory(directory: Path) -> dict[str, Any]:
    """Check config.json and that the weights are safetensors; returns the parsed config.json."""
    path = directory / "config.json"
    config = read_json(path)
    if "model_type" not in config:
        raise RequestError(f"{path} has no 'model_type'")
    if not isinstance(model_type := config["model_type"], str):
        raise RequestError(f"{path}: model_type is {reprlib.repr(model_type)}, not a string")
    try:
        check_model_type(model_type)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    if not list(directory.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in PICKLES for p in directory.glob(pattern))
        if pickles:
            raise RequestError(
                f"{directory} holds its weights as pickles ({pickles[0]}), which can run code when "
                "opened and are never read; convert them to safetensors first "
                "(transformers: model.save_pretrained(...))"
            )
        raise RequestError(f"{directory} has no *.safetensors file")
    return config


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file, or RequestError that names the file.

    The size is checked before anything is read. See `parse_json` for what is refused.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block for ever
            raise RequestError(f"{path} is not a regular file")
        if found.st_size > max_bytes:
            raise RequestError(
                f"{path} has {found.st_size:,} bytes; at most {max_bytes:,} are read, far more "
                "than such a file needs. Is it another file under this name?"
            )
        with path.open("rb") as file:
            text = file.read(found.st_size)  # a larger number would be allocated in advance
    except FileNotFoundError:
        raise RequestError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    try:
        value = parse_json(text)
        _check_depth(value)
    except ValueError as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None
    return value


def parse_json(text: bytes) -> dict[str, Any]:
    """The JSON object in a text; ValueError with the reason where it is not exactly one.

    Stricter than `json`: what parsers disagree about (keys that occur twice, NaN and Infinity) and
    what only an attack needs (deep nesting, integers beyond 64 bits) is refused.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is not an object but {reprlib.repr(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {reprlib.repr(key)} occurs twice")
            seen.add(key)
    return value


def _integer(literal: str) -> int:
    if len(literal) > MAX_INTEGER_CHARACTERS:
        raise ValueError(f"{literal[:MAX_INTEGER_CHARACTERS]}... is an integer beyond 64 bits")
    return int(literal)


def _constant(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON number")


def _check_depth(value: Mapping[str, Any]) -> None:
    """ValueError, naming the outermost key, where containers lie too deep in one another."""
    for key, inside in value.items():
        level, depth = [inside], 1
        while level := [item for outer in level for item in _items(outer)]:
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise ValueError(f"{reprlib.repr(key)} is nested deeper than {MAX_JSON_DEPTH}")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith("/")


def _download(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED
            )
        )
    except Exception as error:  # the hub client's errors share no useful base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"MODEL {model!r} is no local directory, and the hub gave no snapshot of it: {reason}"
        ) from error
