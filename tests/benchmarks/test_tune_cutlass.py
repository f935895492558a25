"""The choice of the Hopper kernels' tuner, on made-up times."""

from benchmarks import tune_cutlass
from quant_kernels.cuda_tuning import Case


def records(case, seconds):
    every = tune_cutlass.configurations(case, 132)
    return {tune_cutlass.key_of(case, c): {"result": seconds(i)} for i, c in enumerate(every)}


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


def test_cases_are_those_of_the_kernels_that_random_weights_need():
    found = tune_cutlass.cases(["Llama-3-8B"], ["lut", "int8"], [16])
    assert {case.kind for case in found} == {"lut-8", "int8"}
    assert sum(case.silu_mul for case in found) == 2
