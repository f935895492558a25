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

from benchmarks import attention, checks, gate_up, gemm, gpu, gpu_goals, gpu_plan, libraries
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
from quant_kernels.packing import join_weight, split_weight, unpack_int4

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
    found = {row["goal"]: row for row in gpu_goals.goals(tables)}
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
    ffn = {"m": gpu_plan.FFN_TOKENS, "names": ("Llama-3-8B gate_up",), "n": 1, "k": 1}
    goal = next(goal for goal in gpu_goals.GOALS if goal.name.startswith("FFN"))
    assert goal.covers(ffn)
    assert not goal.covers({**ffn, "names": ("Llama-3-8B qkv",)})
    assert not goal.covers({**ffn, "m": 4096})


def test_hopper_kernels_that_cannot_run_are_named():
    assert "cutlass" in libraries.unavailable(CPU)
    assert attention.backends("decode_attention", CPU) == ["triton"]
    assert {who.backend for who in contestants(CPU)} == {"triton"}
    assert attention.contestants("prefill", CPU) == ["sdpa", "triton"]
    assert gpu_plan.name_of("gemm_w4a8: [1, 2]", "triton") == "gemm_w4a8: [1, 2]"
    assert gpu_plan.name_of("gemm_w4a8: [1, 2]", "cutlass") == "gemm_w4a8 (cutlass): [1, 2]"


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_random_weights_are_legal(fmt):
    # A weight whose scales are on the grid goes to the checkpoint's layout and back unchanged.
    weight = random_weight(40, 384, fmt, CPU)
    again = split_weight(join_weight(weight))
    for name in ("codes", "t", "c"):
        assert torch.equal(getattr(weight, name), getattr(again, name)), name
    assert weight.codes.unique().numel() == 256


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
def test_random_weights_stop_short_of_minus_eight_where_asked(fmt):
    codes = unpack_int4(join_weight(random_weight(40, 384, fmt, CPU, least=-7)).words)
    usual = unpack_int4(join_weight(random_weight(40, 384, fmt, CPU)).words)
    assert (int(codes.min()), int(usual.min()), int(codes.max())) == (-7, -8, 7)
    assert torch.equal(codes, usual.clamp(min=-7))


SHAPE = gemm.Shape(256, 128, ("tiny gate_up",))
LUT = WeightFormat("w4afp8", 128, "lut")


def test_a_gemms_ratios_are_joined_over_items():
    who = {name: gemm.Contestant(name, LUT) for name in ("triton", "cutlass")}
    parts = [
        gemm.about(SHAPE, 16, who["triton"]) | {"us": 2.0, "spread": 0.0, "how": "graph"},
        gemm.about(SHAPE, 16, who["cutlass"]) | {"error": "stopped: nothing came for 20 s"},
        gemm.about(SHAPE, 64, who["triton"]) | {"us": 8.0, "spread": 0.0, "how": "graph"},
        gemm.about(SHAPE, 16, gemm.TORCH[0]) | {"us": 6.0, "spread": 0.1, "how": "graph"},
        gemm.about(SHAPE, 16, gemm.TORCH[1]) | {"error": "no FP8"},
        {"backend": "quantize", "m": 16, "k": 128, "kind": "fp8", "us": 1.0, "spread": 0.0},
        {"backend": "quantize", "m": 16, "k": 128, "kind": "int8", "us": 9.0, "spread": 0.0},
    ]
    first, hung, alone = gemm.joined(parts)
    assert (first["x_bf16"], first["x_bf16_with_quantize"]) == (3.0, 2.0)
    assert (first["x_fp8"], first["fp8_error"]) == (None, "no FP8")
    assert hung["bf16_us"] == 6.0
    assert alone["x_bf16"] is None
    table = gemm.markdown([first, hung, alone]).splitlines()
    assert "| cutlass | stopped: nothing came for 20 s |" in table[3]


