"""Tokens to calibrate with and to measure on.

A dataset is a local file, a hub id, or `builtin`:

    builtin[:calibration|:evaluation]   English text that comes with Python; needs no network
    FILE.txt                            one text
    FILE.jsonl, FILE.json, FILE.parquet rows with `text`, or with `messages` (chat template applied)
    FILE.npy                            token ids, [T] or [n, S], integers
    org/name[[:config]:split]           a hub dataset with a `text` or `messages` column

Texts are joined by blank lines and tokenized as one stream; samples are windows cut from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant.errors import RequestError

# Characters: more than the mean token of any common tokenizer has, in any language.
LONGEST_TOKEN = 8
BUILTIN_PARTS = ("calibration", "evaluation")


def load_tokens(dataset: str, tokenizer: Any, vocab_size: int, enough: int | None = None) -> Tensor:
    """The dataset as one stream of token ids, [T] int64.

    enough: tokens after which a hub dataset need not be read further (it may be endless); local
    files are read whole. Raises RequestError where there is no such dataset, it is empty, or its
    ids do not fit.
    """
    path = Path(dataset).expanduser()
    if path.suffix == ".npy" and path.is_file():
        tokens = _token_ids(path)
    else:
        try:
            text = "\n\n".join(_texts(dataset, path, tokenizer, enough))
        except UnicodeDecodeError as error:
            raise RequestError(f"dataset {dataset!r} is not UTF-8 text: {error}") from error
        if not text.strip():
            raise RequestError(f"dataset {dataset!r} is empty")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(ids, dtype=torch.int64)
    if not tokens.numel():
        raise RequestError(f"dataset {dataset!r} is empty")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise RequestError(
            f"dataset {dataset!r} holds token ids {int(tokens.min())}..{int(tokens.max())}, but "
            f"the model's vocabulary has {vocab_size}"
        )
    return tokens


def calibration_windows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """count windows [n, length] cut from the stream [T], evenly spaced and not overlapping.

    seed 0 starts at the first token; any other seed shifts all windows together, so that draws with
    different seeds see different tokens, where there are more than the windows need. RequestError
    where the stream is too short.
    """
    needed = count * length
    if len(tokens) < needed:
        raise RequestError(
            f"the calibration dataset has {len(tokens):,} tokens; {count} samples of "
            f"{length} tokens need {needed:,}: take fewer or shorter samples "
            f"(at most {len(tokens) // length} of this length), or more text"
        )
    spacing = len(tokens) // count
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(spacing - length + 1, (1,), generator=generator)) if seed else 0
    return torch.stack([tokens[s : s + length] for s in range(shift, spacing * count, spacing)])


def _texts(dataset: str, path: Path, tokenizer: Any, enough: int | None) -> list[str]:
    name, _, part = dataset.partition(":")
    if name == "builtin":
        if part and part not in BUILTIN_PARTS:
            raise RequestError(
                f"dataset {dataset!r}: builtin has the parts {', '.join(BUILTIN_PARTS)}"
            )
        return builtin_texts(part)
    if path.is_file():
        readers: dict[str, Callable[[Path], Iterable[Any]]] = {
            ".txt": lambda p: [{"text": p.read_text(encoding="utf-8")}],
            ".jsonl": _jsonl_rows,
            ".json": _json_rows,
            ".parquet": _parquet_rows,
        }
        if path.suffix not in readers:
            raise RequestError(
                f"dataset {dataset!r}: files of type {path.suffix!r} are not read; "
                f"supported: {', '.join([*readers, '.npy'])}"
            )
        return [
            _row_text(row, f"{path}, row {i + 1}", tokenizer)
            for i, row in enumerate(readers[path.suffix](path))
        ]
    if path.suffix or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RequestError(f"dataset {dataset!r}: there is no such file")
    config, _, split = part.rpartition(":")
    texts, length = [], 0
    rows = _load_dataset(name, name=config or None, split=split or "train", streaming=True)
    for i, row in enumerate(rows):
        texts.append(_row_text(row, f"{dataset}, row {i + 1}", tokenizer))
        length += len(texts[-1])
        if enough is not None and length > enough * LONGEST_TOKEN:
            break
    return texts


def builtin_texts(part: str = "") -> list[str]:
    """The documentation topics that CPython ships for `help()`: about 110k tokens of English prose.

    The text belongs to the interpreter's version, so figures made with it compare only within one.
    "evaluation" is every fourth topic by name, without the paragraphs that the other topics share
    (they quote each other); "calibration" is the others; "" is all of them.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    if not part:
        return [topics[name] for name in names]
    held_out = names[::4]
    calibration = [topics[name] for name in names if name not in held_out]
    if part == "calibration":
        return calibration
    seen = {_plain(p) for text in calibration for p in text.split("\n\n")}
    return [
        "\n\n".join(p for p in topics[name].split("\n\n") if _plain(p) not in seen)
        for name in held_out
    ]


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _row_text(row: Any, where: str, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and row.get("messages"):
        try:
            return str(tokenizer.apply_chat_template(list(row["messages"]), tokenize=False))
        except Exception as error:  # a template may be missing, or refuse in any way
            raise RequestError(f"dataset {where}: the chat template: {error}") from error
    raise RequestError(f"dataset {where}: expected 'text' (a string) or 'messages' (a chat)")


def _jsonl_rows(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise RequestError(f"dataset {path}, line {number}: {error}") from error


def _json_rows(path: Path) -> Iterable[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RequestError(f"dataset {path}: {error}") from error
    if not isinstance(rows, list):
        raise RequestError(f"dataset {path}: expected a list of rows, got {type(rows).__name__}")
    return rows


def _parquet_rows(path: Path) -> Iterable[Any]:
    return _load_dataset("parquet", data_files=str(path), split="train")


def _load_dataset(path: str, **options: Any) -> Iterable[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise RequestError(
            f"dataset {path!r} needs the package `datasets`: pip install 'fourbyeight[data]'"
        ) from None
    try:
        yield from load_dataset(path, **options)
    except Exception as error:  # the library raises its own and its network client's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"dataset {path!r} could not be loaded: {reason}") from error


def _token_ids(path: Path) -> Tensor:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise RequestError(f"dataset {path} is not a readable .npy file: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"dataset {path} holds {ids.dtype}; token ids must be integers")
    return torch.from_numpy(ids.reshape(-1).astype(np.int64))
