"""Items of work in processes that may die: what a broken kernel takes with it is one item.

An illegal memory access leaves a CUDA context that answers every later call with the same error,
and a kernel that hangs answers nothing. So items run in child processes that write down each item
before they start it and each result after; a child that dies, or is silent for too long, is
replaced by another that leaves out what is written there.

    parent:  supervise(["python", ..., "--log", FILE], FILE, deadline) -> {key: record}
    child:   work(items, FILE, deadline)

A record is {"key", "seconds"} with "result", or with "error".
"""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Longer than any item: a compile of its kernels, and their first run.
SILENCE_S = 150.0
# What an item in progress at the deadline has left; then it counts as one there was no time for.
GRACE_S = 30.0
LATE = "out of time"
DEVICE_LOST = 3
TRACE_LINES = 12


@dataclass(frozen=True)
class Item:
    """A piece of work by name; run gives what JSON can hold."""

    key: str
    run: Callable[[], Any]


def work(
    items: Iterable[Item],
    log: Path,
    deadline: float,
    synchronize: Callable[[], object] = lambda: None,
) -> int:
    """Run the items that the log does not name yet, in order, until `deadline` (time.time()).

    synchronize waits for the device, and raises what its kernels did wrong. Returns the exit code:
    DEVICE_LOST where the device answers nothing but errors.
    """
    known = set(read(log))
    for item in items:
        if item.key in known:
            continue
        if time.time() > deadline:
            break
        _append(log, {"key": item.key})
        started, record = time.perf_counter(), {"key": item.key}
        try:
            result = item.run()
            synchronize()
            record["result"] = result
        except Exception as error:
            record["error"] = describe(error)
        record["seconds"] = round(time.perf_counter() - started, 3)
        _append(log, record)
        if "error" in record:
            try:
                synchronize()
            except Exception:
                return DEVICE_LOST
    return 0


def supervise(command: Sequence[str], log: Path, deadline: float) -> dict[str, dict[str, Any]]:
    """Run a child until it ends in peace or the deadline is past; every finished record by key.

    An item that a child started and did not end has the "error" of its death.
    """
    while True:
        known = len(read(log))
        # Whatever the child printed goes to a file: a full pipe would stop it.
        with log.with_suffix(".out").open("ab") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            reason = _watch(child, log, deadline)
        records = read(log)
        for key, record in records.items():
            if "seconds" not in record and reason != LATE:
                _append(log, {"key": key, "error": reason or "the process ended", "seconds": 0.0})
        if reason not in (None, LATE) and len(records) == known:  # another would end the same way
            _append(log, {"key": log.stem, "error": f"{reason}:\n{_tail(log)}", "seconds": 0.0})
        elif reason is not None and time.time() < deadline:
            continue
        return {key: record for key, record in read(log).items() if "seconds" in record}


def read(log: Path) -> dict[str, dict[str, Any]]:
    """The latest record of every key; a line that was cut off does not count."""
    records: dict[str, dict[str, Any]] = {}
    if log.exists():
        for line in log.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            records[record["key"]] = record
    return records


def describe(error: BaseException) -> str:
    """The error and where it came from, in a few lines."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-TRACE_LINES:])


def _watch(child: subprocess.Popen[bytes], log: Path, deadline: float) -> str | None:
    """Wait; kill a child that is silent or late. None where it ended well, else what became of it.

    Past the deadline the item in progress may still end: a child stops by itself after it.
    """
    size, since = -1, time.time()
    while child.poll() is None:
        time.sleep(0.05)
        now, found = time.time(), log.stat().st_size if log.exists() else 0
        if found != size:
            size, since = found, now
        elif now - since > SILENCE_S or now > deadline + GRACE_S:
            child.kill()
            child.wait()
            silent = f"stopped: nothing came for {now - since:.0f} s"
            return silent if now - since > SILENCE_S else LATE
    if child.returncode == DEVICE_LOST:
        return "the device was lost"
    return f"the process ended with code {child.returncode}" if child.returncode else None


def _append(log: Path, record: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _tail(log: Path) -> str:
    output = log.with_suffix(".out")
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return "\n".join(lines[-TRACE_LINES:])
