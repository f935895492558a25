"""Each limit excludes exactly the tokens it should, and a request's draws are its own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.errors import RequestError, WorkFailed
from quant.runtime.sampling import (
    SamplingParams,
    draw,
    penalized,
    sample,
    token_logprobs,
    token_weights,
)

VOCABULARY = 23


def random_logits(seed: int, rows: int = 1) -> Tensor:
    """Logits [rows, VOCABULARY], no two of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, VOCABULARY, generator=generator)


def by_hand(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """token -> probability of what is left, one rule after the other, in Python's floats."""
    scaled = [logit / params.temperature for logit in logits]
    left = {i: math.exp(z - max(scaled)) for i, z in enumerate(scaled)}

    def normalized() -> dict[int, float]:
        total = sum(left.values())
        return {i: w / total for i, w in left.items()}

    highest = max(normalized().values())
    left = {i: p for i, p in normalized().items() if p >= params.min_p * highest}
    ranked = sorted(left, key=lambda i: (-left[i], i))
    if params.top_k > 0:
        left = {i: left[i] for i in ranked[: params.top_k]}
    if params.top_p < 1:
        probabilities = normalized()
        kept, mass = {}, 0.0
        for i in ranked[: len(left)]:
            if mass >= params.top_p:
                break
            kept[i] = probabilities[i]
            mass += probabilities[i]
        left = kept
    return normalized()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(-1, VOCABULARY + 2),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
)
def test_limits_exclude_what_the_formulas_say(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed)
    weights = token_weights(logits, [params])[0]
    expected = by_hand(logits[0].tolist(), params)
    assert set(weights.nonzero().flatten().tolist()) == set(expected)
    probabilities = (weights / weights.sum()).tolist()
    for token, probability in expected.items():
        assert probabilities[token] == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1, "temperature": 100.0}, {1}),
        ({"top_p": 0.49}, {1}),
        ({"top_p": 0.51}, {1, 3}),
        ({"top_p": 0.81}, {0, 1, 3}),
        ({"min_p": 0.59}, {1, 3}),
        ({"min_p": 0.61}, {1}),
        ({"min_p": 1.0}, {1}),
        # Of 0.5, 0.3, 0.15 and 0.05, top_k leaves 0.625 and 0.375: the first is enough for 0.6.
        ({"top_k": 2, "top_p": 0.6}, {1}),
        ({"top_k": 2, "top_p": 0.63}, {1, 3}),
        # Probabilities to the power of 1/2 are flatter: 0.379, 0.294, 0.208, 0.120.
        ({"temperature": 2.0, "top_p": 0.51}, {1, 3}),
        ({"temperature": 2.0, "top_p": 0.7}, {0, 1, 3}),
    ],
)
def test_limits_on_a_known_distribution(params: dict[str, Any], tokens: set[int]) -> None:
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    weights = token_weights(logits, [SamplingParams(**params)])
    assert set(weights[0].nonzero().flatten().tolist()) == tokens
    drawn = draw(weights.expand(500, -1), torch.rand(500, dtype=torch.float64))
    assert set(drawn.tolist()) <= tokens


def test_ties_go_to_the_lower_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0]])
    weights = token_weights(logits, [SamplingParams(top_k=2)])
    assert weights[0].nonzero().flatten().tolist() == [1, 2]
    # Two of four equal tokens are half of the mass, exactly.
    weights = token_weights(torch.zeros(1, 4), [SamplingParams(top_p=0.5)])
    assert weights[0].nonzero().flatten().tolist() == [0, 1]


def test_draw_is_the_inverse_of_the_cumulative_sum() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 5.0, 0.0], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.3749, 0.375, 0.9, 1 - 2**-53]).double()
    tokens = draw(weights.expand(len(uniforms), -1), uniforms)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4, 4]


@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(any))
def test_draw_never_leaves_the_support(weights: list[float]) -> None:
    row = torch.tensor([weights], dtype=torch.float64)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        token = int(draw(row, torch.tensor([uniform], dtype=torch.float64)))
        assert weights[token] > 0


def test_frequencies_are_the_probabilities() -> None:
    probabilities = [0.2, 0.5, 0.3]
    logits = torch.tensor([probabilities]).log()
    params = SamplingParams(seed=5)
    generator = params.generator()
    count = 4000
    drawn = [int(sample(logits, [params], [generator])) for _ in range(count)]
    for token, p in enumerate(probabilities):
        sigma = math.sqrt(count * p * (1 - p))
        assert abs(drawn.count(token) - count * p) < 5 * sigma