def test_gate_up_and_attention_are_joined_over_items():
    who = gemm.Contestant("triton", LUT)
    one, two = (gate_up.about(SHAPE, 16, who, apart) for apart in (False, True))
    (row,) = gate_up.joined([one | {"us": 2.0}, two | {"us": 3.0}])
    assert row["x_apart"] == 1.5
    assert gate_up.joined([one | {"us": 2.0}])[0]["x_apart"] is None
    shape = ("decode", gpu_plan.TINY, 2, 70)
    ours, theirs = (attention.about(*shape, backend) for backend in ("cutlass", attention.SDPA))
    (row,) = attention.joined([theirs | {"us": 9.0, "by": "flash"}, ours | {"us": 3.0}])
    assert (row["x_bf16"], row["bf16_by"], row["backend"]) == (3.0, "flash", "cutlass")
    (row,) = attention.joined([theirs | {"skipped": "needs 9 GB"}, ours | {"error": "lost"}])
    assert row["x_bf16"] is None
    assert "| lost |" in attention.markdown([row])


def test_every_time_is_an_item_of_its_own(monkeypatch):
    contestants = [gemm.Contestant(name, LUT) for name in ("triton", "cutlass", "baseline")]
    monkeypatch.setattr(gemm, "contestants", lambda device: contestants)
    monkeypatch.setattr(attention, "backends", lambda op, device: ["triton", "cutlass"])
    items = gpu_plan.measure_items(True, CPU, gpu_plan.BACKENDS)
    assert len({item.key for item in items}) == len(items)
    keys = [item.key for item in items if item.key.startswith("gemm: tiny qkv")]
    names = [key.removeprefix("gemm: tiny qkv [3, 128] x [256, 128] ") for key in keys]
    ours = [f"{backend} w4afp8 g128 lut" for backend in ("cutlass", "baseline", "triton")]
    assert names == ["bf16", "fp8", *ours]
    limits = {item.about["backend"]: item.limit for item in items if item.about}
    assert (limits["cutlass"], limits["baseline"], limits["triton"]) == (20.0, 20.0, 150.0)
    subjects = {item.subject for item in items}
    assert {"gemm_w4afp8 (cutlass)", "prefill_attention (cutlass, unpacking)"} <= subjects
    # Without Triton nothing waits for its compiler.
    ours = gpu_plan.measure_items(True, CPU, ["cutlass"])
    assert {item.about.get("backend") for item in ours} == {
        None, "bf16", "fp8", "cutlass", "sdpa", "cutlass, unpacking",
    }  # fmt: skip
    assert not any(item.about.get("apart") for item in ours)
    assert gpu_plan.compile_items(True, CPU, ["cutlass"]) == []
    assert {item.subject for item in gpu_plan.check_items(True, CPU, ["cutlass"])} == {
        f"{op} (cutlass)" for op in dispatch.CUTLASS_OPS
    }


def test_what_was_given_up_or_hung_is_named_in_the_tables():
    items = gpu_plan.measure_items(True, CPU, ["triton"])
    keys = [item.key for item in items if item.key.startswith("gemm: tiny qkv")]
    result = {"us": 2.0, "spread": 0.0, "samples": 3, "how": "events: it synchronizes"}
    records = {
        keys[0]: {"key": keys[0], "seconds": 1.0, "result": result},
        keys[2]: {"key": keys[2], "seconds": 0.0, "error": "stopped: nothing came for 20 s"},
        keys[3]: {"key": keys[3], "seconds": 0.0, "stopped": "not run: gemm (triton) took 2"},
    }
    found = gpu.measured(items, records)
    assert [row["error"] for row in found["gemm"]] == [
        "stopped: nothing came for 20 s", "not run: gemm (triton) took 2",
    ]  # fmt: skip
    assert list(found["failed"]) == [keys[2], keys[3]]
    assert len(found["skipped"]) == len(items) - 3
    lines = gpu.not_by_graph(found["gemm"])
    assert lines[0].startswith("not by graph: tiny qkv 3 triton w4afp8 g128 lut bf16_how: events")
    assert json.loads(json.dumps(found))["gemm"][0]["bf16_us"] == 2.0


