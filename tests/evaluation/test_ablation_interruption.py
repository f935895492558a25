"""An ablation that is interrupted goes on in the block that it was in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quant.calibration.resume import finished_blocks

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.parametrize("to_all", [True, False])
def test_interrupted_in_a_block_and_continued_after_it(
    to_all: bool, deep_checkpoint: Path, tmp_path: Path
) -> None:
    """By Ctrl-C, which all processes of a terminal receive, or by a signal to the one alone."""
    letters = random.Random(5)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(letters.randrange(32, 127)) for _ in range(40_000)))
    calibration = {
        "dataset": str(text),
        "num_calibration_samples": 40,
        "max_seq_length": 200,
    }
    spec = {
        "calibration": calibration,
        "perplexity": [{"dataset": str(text), "max_seq_length": 64, "max_windows": 2}],
        "rows": [{"name": "gptq", "recipe": "gptq", "group_size": 64}],
    }
    rows, folder = tmp_path / "rows.yaml", tmp_path / "results"
    rows.write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "quant", "ablation", str(deep_checkpoint), "-o", str(folder)]
    command += ["--rows", str(rows), "--no-plot", "--device", "cpu"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )

    def checkpoint() -> Path | None:
        return next((path / "checkpoint" for path in folder.glob("work/gptq-*")), None)

    process = start()
    end = time.monotonic() + 120
    while (path := checkpoint()) is None or not finished_blocks(path):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it still runs
    done = finished_blocks(path)
    assert 1 <= done < 4
    process = start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "gptq" in out
    run = json.loads((path.parent / "run.json").read_text())
    assert run["resumed_blocks"] == done
