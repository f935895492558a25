"""The journal: what was recorded is read back, whatever the last write came to."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from quant.checkpoint.journal import JOURNAL_VERSION, Fingerprint, Journal, Part
from quant.checkpoint.shards import Entry
from quant.errors import RequestError, WorkFailed

FINGERPRINT = Fingerprint(
    versions={"fourbyeight": "1.2", "torch": "3.4", "journal": 1},
    recipe={"scheme": "w4a8", "ignore": [], "passes": [{"round": {"scales": "mse"}}]},
    settings={"dtype": "auto", "max shard size": 7},
    files={"model.safetensors": "ab" * 32, "config.json": "cd" * 32},
    data={"dataset": "wörter\r\n\u2028.txt", "tokens": "ef" * 32},
)
PARTS = [
    Part("embedding", (Entry(0, "model.embed_tokens.weight", "BF16", (258, 128), 0, 66048),)),
    Part(
        "0",
        (Entry(0, "a", "F32", (), 66048, 66052), Entry(1, "b", "I32", (3, 0), 0, 0)),
        report=({"name": "a", "error_after": 0.1 + 0.2, "damping": None, "shape": [3, 4]},),
        skipped=({"names": ["b", "ü"], "reason": "1 \n 2"},),
        activations=True,
    ),
    Part("1", ()),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.fingerprint is None
    journal.begin(FINGERPRINT, 3)
    for part in PARTS:
        journal.append(part)
    assert (journal.fingerprint, journal.parts) == (FINGERPRINT, PARTS)
    return tmp_path / "journal.jsonl"


def test_what_was_recorded_is_read_back(path: Path) -> None:
    found = Journal(path)
    assert found.fingerprint == FINGERPRINT
    assert found.num_threads == 3
    for one, other in zip(found.parts, PARTS, strict=True):
        assert one.entries == other.entries
        assert one.name == other.name
        assert one.activations == other.activations
        assert list(one.report) == list(other.report)
        assert list(one.skipped) == list(other.skipped)
    assert all(isinstance(entry.shape, tuple) for entry in found.entries)
    assert found.entries == [entry for part in PARTS for entry in part.entries]
    assert found.blocks == 2
    assert len(path.read_bytes().splitlines()) == 4  # a line each


def test_line_is_lost_whole_where_it_is_cut_anywhere(path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        found = Journal(path)
        assert [part.name for part in found.parts] == ["embedding", "0"]
        found.append(PARTS[-1])
        assert path.read_bytes() == whole


def test_journal_cut_in_its_first_line_is_no_run(path: Path) -> None:
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:cut])
        found = Journal(path)
        assert found.fingerprint is None
        assert found.blocks == 0


def test_long_torn_line_is_cut_off_by_a_shorter_one(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"part": ' + 10_000 * b" ")
    Journal(path).append(PARTS[-1])
    assert path.read_bytes() == whole + whole.splitlines(keepends=True)[-1]


def test_begin_replaces_what_was_there(path: Path) -> None:
    journal = Journal(path)
    journal.begin(FINGERPRINT, 5)
    found = Journal(path)
    assert (found.num_threads, found.parts, journal.parts) == (5, [], [])
    assert len(path.read_bytes().splitlines()) == 1


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize(
    "rubbish",
    [
        "",
        "{",
        "3",
        "null",
        "[]",
        "{}",
        '{"part": 3}',
        '{"part": {"name": "0"}}',
        '{"part": {"name": "0", "entries": [[1]]}}',
        '{"part": {"name": "0", "entries": [], "unknown": 1}}',
        '{"journal": 99, "fingerprint": {}, "num_threads": 1}',
        '{"journal": 1, "fingerprint": {}, "num_threads": 1}',
        '{"journal": 1}',
    ],
)
def test_whole_lines_that_say_something_else_are_refused(
    line: int, rubbish: str, path: Path
) -> None:
    lines = path.read_text().split("\n")
    lines[line] = rubbish
    path.write_text("\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"journal\.jsonl cannot be read.*remove .* start again"):
        Journal(path)
    assert path.read_bytes() == before


def test_parts_without_a_fingerprint_are_refused(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(RequestError, match="first line is not a fingerprint"):
        Journal(path)


def test_journal_of_another_version_is_refused(path: Path) -> None:
    version, other = JOURNAL_VERSION, JOURNAL_VERSION + 1
    now, then = f'{{"journal": {version}, '.encode(), f'{{"journal": {other}, '.encode()
    path.write_bytes(path.read_bytes().replace(now, then, 1))
    with pytest.raises(RequestError, match=f"version {other} is not {version}"):
        Journal(path)


def test_line_is_on_the_disk_before_append_returns(path: Path, monkeypatch: Any) -> None:
    seen: list[bytes] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(path.read_bytes())
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    Journal(path).append(Part("2", ()))
    assert json.loads(seen[-1].splitlines()[-1])["part"]["name"] == "2"


def test_full_disk_is_reported_and_the_part_is_not_recorded(path: Path, monkeypatch: Any) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, os.strerror(28))

    journal = Journal(path)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(WorkFailed, match=r"journal\.jsonl could not be written: No space left"):
        journal.append(Part("2", ()))
    assert journal.blocks == 2


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("versions", {"torch": "3.5"}, "version of torch: 3.4 then, 3.5 now"),
        ("recipe", {"scheme": "w4afp8"}, "recipe scheme: w4a8 then, w4afp8 now"),
        ("recipe", {"ignore": ["x"]}, "recipe ignore.0: nothing then, x now"),
        (
            "recipe",
            {"passes": [{"round": {"scales": "absmax"}}]},
            "recipe passes.0.round.scales: mse then, absmax now",
        ),
        ("settings", {"max shard size": 8}, "setting max shard size: 7 then, 8 now"),
        (
            "files",
            {"config.json": "aa" * 32},
            "file config.json: cdcdcdcdcdcd... then, aaa",
        ),
        ("files", {"tokenizer.json": "x"}, "file tokenizer.json: nothing then, x now"),
        ("data", {"tokens": "00"}, "calibration data tokens: efefefefefef... then, 00 now"),
    ],
)
def test_differences_are_named(section: str, value: dict[str, Any], said: str) -> None:
    changed = {**getattr(FINGERPRINT, section), **value}
    other = dataclasses.replace(FINGERPRINT, **{section: changed})
    found = FINGERPRINT.differences(other)
    assert any(said in line for line in found)
    assert all(said.split(":")[0].split(".")[0] in line for line in found)
    assert FINGERPRINT.differences(FINGERPRINT) == []
    assert len(other.differences(FINGERPRINT)) == len(found)
