"""The command where work fails or is stopped: exit codes, what it says, what it leaves."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quant import cli
from quant.calibration import quantize as calibration
from quant.report import Progress

SCREEN = 24  # lines
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def small(calibration_text: Path) -> list[str]:
    """Options for a run of seconds."""
    options = ["--dataset", calibration_text, "--num-calibration-samples", 4]
    return [*map(str, options), "--max-seq-length", "32", "--group-size", "32"]


def refused(run: Run, folder: Path, *args: Any) -> str:
    """Run a wrong request: exit code 2, one screen, and `folder` as it was. Returns the error."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    code, out, err = run(*args)
    assert code == 2, (out, err)
    assert 0 < len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    return " ".join(err.split())


def with_tensor(source: Path, target: Path, name: str, place: Any, value: float) -> Path:
    """A copy of a one-file checkpoint with another value in one tensor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name][place] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_weight_that_is_not_finite_is_refused_before_the_work(
    run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = with_tensor(tiny_checkpoint("llama"), tmp_path / "broken", name, (3, 4), float("nan"))
    assert name in refused(run, tmp_path, "run", broken, "-o", tmp_path / "out", *small)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dry", [False, True])
def test_failed_work_is_exit_code_1_and_leaves_nothing_but_finished_blocks(
    dry: bool, layer: int, run: Run, tiny_checkpoint: Any, small: list[str], tmp_path: Path
) -> None:
    # Finite, but what comes out of this norm is not.
    norm = f"model.layers.{layer}.post_attention_layernorm.weight"
    broken = with_tensor(tiny_checkpoint("llama"), tmp_path / "broken", norm, 5, 3e38)
    request = ["run", broken, "-o", tmp_path / "out", *small]
    code, _, err = run(*request, *(["--dry-run"] if dry else []))
    left = {path.name for path in tmp_path.iterdir()}
    if dry and layer:  # which measures block 0 only
        assert code == 0, err
        assert left == {"broken"}
        return
    assert code == 1, err
    assert 0 < len(err.splitlines()) <= SCREEN
    assert "Traceback" not in err
    assert f"model.layers.{layer}.mlp.gate_proj" in (message := " ".join(err.split()))
    assert left == {"broken"} | ({".out.partial"} if layer else set())
    if not dry:
        assert ("--resume" in message) == (layer > 0)
        code, out, err = run(*request, "--resume", "--on-failure", "skip-to-bf16")
        assert code == 0, err
        assert f"model.layers.{layer}.mlp.gate_proj" in out
        assert {path.name for path in tmp_path.iterdir()} == {"broken", "out"}


def receive(*signals: signal.Signals) -> list[str]:
    """What a listener's life comes to between an event, some signals, and another event."""
    lived = []
    try:
        with cli.progress_bars(stops_between=True) as on_progress:
            on_progress(Progress("a", 0, 2))
            for number in signals:
                signal.raise_signal(number)
                lived.append("went on")
            on_progress(Progress("a", 1, 2))
            lived.append("ended")
    except BaseException as error:
        lived.append(repr(error))
    return lived


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as on a terminal: what a shell starts in the background inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_first_signal_stops_between_events_and_the_second_at_once() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert receive() == ["ended"]
    assert receive(signal.SIGINT) == ["went on", "KeyboardInterrupt()"]
    assert receive(signal.SIGTERM) == ["went on", "SystemExit(143)"]
    assert receive(signal.SIGINT, signal.SIGINT) == ["went on", "KeyboardInterrupt()"]
    assert receive(signal.SIGTERM, signal.SIGINT) == ["went on", "KeyboardInterrupt()"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("stage", "done", "said"),
    [
        ("calibration data", 1, "stopped before the first block was done; nothing was left"),
        ("quantize", 2, "stopped before the first block was done; nothing was left behind"),
        ("quantize", 6, "stopped; 1 blocks are done and kept. To go on, run the same command with"),
        ("write", 0, "stopped; 2 blocks are done and kept. To go on, run the same command with"),
        ("write", 1, "is complete"),
    ],
)
def test_interrupted_command_says_what_is_kept(
    stage: str,
    done: int,
    said: str,
    run: Run,
    tiny_checkpoint: Any,
    small: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = calibration.quantize

    def interrupted(*arguments: Any, on_progress: Any, **options: Any) -> Any:
        def listen(event: Progress) -> None:
            if (event.stage, event.done) == (stage, done):
                signal.raise_signal(signal.SIGINT)
            on_progress(event)

        return original(*arguments, on_progress=listen, **options)

    monkeypatch.setattr(calibration, "quantize", interrupted)
    code, _, err = run("run", tiny_checkpoint("llama"), "-o", tmp_path / "out", *small)
    assert code == 130, err
    assert said in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == {
        "nothing": [],
        "done": [".out.partial"],
        "is": ["out"],
    }["nothing" if "nothing" in said else "done" if "kept" in said else "is"]
