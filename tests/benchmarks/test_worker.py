"""Items of work in processes that die, hang, lose their device, or are killed with their parent."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import progress, worker

ROOT = Path(__file__).parents[2]
BEGIN = f"""
import os, sys, time, pathlib
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from benchmarks import worker
from benchmarks.worker import Item, work
log, end = pathlib.Path(sys.argv[1]), time.time() + 60
def fail(): raise ValueError("no such tile")
def hang(): time.sleep(600)
"""


def supervised(log: Path, code: str, seconds: float = 60.0) -> dict[str, dict]:
    command = [sys.executable, "-c", BEGIN + code, str(log)]
    return worker.supervise(command, log, time.time() + seconds)


def test_an_item_that_kills_its_process_costs_only_itself(tmp_path):
    records = supervised(tmp_path / "work.jsonl", """
items = [Item("good", lambda: 1), Item("raises", fail), Item("dies", lambda: os._exit(9)),
         Item("after", lambda: 2)]
sys.exit(work(items, log, end))
""")  # fmt: skip
    assert [records[key].get("result") for key in ("good", "after")] == [1, 2]
    assert "no such tile" in records["raises"]["error"]
    assert worker.trouble(records["raises"]) == "ValueError: no such tile"
    assert "code 9" in records["dies"]["error"]
    assert worker.trouble(records["good"]) is None


def test_a_process_that_cannot_start_is_reported_once(tmp_path):
    records = supervised(tmp_path / "work.jsonl", "raise SystemExit('no device')")
    (record,) = records.values()
    assert "no device" in record["error"]


def test_an_item_has_the_seconds_that_it_says(tmp_path):
    started = time.time()
    records = supervised(tmp_path / "work.jsonl", """
items = [Item("quick", lambda: 1), Item("hangs", hang, limit=1.5), Item("next", lambda: 2)]
sys.exit(work(items, log, end))
""")  # fmt: skip
    assert (records["quick"]["result"], records["next"]["result"]) == (1, 2)
    assert "nothing came for 2 s" in records["hangs"]["error"]
    assert time.time() - started < 40


def test_the_first_item_of_a_process_has_time_for_libraries(tmp_path):
    records = supervised(tmp_path / "work.jsonl", """
items = [Item("first", lambda: time.sleep(2), limit=0.5), Item("then", hang, limit=0.5)]
sys.exit(work(items, log, end))
""")  # fmt: skip
    assert "result" in records["first"]
    assert "error" in records["then"]


def test_a_device_that_does_not_answer_after_an_error_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "ANSWER_S", 1.0)
    records = supervised(tmp_path / "work.jsonl", """
hung = log.with_suffix(".hung")
def synchronize():
    if "no such tile" in log.read_text() and not hung.exists():
        hung.touch()
        hang()
items = [Item("raises", fail, subject="op"), Item("after", lambda: 2)]
sys.exit(work(items, log, end, synchronize))
""")  # fmt: skip
    assert "no such tile" in records["raises"]["error"]
    assert records["after"]["result"] == 2
    assert worker.losses(tmp_path) == ["op"]


@pytest.mark.parametrize("how", ["hang", "lambda: os._exit(9)", "lose"])
def test_what_was_lost_twice_is_not_run_again(tmp_path, how):
    # One log for both processes of `supervise_all` would do; two show that they count together.
    code = f"""
worker.FIRST_S = 0.0
lost = []
def lose(): lost.append(1); raise RuntimeError("illegal memory access")
def synchronize():
    if lost: raise RuntimeError("illegal memory access")
part = log.stem
items = [Item(f"{{part}} bad {{i}}", {how}, limit=0.5, subject="gemm (cutlass)") for i in range(9)]
items += [Item(f"{{part}} good", lambda: 1, subject="gemm (triton)")]
sys.exit(work(items, log, end, synchronize))
"""
    logs = [tmp_path / f"{i}.jsonl" for i in range(2)]
    commands = [[sys.executable, "-c", BEGIN + code, str(log)] for log in logs]
    records = worker.supervise_all(commands, logs, time.time() + 60)
    assert [records[f"{i} good"]["result"] for i in range(2)] == [1, 1]
    stopped = [record for record in records.values() if "stopped" in record]
    assert 14 <= len(stopped) <= 16  # both may have been in one when the second was lost
    assert worker.trouble(stopped[0]) == "not run: gemm (cutlass) took 2 processes with it before"
    assert set(worker.losses(tmp_path)) == {"gemm (cutlass)"}


def test_an_error_that_leaves_the_device_well_loses_nothing(tmp_path):
    records = supervised(tmp_path / "work.jsonl", """
items = [Item(f"raises {i}", fail, subject="op") for i in range(4)]
sys.exit(work(items, log, end))
""")  # fmt: skip
    assert all("no such tile" in record["error"] for record in records.values())
    assert worker.losses(tmp_path) == []


def test_an_item_past_the_deadline_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "GRACE_S", 0.5)
    started = time.time()
    records = supervised(tmp_path / "work.jsonl", """
items = [Item("quick", lambda: 1), Item("hangs", hang), Item("next", lambda: 2)]
sys.exit(work(items, log, end))
""", seconds=4)  # fmt: skip
    assert not any("error" in record for record in records.values())
    assert time.time() < started + 10


def test_a_process_that_kill_does_not_end_is_left_behind(monkeypatch):
    class Stuck:
        def kill(self):
            pass

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("python", timeout)

    assert "is still there after 20 s" in worker._killed(Stuck())


def test_figures_are_on_disk_before_their_process_is_killed(tmp_path):
    path = tmp_path / "figures.json"
    code = f"""
from benchmarks.progress import regularly, write
found = {{}}
with regularly(lambda: write(pathlib.Path({str(path)!r}), found), 0.05):
    for i in range(10**6):
        found = {{"items": i}}
        time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", BEGIN + code, "-"]) as process:
        try:
            end = time.time() + 30
            while time.time() < end and (
                not path.exists() or json.loads(path.read_text())["items"] < 3
            ):
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
    assert json.loads(path.read_text())["items"] >= 3


def test_a_regular_call_that_raises_stops_nothing(capsys):
    calls = []

    def fails():
        calls.append(1)
        raise OSError("no space left")

    with progress.regularly(fails, 0.01):
        time.sleep(0.2)
    assert len(calls) > 1
    assert "no space left" in capsys.readouterr().err
