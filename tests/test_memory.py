"""Memory: what the process takes, what it may still take, and what "auto" makes of it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quant.calibration.plan as plan_module
from quant import memory
from quant.calibration.quantize import plan

ROOT = Path(__file__).parents[1]
MIB = 2**20
LIMITED = """
import resource, sys
limit = getattr(resource, sys.argv[1])
from quant.memory import available_bytes, _status
before = available_bytes()
used = _status(sys.argv[2])
resource.setrlimit(limit, (used + 300 * 2**20, resource.RLIM_INFINITY))
print(before, available_bytes())
"""


@pytest.mark.parametrize(("limit", "used"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_available_respects_the_limits_of_the_process(limit: str, used: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, limit, used],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert before > 300 * MIB
    assert 290 * MIB < after <= 300 * MIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """available_bytes() of a machine with 64 GiB left, a cgroup file and its limits."""

    def available(cgroup: str, limits: dict[str, str], resident: int = 100 * MIB) -> int:
        root = tmp_path / "cgroup"
        for name, text in limits.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (tmp_path / "self").write_text(cgroup)

        def read_text(path: Path, *arguments: Any, **options: Any) -> str:
            here = tmp_path / "self" if str(path) == "/proc/self/cgroup" else path
            return original(here, *arguments, **options)

        original = Path.read_text
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read_text)
            patch.setattr(memory, "CGROUPS", root)
            patch.setattr(memory, "resident_bytes", lambda: resident)
            patch.setattr(memory, "_meminfo", lambda _: 64 * 1024 * MIB)
            patch.setattr(
                memory.resource, "getrlimit", lambda _: (memory.resource.RLIM_INFINITY,) * 2
            )
            return memory.available_bytes()

    return available


NONE = 64 * 1024 * MIB


@pytest.mark.parametrize(
    ("cgroup", "limits", "available"),
    [
        ("0::/\n", {}, NONE),
        ("0::/\n", {"memory.max": "max\n"}, NONE),
        ("0::/\n", {"memory.max": f"{500 * MIB}\n"}, 400 * MIB),
        ("0::/job/step\n", {"job/step/memory.max": f"{500 * MIB}\n"}, 400 * MIB),
        # A group above, of those that the process is in, is the tighter one.
        (
            "0::/job/step\n",
            {"job/step/memory.max": f"{900 * MIB}", "job/memory.max": f"{300 * MIB}"},
            200 * MIB,
        ),
        ("0::/job\n", {"other/memory.max": f"{300 * MIB}"}, NONE),
        (
            "5:cpu,memory:/job\n3:pids:/x\n",
            {"memory/job/memory.limit_in_bytes": f"{600 * MIB}"},
            500 * MIB,
        ),
        ("3:pids:/job\n", {"memory/job/memory.limit_in_bytes": f"{600 * MIB}"}, NONE),
        ("0::/\n", {"memory.max": f"{50 * MIB}"}, 0),  # never negative
        ("rubbish", {}, NONE),
        ("0::/job:with:colons\n", {"job:with:colons/memory.max": f"{500 * MIB}"}, 400 * MIB),
    ],
)
def test_available_respects_the_limits_of_the_cgroups(
    cgroup: str, limits: dict[str, str], available: int, machine: Any
) -> None:
    assert machine(cgroup, limits) == available


def test_available_is_no_more_than_the_machine_has() -> None:
    total = memory._kilobytes(Path("/proc/meminfo"), "MemTotal")
    assert total is not None
    assert 0 < memory.available_bytes() < total


def test_peak_sees_what_was_freed_and_a_reset_forgets_it() -> None:
    memory.reset_peak_memory()
    before = memory.peak_memory_bytes()
    # Not from the heap: it may keep what is freed, in a hole that earlier tests left.
    with mmap.mmap(-1, 64 * MIB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert memory.peak_memory_bytes() - before > 60 * MIB
    assert memory.resident_bytes() < memory.peak_memory_bytes()
    memory.reset_peak_memory()
    assert memory.peak_memory_bytes() - before < 30 * MIB


def test_auto_is_memory_where_there_is_room_and_disk_where_there_is_not(
    tiny_checkpoint: Any, calibration: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    def place(available: int, offload: str = "auto") -> str:
        monkeypatch.setattr(plan_module, "available_bytes", lambda: available)
        return plan(
            str(tiny_checkpoint("llama")),
            tmp_path / "out",
            device="cpu",
            activation_offload=offload,
            **calibration,
        ).activation_place

    monkeypatch.setattr(plan_module, "available_bytes", lambda: 2**50)
    planned = plan(str(tiny_checkpoint("llama")), tmp_path / "out", device="cpu", **calibration)
    needed = planned.memory_bytes
    assert planned.activation_place == "cpu"
    assert place(2 * needed) == "cpu"
    assert place(needed) == "disk"  # all of it is more than a run should take
    assert place(0) == "disk"
    assert place(0, "cpu") == "cpu"
    assert place(0, "none") == "device"
    assert place(2**50, "disk") == "disk"


CONFIG_WITHOUT_TRITON = """
import sys
from pathlib import Path
from quant.checkpoint.hf_config import decoder_config
raw = dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
           num_attention_heads=2, num_key_value_heads=1, vocab_size=100, rms_norm_eps=1e-5,
           max_position_embeddings=64, hidden_act="silu")
decoder_config(raw, Path("config.json"))
import torch
print("torch._dynamo" in sys.modules, "triton" in sys.modules, torch.version.cuda is None)
import triton
print(triton.__name__)
"""


def test_a_config_does_not_cost_a_cpu_build_of_torch_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFIG_WITHOUT_TRITON],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, later = done.stdout.split("\n")[:2]
    _, imported, cpu_build = found.split()
    assert imported != cpu_build  # with CUDA it may come, and does
    assert later == "triton"
