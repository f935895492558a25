"""The GPU benchmarks' arithmetic on known numbers, and their checks in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import attention, checks, gpu, worker
from benchmarks.gemm import contestants, random_weight
from benchmarks.roofline import (
    Peaks,
    Work,
    decode_work,
    floor_us,
    gemm_work,
    plot,
    prefill_work,
    rates,
)
from benchmarks.timing import copies, measure, summarize
from quant_kernels import dispatch
from quant_kernels.formats import WeightFormat, every_format
from quant_kernels.packing import join_weight, split_weight

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_median_and_the_spread_of_known_samples():
    timing = summarize([*range(101, 0, -1)], "graph")
    assert (timing.us, timing.samples, timing.how) == (51, 101, "graph")
    assert timing.spread == pytest.approx((91 - 11) / 51)
    assert summarize([4.0, 2.0], "events").us == 3.0
    assert summarize([7.0], "events").spread == 0.0


def test_buffers_evict_one_another():
    l2 = 50 * 2**20
    for size in (1000, 2**20, 12 * 2**20, 60 * 2**20, 2**30):
        number = copies(size, l2)
        assert number >= 2
        assert (number - 1) * size >= 2 * l2 or number == 128


def test_a_call_is_timed_by_itself():
    timing = measure([lambda: time.sleep(0.002)] * 3, CPU)
    assert timing.us >= 2000
    assert timing.how == "clock"


def test_the_floor_is_the_larger_of_two_times():
    peaks = Peaks(bandwidth=4e12, operations={"fp8": 1e15})
    assert floor_us(Work(2e12, 4e6, "fp8"), peaks) == pytest.approx(2000)
    assert floor_us(Work(2e6, 8e9, "fp8"), peaks) == pytest.approx(2000)
    found = rates(Work(2e12, 4e6, "fp8"), 4000.0, peaks)
    assert found["roofline"] == pytest.approx(0.5)
    assert found["tflops"] == pytest.approx(500)
    assert found["gbps"] == pytest.approx(1)
    assert rates(Work(1.0, 1.0, "int8"), 1.0, peaks)["roofline"] is None


def test_work_counts_every_stored_byte_once():
    # 3 tokens of 256 codes and a scale; 5 rows of 128 bytes, 2 group scales in FP16 and a unit in
    # FP32; 15 outputs in BF16.
    lut = gemm_work(3, 5, 256, WeightFormat("w4afp8", 128, "lut"))
    assert lut == Work(2 * 3 * 5 * 256, 3 * 260 + 5 * (128 + 4 + 4) + 30, "fp8")
    channel = gemm_work(3, 5, 256, WeightFormat("w4a8", -1, "int8"))
    assert channel.bytes == 3 * 260 + 5 * (128 + 4) + 30
    # Two sequences of 7 tokens and 2 KV heads: 4 bytes of key codes, 4 of values, 8 of scales.
    decode = decode_work(2, 7, 6, 2, 8)
    assert decode.bytes == 2 * (7 * 2 * 16 + 6 * (8 + 4 + 16))
    assert decode.operations == 4 * 2 * 7 * 8 * 6
    assert prefill_work(3, 6, 2, 8).operations == 4 * (1 + 2 + 3) * 8 * 6


def test_goals_are_counted_per_backend_and_format():
    cases = ((1, "a", 2.0), (16, "a", 4.5), (4096, "a", 1.7), (1, "b", 4.0))
    rows = [
        {"n": 28672, "k": 4096, "m": m, "format": fmt, "backend": "triton", "x_bf16": ratio}
        | {"names": (), "bandwidth": 0.5}
        for m, fmt, ratio in cases
    ]
    other = {**rows[0], "backend": "cutlass", "x_bf16": 3.5}
    small = {**rows[0], "n": 4096, "x_bf16": 0.1}
    tables = {"gemm": [*rows, other, small], "gate_up": [], "attention": []}
    found = {row["goal"]: row for row in gpu.goals(tables)}
    name = "M <= 16, 30 MB of codes and more: x bf16"
    decode = found[f"{name} triton a"]
    assert (decode["shapes"], decode["reached"], decode["least"]) == (2, 1, 2.0)
    assert decode["mean"] == pytest.approx(3.0)
    assert found[f"{name} cutlass a"]["reached"] == 1
    assert found["M <= 16, 30 MB and more: of the copy bandwidth triton a"]["reached"] == 0
    assert found["M >= 2048: x bf16 triton a"]["reached"] == 1
    assert found["M >= 2048: x FP8"]["mean"] is None
    assert found["prefill attention, 4k to 32k: x SDPA"]["mean"] is None


def test_ffn_shapes_are_found_by_their_names():
    ffn = {"m": gpu.FFN_TOKENS, "names": ("Llama-3-8B gate_up",), "n": 1, "k": 1}
    goal = next(goal for goal in gpu.GOALS if goal.name.startswith("FFN"))
    assert goal.covers(ffn)
    assert not goal.covers({**ffn, "names": ("Llama-3-8B qkv",)})
    assert not goal.covers({**ffn, "m": 4096})


def test_hopper_kernels_that_cannot_run_are_named():
    assert "cutlass" in gpu.unavailable(CPU)
    assert attention.backends("decode_attention", CPU) == ["triton"]
    assert contestants(WeightFormat("w4afp8", 128, "lut"), CPU) == ["triton"]
    assert gpu.name_of("gemm_w4a8: [1, 2]", "triton") == "gemm_w4a8: [1, 2]"
    assert gpu.name_of("gemm_w4a8: [1, 2]", "cutlass") == "gemm_w4a8 (cutlass): [1, 2]"


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_random_weights_are_legal(fmt):
    # A weight whose scales are on the grid goes to the checkpoint's layout and back unchanged.
    weight = random_weight(40, 384, fmt, CPU)
    again = split_weight(join_weight(weight))
    for name in ("codes", "t", "c"):
        assert torch.equal(getattr(weight, name), getattr(again, name)), name
    assert weight.codes.unique().numel() == 256


def _call(broken):
    """A doubling op on [4, 8], whose kernel is made by `broken`."""
    x = torch.arange(32.0).view(4, 8) + 1

    def run(backend, out):
        out["y"].copy_(2 * x) if backend == "reference" else broken(x, out["y"])

    def judge(wanted, found):
        return {"share": checks.close("y", wanted["y"], found["y"], 0.25)}

    return checks.Call(lambda: {"y": checks.poison((4, 8), torch.float32, CPU)}, run, judge)


def test_checks_find_what_a_broken_kernel_does():
    times = iter(range(1, 10))
    kernels = {
        "": lambda x, y: y.copy_(2 * x),
        "elements are off": lambda x, y: y[:3].copy_(2 * x[:3]),  # a row nobody wrote
        "32 of 32 elements": lambda x, y: y.copy_(2 * x + 0.3),
        "a second run": lambda x, y: y.copy_(2 * x + next(times) * 2.0**-6),
    }
    for message, kernel in kernels.items():
        trial = checks.Trial("double", "[4, 8]", lambda _, kernel=kernel: _call(kernel))
        if message:
            with pytest.raises(checks.Wrong, match=message):
                checks.run(trial, CPU)
        else:
            assert checks.run(trial, CPU) == {"share": 0.0}


def test_codes_may_be_a_step_off_and_no_more():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) < 126]
    up = torch.where(codes >= 128, codes - 1, codes + 1)
    up[codes == 128] = 1  # -0, and the number above it
    codes, up = (x.view(torch.float8_e4m3fn) for x in (codes, up))
    assert checks.code_steps("codes", codes, codes, 0.0) == 0.0
    assert checks.code_steps("codes", codes, up, 1.0) > 0.9
    with pytest.raises(checks.Wrong, match="are off by a step"):
        checks.code_steps("codes", codes, up, 0.5)
    with pytest.raises(checks.Wrong, match="up to 2 steps"):
        checks.code_steps(
            "codes",
            torch.tensor([3, 5], dtype=torch.int8),
            torch.tensor([3, 7], dtype=torch.int8),
            1.0,
        )


CHILD = f"""
import os, sys, time, pathlib
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from benchmarks.worker import Item, work
def fail(): raise ValueError("no such tile")
items = [Item("good", lambda: 1), Item("raises", fail), Item("dies", lambda: os._exit(9)),
         Item("after", lambda: 2)]
