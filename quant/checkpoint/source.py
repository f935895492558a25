"""From what a user typed as MODEL to a local Hugging Face directory of safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from quant.architectures import check_model_type
from quant.errors import RequestError

# What is fetched from a hub: weights as safetensors, configs, tokenizer. Never pickles or code,
# unless remote code was asked for.
HUB_IGNORED = ["consolidated*", "*/*"]  # the same weights in another layout; subfolders
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


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
    config = read_json(directory / "config.json")
    if "model_type" not in config:
        raise RequestError(f"{directory / 'config.json'} has no 'model_type'")
    check_model_type(str(config["model_type"]))
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or RequestError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path.parent} has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


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
