"""What a step computes: decodes always, prompts in chunks as there is room; and that requests of
all lengths, cancelled or not, end as they would alone."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.decoder import Decoder
from quant.errors import RequestError
from quant.runtime.batch import Batch
from quant.runtime.llm import LLM
from quant.runtime.model import Model
from quant.runtime.sampling import SamplingParams
from quant.runtime.scheduler import Request, Scheduler

Recorded = list[list[tuple[int, int, bool]]]


def request(prompt: Sequence[int], **params: Any) -> Request:
    one = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params})
    return Request(None, list(prompt), one, one.generator())


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def tiny_model(load_fp32: Callable[[str], Decoder], as_model: Callable[[Decoder], Model]) -> Model:
    return as_model(load_fp32("llama"))


def scheduler_of(model: Model, *, pages: int = 64, **options: Any) -> Scheduler:
    wanted = {"max_num_seqs": 4, "max_model_len": 256, "max_num_batched_tokens": 64, **options}
    return Scheduler(model, model.new_cache(pages, 256), frozenset({257}), **wanted)


def record(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Of every step from now on: (new tokens, length after them, one of a decode) a sequence."""
    steps: Recorded = []
    forward = Model.forward

    def recorded(self: Model, batch: Batch, cache: Any) -> Any:
        rows = zip(batch.chunk_lengths, batch.lengths, strict=True)
        steps.append([(n, end, i < batch.singles) for i, (n, end) in enumerate(rows)])
        return forward(self, batch, cache)

    monkeypatch.setattr(Model, "forward", recorded)
    return steps


def run(scheduler: Scheduler) -> None:
    while scheduler.waiting or scheduler.running:
        scheduler.step()


def test_prompts_are_packed_and_chunked_beside_decodes(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = record(monkeypatch)
    scheduler = scheduler_of(tiny_model)
    for length in (10, 100, 3):
        scheduler.add(request(prompt_of(length), max_tokens=3))
    run(scheduler)
    assert steps == [
        [(10, 10, False), (54, 54, False)],  # 64 tokens; the third prompt has no room
        [(1, 11, True), (46, 100, False), (3, 3, False)],
        [(1, 12, True), (1, 101, True), (1, 4, True)],
        [(1, 102, True), (1, 5, True)],
    ]


def test_decodes_come_before_prompts(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(tiny_model, max_num_batched_tokens=4)
    for seed in range(3):
        scheduler.add(request(prompt_of(1, seed), max_tokens=20))
    scheduler.step()
    steps = record(monkeypatch)
    scheduler.add(request(prompt_of(6), max_tokens=2))
    for _ in range(6):
        scheduler.step()
    # One token is left for the prompt in every step, and none of the three ever waits.
    assert [len(step) for step in steps] == [4] * 6
    assert [step[3][1] for step in steps] == [1, 2, 3, 4, 5, 6]


def test_a_request_waits_for_a_place_and_for_its_pages(tiny_model: Model) -> None:
    def admitted(lengths: Sequence[int], **options: Any) -> list[int]:
        scheduler = scheduler_of(tiny_model, **options)
        for seed, length in enumerate(lengths):
            scheduler.add(request(prompt_of(length, seed), max_tokens=2))
        scheduler.step()
        return [len(one.pages) for one in [*scheduler.running, *scheduler.waiting]]

    # Of a prompt and two tokens of output, the last is never stored: 63 + 1 fit a page.
    assert admitted((63, 64, 10, 5), pages=4) == [1, 2, 1, 0]
    # First come, first served: a small request does not overtake one that waits for pages.
    assert admitted((63, 64, 10, 5), pages=2) == [1, 0, 0, 0]
    assert admitted((10, 10, 10), max_num_seqs=2) == [1, 1, 0]


def test_a_finished_request_makes_room_at_once(tiny_model: Model) -> None:
    scheduler = scheduler_of(tiny_model, max_num_seqs=2)
    short, long, waiting = (
        request(prompt_of(5, seed), max_tokens=count) for seed, count in enumerate((2, 10, 3))
    )
    for one in (short, long, waiting):
        scheduler.add(one)
    steps = []
    while scheduler.waiting or scheduler.running:
        steps.append(scheduler.step())
    assert [set(step) for step in steps[:3]] == [{short, long}, {short, long}, {long, waiting}]
    assert [len(one.token_ids) for one in (short, long, waiting)] == [2, 10, 3]
    assert len(scheduler.cache.pool.unused) == scheduler.cache.pool.count


def test_what_the_cache_can_never_hold_is_refused(tiny_model: Model) -> None:
    scheduler = scheduler_of(tiny_model, pages=2)
    scheduler.add(request(prompt_of(100), max_tokens=29))
    with pytest.raises(RequestError, match=r"100 tokens and up to 30 of output take 3 pages.* 2;"):
        scheduler.add(request(prompt_of(100), max_tokens=30))
    assert len(scheduler.waiting) == 1


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_step_is_within_its_limits(tiny_model: Model, data: Any) -> None:
    seqs = data.draw(st.integers(1, 5))
    tokens = data.draw(st.integers(seqs, 40))
    scheduler = scheduler_of(
        tiny_model,
        pages=data.draw(st.integers(2, 9)),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
    )
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=8))
    requests = [request(prompt_of(n, i), max_tokens=1 + n % 5) for i, n in enumerate(lengths)]
    for one in requests:
        scheduler.add(one)
    while scheduler.waiting or scheduler.running:
        before = {one: (one.computed, one.length) for one in requests}
        ready = scheduler.step()
        computed = {
            one: (one.computed - before[one][0], one.length - before[one][1]) for one in requests
        }
        assert 0 < sum(count for count, _ in computed.values()) <= tokens
        for one, (count, added) in computed.items():
            decoding = before[one][1] > len(one.prompt_token_ids) and before[one][0]
            if decoding and one in scheduler.running:
                assert count == added == 1
            assert (one in ready) == bool(added)
        owned = [page for one in scheduler.running for page in one.pages]
        assert (
            len(set(owned))
            == len(owned)
            == scheduler.cache.pool.count - (len(scheduler.cache.pool.unused))
        )
    assert [len(one.token_ids) for one in requests] == [1 + n % 5 for n in lengths]