def test_a_hopper_gpu_without_the_library_stops_the_run(monkeypatch, capsys):
    gpu_0 = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "capability", lambda device: dispatch.HOPPER)
    monkeypatch.setattr(dispatch.cuda, "why_unavailable", lambda: "it has ABI 4, this needs 6")
    with pytest.raises(SystemExit) as stopped:
        libraries.require_cutlass(gpu_0)
    assert stopped.value.code == 2
    assert "ABI 4" in capsys.readouterr().out
    assert "ABI 4" in libraries.require_cutlass(gpu_0, allow_missing=True)["cutlass"]
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
    assert "sm_90" in libraries.require_cutlass(gpu_0)["cutlass"]


def test_trials_reach_only_backends_that_take_them(monkeypatch):
    monkeypatch.setattr(attention, "backends", lambda op, device: ["triton", "cutlass"])
    keys = {item.key for item in gpu_plan.check_items(False, CPU, gpu_plan.BACKENDS)}
    assert any("(cutlass): " in key and "codes from -7" in key for key in keys)
    assert not any("(cutlass)" not in key and "codes from -7" in key for key in keys)
    assert not any("(cutlass)" not in key and ("soft cap" in key or "skips" in key) for key in keys)
    assert sum("ratio 16" in key for key in keys) == 3
    assert not any("cutlass" in key and "D 96" in key for key in keys)


KILLED = """
import sys, threading, time
sys.path[:0] = [{root!r}, {kernels!r}]
from benchmarks import checks, gpu, gpu_plan
gpu.WRITE_S = 0.2
sys.argv = ["gpu.py", "--device", "cpu", "--check-only", "--small", "--json", {path!r}]
sys.exit(gpu.main())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_killed_run_leaves_what_it_knew(tmp_path):
    path = tmp_path / "gpu.json"
    code = KILLED.format(root=str(ROOT), kernels=str(ROOT / "kernels"), path=str(path))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    passed = 0
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            end = time.time() + 120
            while not passed and time.time() < end and process.poll() is None:
                time.sleep(0.05)
                if path.exists():
                    passed = len(json.loads(path.read_text())["checks"]["records"])
        finally:
            process.kill()
    found = json.loads(path.read_text())["checks"]
    assert len(found["records"]) >= passed >= 1


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
        "8 of 32 elements .* 8 not finite": lambda x, y: y[:3].copy_(
            2 * x[:3]
        ),  # a row nobody wrote
        "32 of 32 elements": lambda x, y: y.copy_(2 * x + 0.3),
        "run 2 of 2": lambda x, y: y.copy_(2 * x + next(times) * 2.0**-6),
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


def test_what_was_given_up_is_counted_and_not_listed(capsys):
    stopped = {"stopped": "not run: gemm_w4a8 (cutlass) took 2 processes with it before"}
    records = {f"gemm_w4a8 (cutlass): {i}": stopped for i in range(40)}
    records["gemm_w4a8 (cutlass): x"] = {"error": "trace\nWrong: out: 3 of 9 elements are off"}
    records["rope_append: y"] = {"result": {}}
    assert gpu.print_checks({"records": records, "skipped": ["rope_append: z"]}) == 41
    said = capsys.readouterr().out.splitlines()
    assert "| gemm_w4a8 (cutlass) | 0 | 1 | 40 | 0 |" in said
    assert "| rope_append | 1 | 0 | 0 | 1 |" in said
    assert said[-2].endswith("x: Wrong: out: 3 of 9 elements are off")
    assert said[-1].startswith("  40 times: not run: gemm_w4a8 (cutlass)")


def test_humming_is_timed_where_it_was_compiled(monkeypatch):
    monkeypatch.setattr(gpu_plan.gemm.humming_peer, "why_unavailable", lambda device: None)
    chosen = ["humming", "triton"]
    timed, compiled = (
        [item for item in make(False, CPU, chosen) if "humming" in item.key]
        for make in (gpu_plan.measure_items, gpu_plan.compile_items)
    )
    assert {item.key for item in timed} == {f"gemm: {item.key}" for item in compiled}
    model, tier = gpu_plan.PLAN.models[0], gpu_plan.PLAN.tiers[0]
    assert len(timed) == len(model.linears) * len(tier.tokens) * len(gpu_plan.gemm.FORMATS)
    assert all(item.about["names"][0].startswith(model.name) for item in timed)
    assert not any("humming" in item.key for item in gpu_plan.measure_items(False, CPU, ["triton"]))
