"""Recorded calls, made again, do what the ops did, on what then lies in the same memory."""

import threading

import pytest
import torch

from quant_kernels import cpu, ops
from quant_kernels.cpu_calls import Replay, invoke, record
from quant_kernels.formats import WeightFormat
from tests.quant_kernels.test_ops import packed


class Steps:
    """Three ops in a row, on memory of their own."""

    def __init__(self) -> None:
        self.weight = ops.prepare(packed(48, 64, WeightFormat("w4a8", 32, "int8")), backend="cpu")
        self.x, self.norm = torch.randn(3, 64), torch.rand(64)
        self.codes, self.scale = torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, 1)
        self.y, self.out, self.dense = torch.zeros(3, 48), torch.zeros(3, 5), torch.randn(5, 48)

    def run(self) -> None:
        ops.rms_norm_quantize(self.x, self.norm, 1e-5, self.codes, self.scale, backend="cpu")
        ops.gemm(self.codes, self.scale, self.weight, self.y, backend="cpu")
        ops.linear(self.y, self.dense, self.out, backend="cpu")


def test_a_replay_is_the_ops_on_new_numbers():
    steps = Steps()
    with record() as calls:
        steps.run()
    assert [op for op, _ in calls] == ["rms_norm_quantize", "gemm", "linear"]
    replay = Replay(calls)
    for _ in range(3):
        steps.x.normal_()
        replay()
        found = steps.out.clone()
        assert bool((found != 0).all())
        steps.out.zero_()
        steps.run()
        assert torch.equal(steps.out, found)


def test_only_what_this_thread_calls_meanwhile_is_recorded():
    steps, other = Steps(), Steps()
    steps.run()
    with record() as outer:
        steps.run()
        with record() as inner:
            steps.run()
        thread = threading.Thread(target=other.run)
        thread.start()
        thread.join()
    steps.run()
    assert len(outer) == len(inner) == 3
    Replay([])()


def test_a_call_that_fails_is_named_and_not_recorded():
    with record() as calls, pytest.raises(RuntimeError, match="linear: a pointer is null"):
        invoke("linear", bytes(6 * 8) + b"".join(n.to_bytes(8, "little") for n in (0, 1, 1, 1, 1)))
    assert calls == []
    steps = Steps()
    with record() as calls:
        steps.run()
    null = ("linear", bytes(7 * 8) + b"".join(n.to_bytes(8, "little") for n in (1, 1, 1, 1)))
    steps.out.zero_()
    with pytest.raises(RuntimeError, match="replay: a pointer is null"):
        Replay([calls[0], null, calls[2]])()
    assert bool((steps.out == 0).all())  # what stands behind it was not run


def test_an_unknown_op_is_refused(monkeypatch):
    monkeypatch.setattr("quant_kernels.cpu_calls.OPS", ("no op",) * 99 + ("linear",))
    with pytest.raises(RuntimeError, match="replay: a replayed call is of an unknown op"):
        Replay([("linear", bytes(88))])()
    assert cpu.available()