sys.exit(work(items, pathlib.Path(sys.argv[1]), time.time() + 60))
"""


def test_an_item_that_kills_its_process_costs_only_itself(tmp_path):
    log = tmp_path / "work.jsonl"
    records = worker.supervise([sys.executable, "-c", CHILD, str(log)], log, time.time() + 60)
    assert [records[key].get("result") for key in ("good", "after")] == [1, 2]
    assert "no such tile" in records["raises"]["error"]
    assert "code 9" in records["dies"]["error"]


def test_a_process_that_cannot_start_is_reported_once(tmp_path):
    log = tmp_path / "work.jsonl"
    command = [sys.executable, "-c", "raise SystemExit('no device')"]
    (record,) = worker.supervise(command, log, time.time() + 60).values()
    assert "no device" in record["error"]


SLOW_CHILD = f"""
import sys, time, pathlib
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from benchmarks.worker import Item, work
items = [Item("quick", lambda: 1), Item("hangs", lambda: time.sleep(600)), Item("next", lambda: 2)]
sys.exit(work(items, pathlib.Path(sys.argv[1]), float(sys.argv[2])))
"""


def test_an_item_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SILENCE_S", 5.0)
    log, end = tmp_path / "work.jsonl", time.time() + 120
    command = [sys.executable, "-c", SLOW_CHILD, str(log), str(end)]
    records = worker.supervise(command, log, end)
    assert (records["quick"]["result"], records["next"]["result"]) == (1, 2)
    assert "nothing came" in records["hangs"]["error"]


def test_an_item_past_the_deadline_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "GRACE_S", 0.5)
    log, end = tmp_path / "work.jsonl", time.time() + 3
    command = [sys.executable, "-c", SLOW_CHILD, str(log), str(end)]
    records = worker.supervise(command, log, end)
    assert not any("error" in record for record in records.values())
    assert time.time() < end + 5


def test_the_roofline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"operations": 1e9, "bytes": 1e7, "type": "fp8", "us": 10.0}
    assert plot([row], Peaks(4e12, {"fp8": 1e15}), tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_op_is_checked_and_timed_in_the_interpreter(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--small", "--json", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    checked, measured = found["checks"], found["measured"]
    assert checked["skipped"] == measured["skipped"] == []
    of_ours = set(dispatch.OPS) - set(dispatch.DENSE_OPS)  # on a GPU that is torch's
    assert {key.partition(":")[0] for key in checked["records"]} == of_ours
    assert measured["failed"] == {}
    assert len(measured["gemm"]) == 2 * 2  # formats, and a block's distinct linears
    assert {row["op"] for row in measured["attention"]} == {"prefill", "decode"}
    assert [(row["n"], row["k"]) for row in measured["gate_up"]] == 2 * [(256, 128)]
    for row in measured["gate_up"]:
        assert row["x_apart"] == pytest.approx(row["apart_us"] / row["us"])
    for row in (*measured["gemm"], *measured["attention"]):
        assert row["us"] > 0
        assert row["x_bf16"] == pytest.approx(row["bf16_us"] / row["us"])
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
