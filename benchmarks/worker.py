"""Items of work in processes that may die: what a broken kernel takes with it is one item.

An illegal memory access leaves a CUDA context that answers every later call with the same error,
and a kernel that hangs answers nothing. So items run in child processes that write down each item
before they start it and each result after; a child that dies, or takes longer than its item may,
is replaced by another that leaves out what is written there.

    parent:  supervise(["python", ..., "--log", FILE], FILE, deadline) -> {key: record}
    child:   work(items, FILE, deadline)

A record is {"key", "seconds"} with "result", with "error", or with "stopped" where the item's
subject, a kernel's op and backend for example, had taken MOST_LOSSES processes or devices with it
before. Processes whose logs lie in one folder count those losses together.
"""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# An item's seconds where it does not say: for a compile of its kernels, and their first run.
COMPILE_S = 150.0
# What the first item of a process has at least: libraries load with the first call.
FIRST_S = 30.0
# For a process to start (and to end); for the device to answer after an error.
START_S, ANSWER_S = 90.0, 20.0
# What an item in progress at the deadline has left; then it counts as one there was no time for.
GRACE_S = 30.0
# For a process that was killed to be gone. One that waits for the driver may never be.
KILL_S = 20.0
LATE = "out of time"
DEVICE_LOST = 3
MOST_LOSSES = 2
LOSSES = "losses.txt"
TRACE_LINES = 12
PATIENCE = "times as long as usual until an item counts as hanging, as under compute-sanitizer"


@dataclass(frozen=True)
class Item:
    """A piece of work by name; run gives what JSON can hold.

    limit: seconds until it counts as hanging. subject: what is given up after MOST_LOSSES.
    about: what of a result is known before, for whoever reads it.
    """

    key: str
    run: Callable[[], Any]
    limit: float = COMPILE_S
    subject: str = ""
    about: dict[str, Any] = field(default_factory=dict)


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
    known, least = set(read(log)), FIRST_S
    for item in items:
        if item.key in known:
            continue
        if time.time() > deadline:
            break
        record: dict[str, Any] = {"key": item.key, "subject": item.subject}
        if item.subject and losses(log.parent).count(item.subject) >= MOST_LOSSES:
            why = f"not run: {item.subject} took {MOST_LOSSES} processes with it before"
            _append(log, record | {"stopped": why, "seconds": 0.0})
            continue
        _append(log, record | {"limit": max(item.limit, least)})
        started, least = time.perf_counter(), 0.0
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
        known, size = len(read(log)), _size(log)
        # Whatever the child printed goes to a file: a full pipe would stop it.
        with log.with_suffix(".out").open("ab") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            reason = _watch(child, log, size, deadline)
        records = read(log)
        if reason not in (None, LATE):
            if len(records) == known:  # another would end the same way
                _append(log, {"key": log.stem, "error": f"{reason}:\n{_tail(log)}", "seconds": 0.0})
                return finished(log)
            _lose(log, list(records.values())[-1], str(reason))
        if reason is None or time.time() > deadline:
            return finished(log)


def supervise_all(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], deadline: float
) -> dict[str, dict[str, Any]]:
    """`supervise` of several children at a time."""
    records: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(logs)) as pool:
        for found in pool.map(supervise, commands, logs, [deadline] * len(logs)):
            records |= found
    return records


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


def finished(*logs: Path) -> dict[str, dict[str, Any]]:
    """The records of these logs that have come to an end, whatever it was."""
    every = (pair for log in logs for pair in read(log).items())
    return {key: record for key, record in every if "seconds" in record}


def trouble(record: dict[str, Any]) -> str | None:
    """Why a finished record has no result, in a line; None where it has one."""
    if "result" in record:
        return None
    said = str(record.get("error") or record.get("stopped") or "").strip().splitlines()
    return said[-1] if said else "?"


def losses(folder: Path) -> list[str]:
    """The subject of every process or device that was lost in this folder."""
    path = folder / LOSSES
    return path.read_text().splitlines() if path.exists() else []


def describe(error: BaseException) -> str:
    """The error and where it came from, in a few lines."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-TRACE_LINES:])


def _watch(child: subprocess.Popen[bytes], log: Path, size: int, deadline: float) -> str | None:
    """Wait; kill a child that hangs or is late. None where it ended well, else what became of it.

    size: of the log before the child started. Past the deadline the item in progress may still end:
    a child stops by itself after it.
    """
    since, limit = time.time(), START_S
    while child.poll() is None:
        time.sleep(0.05)
        now, found = time.time(), _size(log)
        if found != size:
            size, since, limit = found, now, _limit(log)
        elif now - since > limit:
            return f"stopped: nothing came for {limit:.0f} s{_killed(child)}"
        elif now > deadline + GRACE_S:
            _killed(child)
            return LATE
    if child.returncode == DEVICE_LOST:
        return "the device was lost"
    return f"the process ended with code {child.returncode}" if child.returncode else None


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _limit(log: Path) -> float:
    """Seconds that what the log names last may take."""
    records = read(log)
    last = list(records.values())[-1] if records else {}
    if "seconds" not in last:
        return float(last.get("limit", START_S))
    return ANSWER_S if "error" in last else START_S


def _killed(child: subprocess.Popen[bytes]) -> str:
    """Kill a child; what there is to say of it."""
    child.kill()
    try:
        child.wait(timeout=KILL_S)
    except subprocess.TimeoutExpired:
        return f", and the process, killed, is still there after {KILL_S:.0f} s"
    return ""


def _lose(log: Path, last: dict[str, Any], reason: str) -> None:
    """Write down which item a process was lost with, and whose it was."""
    if "seconds" not in last:
        subject = last.get("subject", "")
        _append(log, {"key": last["key"], "subject": subject, "error": reason, "seconds": 0.0})
    if not {"result", "stopped"} & last.keys() and last.get("subject"):
        with (log.parent / LOSSES).open("a") as file:
            file.write(f"{last['subject']}\n")


def _append(log: Path, record: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _tail(log: Path) -> str:
    output = log.with_suffix(".out")
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    return "\n".join(lines[-TRACE_LINES:])
