"""The trials that check the Hopper kernels on a GPU, in the simulator: their bounds hold, and what
a kernel does wrong is seen."""

from __future__ import annotations

import ctypes

import pytest
import torch

from benchmarks import checks, gpu_smoke
from quant_kernels import cuda, cuda_attention, cuda_gemm, dispatch

CPU = torch.device("cpu")
SMS = 5  # blocks of a launch; more are simulated for longer
GEMMS = gpu_smoke.gemm_cases(SMS)
PREFILLS, DECODES = gpu_smoke.prefill_cases(), gpu_smoke.decode_cases()


@pytest.fixture
def simulated(simulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend cutlass starts its kernels in the simulator."""

    def finish(said: bytes | None) -> None:
        if said is not None:
            raise RuntimeError(said.decode())

    def flags(count: int) -> ctypes.c_void_p:
        held = torch.zeros(count, dtype=torch.int32)
        kept.append(held)
        return ctypes.c_void_p(held.data_ptr())

    def gemm(config, *tensors) -> None:
        call = cuda_gemm.describe(config, *tensors)
        room = flags(config.workers * config.cluster)
        finish(simulator.quant_simulate_gemm(ctypes.byref(call), room, 4, False, 0))

    def start(op: str, call, device: torch.device) -> None:
        if op == "prefill_attention":
            finish(simulator.quant_simulate_prefill(ctypes.byref(call), 2, False, 0))
        else:
            room = flags(call.workers)
            finish(simulator.quant_simulate_decode(ctypes.byref(call), room, 2, False, 0))

    kept: list[torch.Tensor] = []
    for name in ("gemm", "prefill", "decode"):
        getattr(simulator, f"quant_simulate_{name}").restype = ctypes.c_char_p
    simulator.quant_cuda_prefill_workspace.restype = ctypes.c_int64
    monkeypatch.setattr(cuda_gemm, "run", gemm)
    monkeypatch.setattr(cuda_attention, "_start", start)
    monkeypatch.setattr(cuda_attention, "worker_count", lambda *_: SMS)
    for module in (cuda_gemm, cuda_attention):
        monkeypatch.setattr(module, "multiprocessors", lambda _: SMS)
    monkeypatch.setattr(cuda, "library", lambda: simulator)
    monkeypatch.setattr(dispatch, "_why_no_cutlass", lambda op, device: None)


def run(case) -> checks.Figures:
    return checks.run(case.trial(("cutlass",)), CPU, "cutlass")


def smallest(cases, count):
    """Every so many of the cases whose tiles have few tokens."""
    few = [case for case in cases if case.config.tile_tokens <= 32]
    return few[:: max(1, len(few) // count)]


@pytest.mark.parametrize("case", [*GEMMS[:18], *smallest(GEMMS[18:], 12)], ids=lambda c: c.label)
def test_gemms_pass(simulated, case):
    figures = run(case)
    assert figures["share_of_bound"] <= 1


@pytest.mark.parametrize(
    "case",
    [*PREFILLS[:24:5], *PREFILLS[48:72:7], PREFILLS[72], PREFILLS[86]],
    ids=lambda c: c.label,
)
def test_prefills_pass(simulated, case):
    figures = run(case)
    assert figures["share_of_bound"] <= 1


@pytest.mark.parametrize("case", DECODES[:72:7], ids=lambda c: c.label)
def test_decodes_pass(simulated, case):
    figures = run(case)
    assert figures["share_of_bound"] <= 1


def test_a_wrong_row_of_a_gemm_is_named(simulated, monkeypatch):
    right = cuda_gemm.run

    def wrong(config, codes, scale, weight, out, *rest):
        right(config, codes, scale, weight, out, *rest)
        out[7, 3:5] = float("nan")
        out[9, 100] += 100

    monkeypatch.setattr(cuda_gemm, "run", wrong)
    said = (
        r"out: 3 of 2048 elements of \[16, 128\] are off, in \[7\.\.9, 3\.\.100\], 2 not finite; "
        r"the largest finite error 100 at \[9, 100\]; the first, \[7, 3\]: nan, wanted "
    )
    with pytest.raises(checks.Wrong, match=said):
        run(GEMMS[0])


def test_a_launch_that_finds_other_bits_is_named(simulated, monkeypatch):
    right, calls = cuda_gemm.run, []

    def wrong(config, codes, scale, weight, out, *rest):
        right(config, codes, scale, weight, out, *rest)
        calls.append(out)
        if len(calls) == 3:
            out[2, 5] *= 1.5

    monkeypatch.setattr(cuda_gemm, "run", wrong)
    trial = GEMMS[0].trial(("cutlass",))
    with pytest.raises(checks.Wrong, match=r"run 3 of 5 .*\[2\.\.2, 5\.\.5\]; the first, \[2, 5\]"):
        checks.run(trial, CPU, "cutlass", launches=4)
