"""The tuner with a timer that is told what to say."""

import functools
import json
import time

import pytest

from benchmarks import tune
from benchmarks.worker import read, work

rule = functools.partial(tune.tuning.by_rule, sms=132)


@pytest.fixture
def tuned(tmp_path):
    """Records of timing cases with a timer."""

    def run(wanted, timer, deadline=60.0):
        log = tmp_path / "log.jsonl"
        found = tune.items(wanted, rule, timer)
        assert work(found, log, time.time() + deadline) == 0
        return read(log)

    return run


def a_case(n=28672, silu_mul=False):
    return tune.Case("lut", 64, n, 4096, silu_mul)


def test_the_fastest_configuration_enters_the_table(tuned, tmp_path):
    case = a_case()
    fastest = tune.configurations(case, rule)[7]

    def timer(_, config):
        if config.num_stages == 6:
            raise RuntimeError("out of shared memory")
        return 50.0 if config == fastest else 100.0

    best = tune.chosen([case], rule, tuned([case], timer))
    assert best == {case: fastest}
    path = tmp_path / "tuned" / "sm_90.json"
    old = {"entries": [tune.merged({"entries": []}, {a_case(64): fastest}, {})["entries"][0]]}
    tune.write_table(path, tune.merged(old, best, {"name": "a GPU"}))
    assert tune.tuning.read_table(path) == {case: fastest, a_case(64): fastest}
    assert json.loads(path.read_text())["measured"] == {"name": "a GPU"}
    assert [file.name for file in path.parent.iterdir()] == ["sm_90.json"]


def test_the_rule_stays_where_nothing_is_clearly_faster(tuned):
    case = a_case()
    usual = rule(case)
    records = tuned([case], lambda _, config: 101.0 if config == usual else 100.0)
    assert tune.chosen([case], rule, records) == {case: usual}


def test_a_case_that_time_ran_out_for_is_left_out(tuned):
    cases = [a_case(), a_case(4096)]
    records = tuned(cases[:1], lambda *_: 100.0)
    assert set(tune.chosen(cases, rule, records)) == {cases[0]}
    assert tuned([a_case(8192)], lambda *_: 1.0, deadline=-1.0) == records


def test_a_table_that_cannot_be_read_is_not_written(tmp_path):
    path = tmp_path / "sm_90.json"
    with pytest.raises(ValueError, match="entry 0"):
        tune.write_table(path, {"entries": [{"kind": "lut"}]})
    assert list(tmp_path.iterdir()) == []


def test_cases_are_those_of_the_models():
    found = tune.cases(["Llama-3-8B"], ["lut"], [16, 256], silu_mul=True)
    assert {(case.n, case.k) for case in found if case.silu_mul} == {(28672, 4096)}
    assert len(found) == 2 * 4 + 2
    assert {tune.tokens_of(case) for case in found} == {16, tune.TOKENS_OF_LAST}
