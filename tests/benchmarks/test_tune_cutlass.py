"""The choice of the Hopper kernels' tuner, on made-up times, and what it leaves out."""

import pytest
import torch

from benchmarks import checks, tune_cutlass
from benchmarks.timing import Timing
from quant_kernels import cuda_gemm, reference
from quant_kernels.cuda_tuning import KINDS, Case, Config, parse_table
from quant_kernels.fragments import fragment_weight, unfragment_weight
from quant_kernels.packing import join_weight

CPU = torch.device("cpu")


def records(case, seconds, bits=lambda i: 7):
    every = tune_cutlass.configurations(case, 132)
    return {
        tune_cutlass.key_of(case, c): {"result": {"us": seconds(i), "bits": bits(i)}}
        for i, c in enumerate(every)
    }


def test_the_fastest_wins_and_the_model_stays_within_noise():
    case = Case("lut-8", 128, 16, 4096, 4096, False)
    every = tune_cutlass.configurations(case, 132)
    assert len(every) == len(set(every)) > 3
    fastest = tune_cutlass.best([case], 132, records(case, lambda i: 5.0 if i == 2 else 10.0 + i))
    assert fastest == {case: (every[2], 5.0)}
    close = tune_cutlass.best([case], 132, records(case, lambda i: 9.9 if i == 2 else 10.0))
    assert close == {case: (every[0], 10.0)}


def test_a_case_whose_time_ran_out_is_left_out():
    case = Case("int8", 128, 64, 4096, 4096, False)
    some = dict(list(records(case, float).items())[:-1])
    assert tune_cutlass.best([case], 132, some) == {}
    failed = {key: {"error": "no"} for key in records(case, float)}
    assert tune_cutlass.best([case], 132, failed) == {}


def test_a_candidate_with_other_bits_is_left_out_and_named():
    case = Case("int8", 128, 16, 4096, 4096, False)
    every = tune_cutlass.configurations(case, 132)
    found = records(case, lambda i: 5.0 if i == 2 else 10.0 + i, lambda i: 8 if i == 2 else 7)
    assert tune_cutlass.best([case], 132, found) == {case: (every[0], 10.0)}
    assert list(tune_cutlass.troubles([case], 132, found)) == [(case, every[2])]
    # FP8 sums depend on how K is split: their metric is judged where they are made.
    fp8 = Case("lut-8", 128, 16, 4096, 4096, False)
    found = records(fp8, lambda i: 5.0 if i == 2 else 10.0 + i, lambda i: i)
    assert tune_cutlass.best([fp8], 132, found)[fp8][1] == 5.0
    assert tune_cutlass.troubles([fp8], 132, found) == {}


def test_a_candidate_that_fails_is_named_and_the_others_are_compared():
    case = Case("int8", 128, 16, 4096, 4096, False)
    every = tune_cutlass.configurations(case, 132)
    found = records(case, lambda i: 10.0)
    found[tune_cutlass.key_of(case, every[0])] = {"error": "a\nWrong: out: error metric 0.5"}
    assert tune_cutlass.best([case], 132, found) == {case: (every[1], 10.0)}
    left_out = tune_cutlass.troubles([case], 132, found)
    assert left_out == {(case, every[0]): "Wrong: out: error metric 0.5"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("silu_mul", [False, True])
def test_a_wrong_output_is_not_timed(monkeypatch, kind, silu_mul):
    case, config = Case(kind, 128, 16, 256, 384, silu_mul), Config(16, 1, 3, True)
    timing, scale_by = Timing(9.0, 0.0, 1, "graph"), [1.0]
    monkeypatch.setattr(tune_cutlass, "measure", lambda calls, *_, **__: timing)
    monkeypatch.setattr(tune_cutlass, "prepared", lambda w, _: fragment_weight(join_weight(w)))

    def run(config, codes, scale, weight, out, bias, residual, silu, workspace):
        y = reference.gemm(codes, scale, unfragment_weight(weight), None, torch.float32)
        out.copy_((reference.silu_mul(y) if silu else y) * scale_by[0])
        assert cuda_gemm.kind_of(weight) == kind

    monkeypatch.setattr(cuda_gemm, "run", run)
    tune_cutlass.weights.cache_clear()
    found = tune_cutlass.time_of(CPU, case, config)
    assert found["us"] == 9.0
    assert tune_cutlass.time_of(CPU, case, config)["bits"] == found["bits"]
    scale_by[0] = 1.5
    with pytest.raises(checks.Wrong, match="error metric"):
        tune_cutlass.time_of(CPU, case, config)


def test_cases_are_those_of_the_kernels():
    found = tune_cutlass.cases(["Llama-3-8B"], ["lut-8", "int8"], [16])
    assert {case.kind for case in found} == {"lut-8", "int8"}
    assert sum(case.silu_mul for case in found) == 2


def test_the_table_that_is_written_can_be_read():
    case, old = Case("lut", 128, 16, 256, 384, False), Case("int8", 128, 16, 256, 384, False)
    table = {old: Config(16, 1, 2, False)}
    best = {case: (Config(32, 1, 3, True), 5.0)}
    content = tune_cutlass.content_of(table, best, {"name": "a GPU"})
    assert parse_table(content, "a table") == table | {case: Config(32, 1, 3, True)}