def test_two_thousand_requests_with_cancellations(load_llm: Callable[..., LLM]) -> None:
    """Soak: nothing is lost or doubled, memory does not grow, and what a request gets does not
    depend on what ran beside it."""
    kinds, rng = 40, random.Random(5)
    prompts = [prompt_of(rng.randint(1, 60), seed) for seed in range(kinds)]
    options = [
        {"max_tokens": rng.randint(1, 12), "temperature": rng.choice([0.0, 1.0]), "seed": seed}
        for seed in range(kinds)
    ]
    alone = load_llm(max_num_seqs=1)
    params = [SamplingParams(**one) for one in options]
    expected = [
        alone.generate([prompt], one)[0].outputs[0].token_ids
        for prompt, one in zip(prompts, params, strict=True)
    ]
    llm = load_llm(max_num_seqs=8, max_num_batched_tokens=48, kv_cache_memory_bytes=700_000)
    scheduler, pool = llm.scheduler, llm.cache.pool
    assert pool.count < 8 * 4  # so that pages run out at times
    finished: dict[int, str] = {}
    live: dict[int, tuple[Request, int]] = {}  # serial -> request, which of the kinds
    peaks = []
    for serial in range(2000):
        which = rng.randrange(kinds)
        one = params[which]
        added = Request(None, prompts[which], one, one.generator())
        live[serial] = (added, which)
        scheduler.add(added)
        while len(live) > 20 or (serial == 1999 and live):
            if rng.random() < 0.05:
                victim = rng.choice(list(live))
                scheduler.finish(live[victim][0], "abort")
            scheduler.step()
            for number, (done, kind) in list(live.items()):
                if done.finish_reason is None:
                    continue
                assert number not in finished
                finished[number] = done.finish_reason
                del live[number]
                got = done.token_ids
                if done.finish_reason == "abort":
                    assert got == expected[kind][: len(got)]
                else:
                    assert got == expected[kind]
        if serial == 500:
            tracemalloc.start()
        if serial in (1000, 1999):
            peaks.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sorted(finished) == list(range(2000))
    aborted = sum(reason == "abort" for reason in finished.values())
    assert 50 < aborted < 500
    assert len(pool.unused) == pool.count
    assert not scheduler.waiting
    assert not scheduler.running
    assert peaks[1] < peaks[0] + 200_000  # `finished` is of this test
