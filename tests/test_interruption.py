"""Processes that are stopped, killed or run out of disk, and what the next one makes of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant import cli
from quant.calibration import quantize as calibration
from quant.calibration.resume import finished_blocks
from quant.checkpoint.writer import work_directory

ROOT = Path(__file__).parents[1]
SCREEN = 24  # lines
KILLS = 10
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}


class Command:
    """`python -m quant run` of the four-block model, long enough to be caught in the middle."""

    def __init__(self, source: Path, text: Path, samples: int) -> None:
        self.request = [sys.executable, "-m", "quant", "run", str(source), "--dataset", str(text)]
        self.request += ["--num-calibration-samples", str(samples), "--max-seq-length", "200"]
        self.request += ["--group-size", "64", "--max-shard-size", "200KB", "--device", "cpu"]

    def start(self, output: Path, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.request, "-o", str(output), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def finish(self, output: Path, *options: str) -> None:
        process = self.start(output, *options)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """Files at any depth, hidden ones too."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for_blocks(output: Path, blocks: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many blocks are done; for 0, until the journal has begun."""
    end = time.monotonic() + 60
    path = work_directory(output) / "journal.jsonl"
    while not path.is_file() or finished_blocks(output) < blocks:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    letters = random.Random(5)
    path.write_text("".join(chr(letters.randrange(32, 127)) for _ in range(60_000)))
    return path


@pytest.fixture(scope="module")
def command(deep_checkpoint: Path, long_text: Path) -> Command:
    return Command(deep_checkpoint, long_text, samples=40)


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The output of a run in one go, and the seconds that a block took."""
    output = tmp_path_factory.mktemp("whole") / "out"
    process = command.start(output)
    wait_for_blocks(output, 1, process)
    started = time.monotonic()
    wait_for_blocks(output, 3, process)
    seconds = (time.monotonic() - started) / 2
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return output, seconds


def test_stopped_by_signals_again_and_again_and_resumed_is_the_same(
    command: Command, whole: tuple[Path, float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = command.start(output)
    wait_for_blocks(output, 1, process)
    process.send_signal(signal.SIGSTOP)
    # A second run may not touch what the first one writes.
    before = contents(tmp_path)
    other = command.start(output, "--resume")
    _, message = other.communicate(timeout=60)
    assert other.returncode == 2, message
    assert "another run is writing it" in " ".join(message.split())
    assert contents(tmp_path) == before
    process.send_signal(signal.SIGCONT)

    # Interrupted; then terminated; then interrupted twice, which does not wait for the first.
    for stop, (signals, code) in enumerate(
        [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT] * 2, 130)], start=1
    ):
        if stop > 1:
            process = command.start(output, "--resume", "--activation-offload", "disk")
            wait_for_blocks(output, stop, process)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.001)
        _, message = process.communicate(timeout=60)
        assert process.returncode == code, message
        assert "Traceback" not in message
        blocks = finished_blocks(output)
        assert blocks >= stop
        if len(signals) == 1:
            assert "stopping after the current step; once more stops at once" in message
            assert f"stopped; {blocks} blocks are done and kept" in message
            assert "--resume" in message
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]

    command.finish(output, "--resume")
    assert files_of(output) == files_of(whole[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_anywhere_and_resumed_is_the_same(
    command: Command, whole: tuple[Path, float], tmp_path: Path
) -> None:
    chance = random.Random(17)
    expected, seconds = files_of(whole[0]), whole[1]
    places = ["cpu", "disk"]
    done = []
    for i in range(KILLS):
        output, blocks = tmp_path / f"out{i}", i // 2 % 5 - 1  # -1: while it starts
        for attempt in range(2 if i % 3 == 2 and blocks < 3 else 1):
            options = ["--activation-offload", places[(i + attempt) % 2]]
            process = command.start(output, *options, *(["--resume"] if attempt else []))
            if blocks >= 0:
                wait_for_blocks(output, blocks + attempt, process)
            # After the last block that is waited for, also while the files get their names.
            time.sleep(chance.random() * (2 * seconds if blocks == 3 else seconds))
            process.kill()
            process.communicate()
            done.append(-1 if output.exists() else finished_blocks(output))
        if not output.exists():
            command.finish(output, "--resume", "--activation-offload", places[i // 5 % 2])
            assert not (tmp_path / f".out{i}.partial").exists()
        assert files_of(output) == expected, (i, done)
    assert {0, 1, 2, 3} <= set(done)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many bytes (and options) at tmp_path / "disk"."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip("mounting a small file system is not permitted")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """quantize ARGS -> (exit code, stderr), in this process."""

    def call(*args: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capfd.readouterr().err

    return call


def fill(ballast: Path, left: int) -> None:
    """Write until the disk is full but for `left` bytes: a tmpfs's own figure lags behind."""
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(max(0, file.tell() - left))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_disk_that_fills_up_is_one_screen_and_resume_ends_the_same(
    blocks: int,
    offload: str,
    run: Any,
    small_disk: Any,
    deep_checkpoint: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--dataset", calibration_text, "--num-calibration-samples", 8, "--group-size", 64]
    request = ["run", deep_checkpoint, *options, "--max-seq-length", 64, "--device", "cpu"]
    code, err = run(*request, "-o", tmp_path / "whole")
    assert code == 0, err
    disk = small_disk("size=4m")
    ballast = disk / "ballast"
    quantize_blocks = calibration.quantize_blocks

    def filling(found: Any) -> Any:
        append = found.journal.append

        def append_and_fill(part: Any) -> None:
            append(part)
            if found.journal.blocks == blocks and not ballast.exists():
                fill(ballast, left=8192)

        found.journal.append = append_and_fill
        return quantize_blocks(found)

    monkeypatch.setattr(calibration, "quantize_blocks", filling)
    request += ["-o", disk / "out", "--activation-offload", offload]
    code, err = run(*request)
    assert code == 1, err
    assert ballast.exists()
    assert len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert "No space left on device" in (message := " ".join(err.split()))
    kept = finished_blocks(disk / "out")
    assert kept == blocks
    assert ("--resume" in message) == (blocks > 0)
    assert not (disk / "out").exists()
    ballast.unlink()
    monkeypatch.undo()
    code, err = run(*request, "--resume")
    assert code == 0, err
    assert files_of(disk / "out") == files_of(tmp_path / "whole")


def test_place_that_cannot_be_written_is_refused(
    run: Any, small_disk: Any, tiny_checkpoint: Any, calibration_text: Path
) -> None:
    disk = small_disk("size=4m,ro")
    request = ["run", tiny_checkpoint("llama"), "-o", disk / "deep" / "out"]
    code, err = run(*request, "--dataset", calibration_text)
    assert code == 2, err
    assert "not writable" in " ".join(err.split())