def test_a_seed_reproduces_and_another_does_not() -> None:
    logits = random_logits(0)

    def tokens(params: SamplingParams) -> list[int]:
        generator = params.generator()
        return [int(sample(logits, [params], [generator])) for _ in range(30)]

    params = SamplingParams(temperature=2.0, seed=8)
    assert tokens(params) == tokens(params)
    assert tokens(params) != tokens(replace(params, seed=9))
    unseeded = replace(params, seed=None)
    assert tokens(unseeded) != tokens(unseeded)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = [
        SamplingParams(temperature=0.0, seed=1),
        SamplingParams(seed=2),
        SamplingParams(temperature=3.0, top_p=0.7, seed=3),
        SamplingParams(temperature=0.0, seed=4),
        SamplingParams(temperature=0.5, top_k=5, seed=5),
        SamplingParams(temperature=1.5, min_p=0.1, seed=6),
    ]
    steps = [random_logits(seed, len(rows)) for seed in range(12)]

    def run(batch: list[int]) -> list[list[int]]:
        params = [rows[row] for row in batch]
        generators = [one.generator() for one in params]
        chosen = [sample(logits[batch], params, generators).tolist() for logits in steps]
        return [list(tokens) for tokens in zip(*chosen, strict=True)]

    alone = [run([row])[0] for row in range(len(rows))]
    assert run(list(range(len(rows)))) == alone
    assert run([5, 2, 0]) == [alone[5], alone[2], alone[0]]
    assert alone[0] == [int(logits[0].argmax()) for logits in steps]
    assert alone[3] == [int(logits[3].argmax()) for logits in steps]


def test_greedy_takes_no_random_number() -> None:
    params = SamplingParams(temperature=0.0, seed=1)
    generator = params.generator()
    before = generator.get_state()
    sample(random_logits(0), [params], [generator])
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30])
def test_extreme_temperatures_still_draw(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0)
    logits = random_logits(1)
    token = int(sample(logits, [params], [params.generator()]))
    assert temperature > 1 or token == int(logits.argmax())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_may_be_of_any_float_type(dtype: torch.dtype) -> None:
    params = SamplingParams(seed=0, top_p=0.9)
    assert sample(random_logits(0).to(dtype), [params], [params.generator()]).dtype == torch.int64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_reported(bad: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=0)
    logits = random_logits(0, rows=2)
    logits[1, 4] = bad
    with pytest.raises(WorkFailed, match="not finite"):
        sample(logits, [params] * 2, [params.generator(), params.generator()])


def test_repetition_is_penalized_in_the_rows_that_ask_for_it() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0]]).repeat(2, 1)
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams()]
    found = penalized(logits, params, [[0, 1, 1], [0, 1]])
    assert found.tolist() == [[1.0, -4.0, 0.0, 3.0], [2.0, -2.0, 0.0, 3.0]]
    assert logits[0].tolist() == [2.0, -2.0, 0.0, 3.0]
    rewarded = penalized(logits, [SamplingParams(repetition_penalty=0.5)] * 2, [[0, 1], [3]])
    assert rewarded.tolist() == [[4.0, -1.0, 0.0, 3.0], [2.0, -2.0, 0.0, 6.0]]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_models_with_their_ranks(count: int) -> None:
    logits = random_logits(12)[0]
    total = math.log(math.fsum(math.exp(x) for x in logits.tolist()))
    order = sorted(range(VOCABULARY), key=lambda i: -float(logits[i]))
    for token in (order[0], order[3], order[-1]):
        found = token_logprobs(logits, token, count)
        assert set(found) == {token, *order[:count]}
        for i, one in found.items():
            assert one.logprob == pytest.approx(float(logits[i]) - total, abs=1e-6)
            assert one.rank == order.index(i) + 1


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, ">= 0"),
        ("temperature", math.nan, ">= 0"),
        ("temperature", math.inf, ">= 0"),
        ("temperature", "0.5", ">= 0"),
        ("top_k", -2, ">= -1"),
        ("top_k", 1.5, ">= -1"),
        ("top_p", 0.0, "> 0 and <= 1"),
        ("top_p", 1.01, "> 0 and <= 1"),
        ("min_p", -0.01, ">= 0 and <= 1"),
        ("min_p", 1.01, ">= 0 and <= 1"),
        ("seed", -1, ">= 0"),
        ("seed", 2**63, r"< 2\^63"),
        ("seed", True, ">= 0"),
        ("max_tokens", 0, ">= 1"),
        ("max_tokens", None, ">= 1"),
        ("repetition_penalty", 0, "> 0"),
        ("repetition_penalty", math.inf, "> 0"),
        ("logprobs", -1, ">= 0"),
        ("logprobs", 1.0, ">= 0"),
        ("stop", "", "not empty"),
        ("stop", ["a", ""], "not empty"),
        ("stop", ["a", 3], "not empty"),
        ("stop_token_ids", [-1], "ids >= 0"),
        ("stop_token_ids", 3, "ids >= 0"),
        ("ignore_eos", 1, "True or False"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(RequestError, match=f"^{field} is .*{allowed}") as refusal:
        SamplingParams(**{field: value})
    assert repr(value) in str(refusal.value)


def test_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, seed=2**63 - 1, max_tokens=1)
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "bc"]).stop_strings == ("a", "bc")
    assert SamplingParams(stop=[], stop_token_ids=[]).stop_strings == ()
