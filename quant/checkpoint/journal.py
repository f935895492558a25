"""The journal of a run: what is finished, and of what.

One JSON object a line, each on the disk before the next part begins. The first is the run's
fingerprint; then one per finished part, with where its tensors lie and what is reported of it. A
line that a kill has cut short is no line.

A run goes on only under the fingerprint that it began with, so that two are never mixed: source
files and calibration tokens by their SHA-256, the recipe, and what else decides about the bytes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.checkpoint.shards import Entry, flush_to_disk
from quant.errors import RequestError, WorkFailed

JOURNAL_VERSION = 2
# Said of a difference in these, with what to do about it.
FIELD_NAMES = {
    "versions": "version of",
    "recipe": "recipe",
    "settings": "setting",
    "files": "file",
    "data": "calibration data",
}


@dataclass(frozen=True)
class Fingerprint:
    """What decides about the bytes of a checkpoint.

    versions: of fourbyeight, torch and the journal. settings: options outside the recipe. files:
    SHA-256 of every source file by name. data: the dataset's name and the SHA-256 of its tokens.
    """

    versions: dict[str, Any]
    recipe: dict[str, Any]
    settings: dict[str, Any]
    files: dict[str, str]
    data: dict[str, str]

    def differences(self, other: Fingerprint) -> list[str]:
        """What `other` has changed, for people; empty where nothing has."""
        found = []
        mine, theirs = asdict(self), asdict(other)
        for section, label in FIELD_NAMES.items():
            before, after = _flat(mine[section]), _flat(theirs[section])
            for key in sorted(before.keys() | after.keys()):
                was, now = before.get(key), after.get(key)
                if was != now:
                    found.append(f"{label} {key}: {_brief(was)} then, {_brief(now)} now")
        return found


@dataclass(frozen=True)
class Part:
    """A finished part: "embedding", or the number of a block.

    entries: its tensors in the shards. report: rows of the report. skipped: sites left alone, with
    the reason. activations: whether the next block's input is kept on disk. keys: the scale and the
    shift of a block's keys (`side.py`), [Hk, D] each, or nothing.
    """

    name: str
    entries: tuple[Entry, ...]
    report: tuple[dict[str, Any], ...] = ()
    skipped: tuple[dict[str, Any], ...] = ()
    activations: bool = False
    keys: tuple[list[list[float]], list[list[float]]] | None = None


class Journal:
    """The journal file of a run; `fingerprint` is None where there is no run yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint: Fingerprint | None = None
        self.num_threads: int | None = None
        self.parts: list[Part] = []
        self._length = 0  # of the whole lines, in bytes
        if path.is_file():
            self._read()

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return sum(part.name != "embedding" for part in self.parts)

    @property
    def entries(self) -> list[Entry]:
        return [entry for part in self.parts for entry in part.entries]

    def begin(self, fingerprint: Fingerprint, num_threads: int) -> None:
        """Start a journal in place of what was there.

        num_threads: how torch splits a sum decides about its last bit, so a resumed run uses as
        many threads as the run began with.
        """
        self.fingerprint, self.num_threads, self.parts, self._length = (
            fingerprint,
            num_threads,
            [],
            0,
        )
        self._append(
            {
                "journal": JOURNAL_VERSION,
                "fingerprint": asdict(fingerprint),
                "num_threads": num_threads,
            }
        )

    def append(self, part: Part) -> None:
        """Record a part; on return it is on the disk."""
        self._append({"part": asdict(part)})
        self.parts.append(part)

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "w+b") as file:
                file.truncate(self._length)
                file.seek(self._length)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if not self._length:
                flush_to_disk(self.path.parent)
        except OSError as error:
            raise WorkFailed(
                f"{self.path} could not be written: {error.strerror or error}"
            ) from error
        self._length += len(line)

    def _read(self) -> None:
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                if "part" in record:
                    if self.fingerprint is None:
                        raise ValueError("its first line is not a fingerprint")
                    self.parts.append(_part(record["part"]))
                elif record["journal"] == JOURNAL_VERSION:
                    self.fingerprint = Fingerprint(**record["fingerprint"])
                    self.num_threads = int(record["num_threads"])
                else:
                    raise ValueError(f"version {record['journal']} is not {JOURNAL_VERSION}")
            except (ValueError, TypeError, KeyError) as error:
                raise RequestError(
                    f"{self.path} cannot be read ({error}); the run cannot be resumed: "
                    f"remove {self.path.parent} and start again"
                ) from error
            self._length += len(line)


def _part(record: dict[str, Any]) -> Part:
    entries = tuple(
        Entry(shard, name, dtype, tuple(shape), start, stop)
        for shard, name, dtype, shape, start, stop in record["entries"]
    )
    return Part(**{**record, "entries": entries})


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c.0": 2}."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return found


def _brief(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:12] + "..."
