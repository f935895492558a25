"""Decode steps made of recorded calls give the bits of the steps themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quant.checkpoint.loading import load_decoder
from quant.decoder import Decoder
from quant.runtime import recordings
from quant.runtime.batch import Batch, Chunk, make_batch
from quant.runtime.llm import LLM
from quant.runtime.model import Model
from quant.runtime.recordings import DecodeRecordings
from quant.runtime.sampling import SamplingParams
from quant_kernels import cpu, dispatch
from quant_kernels.kv4 import KVFormat

CPU = torch.device("cpu")
MAX_LEN = 300
BATCHES = ([0, 1, 2, 3, 4], [5], [1, 3], [2, 0], [4, 1], [0, 1, 2, 3, 4], [5], [3, 5, 1, 0, 2])

pytestmark = pytest.mark.skipif(not cpu.available(), reason="libquant_cpu.so is not built")


@pytest.fixture
def model_of(
    quantized_case: Callable[[str], Any], as_model: Callable[[Decoder], Model]
) -> Callable[[KVFormat | None], Model]:
    def make(kv: KVFormat | None) -> Model:
        decoder = load_decoder(quantized_case("int8-64").output, dtype=torch.bfloat16)
        return as_model(dataclasses.replace(decoder, kv=kv))

    return make


class Pair:
    """The same sequences in two caches, with steps computed in one and recorded in the other."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.lengths = [3, 70, 1, 64, 127, 190]
        self.pages = [list(range(4 * i, 4 * i + 4)) for i in range(6)]
        self.eager, self.cache = model.new_cache(24, MAX_LEN), model.new_cache(24, MAX_LEN)
        self.recordings = DecodeRecordings(model, self.cache, MAX_LEN)
        for cache in (self.eager, self.cache):
            for length, owned in zip(self.lengths, self.pages, strict=True):
                tokens = [(3 * t + length) % 250 for t in range(length)]
                model.forward(make_batch([Chunk(tokens, 0, owned)], CPU), cache)

    def batch(self, rows: list[int]) -> Batch:
        chunks = [
            Chunk([(7 * self.lengths[i]) % 250], self.lengths[i], self.pages[i]) for i in rows
        ]
        for i in rows:
            self.lengths[i] += 1
        return make_batch(chunks, CPU)

    def assert_same(self, rows: list[int]) -> None:
        batch = self.batch(rows)
        assert self.recordings.takes(batch)
        wanted = self.model.next_logits(batch, self.eager)
        assert torch.equal(self.recordings.next_logits(batch, self.cache), wanted)
        for name in ("kv",) if self.model.kv is None else ("codes", "scales"):
            assert torch.equal(getattr(self.eager, name), getattr(self.cache, name))


@pytest.mark.parametrize("kv", [None, KVFormat()], ids=("dense", "kv4"))
def test_a_replay_is_the_step(
    model_of: Callable[[KVFormat | None], Model], kv: KVFormat | None
) -> None:
    pair = Pair(model_of(kv))
    for rows in BATCHES:
        pair.assert_same(rows)
    assert sorted(size for size, _ in pair.recordings._recorded) == [1, 2, 5]
    torch.set_num_threads(2)  # `one_thread` sets it back
    pair.assert_same([0, 5])
    assert len(pair.recordings._recorded) == 4


def test_a_replay_does_not_come_to_python(
    model_of: Callable[[KVFormat | None], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(model_of(KVFormat()))
    pair.assert_same([1])
    monkeypatch.setattr(Model, "run_layers", lambda *_: pytest.fail("computed anew"))
    pair.recordings.next_logits(pair.batch([0]), pair.cache)
    with pytest.raises(pytest.fail.Exception, match="computed anew"):
        pair.recordings.next_logits(pair.batch([0, 1]), pair.cache)


def test_recordings_beyond_their_memory_are_forgotten(
    model_of: Callable[[KVFormat | None], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "MOST_BYTES", 1)
    pair = Pair(model_of(KVFormat()))
    for rows in BATCHES:
        pair.assert_same(rows)
        assert len(pair.recordings._recorded) == 1


def test_what_torch_computes_is_not_recorded(
    model_of: Callable[[KVFormat | None], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a backend that is torch: nothing may be left out of a replay."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    pair = Pair(model_of(KVFormat()))
    batch = pair.batch([0, 1])
    wanted = pair.model.next_logits(batch, pair.eager)
    assert torch.equal(pair.recordings.next_logits(batch, pair.cache), wanted)
    assert not pair.recordings.takes(batch)
    assert not pair.recordings._recorded


def test_a_model_with_dense_linears_is_not_recorded(load_llm: Callable[..., LLM]) -> None:
    llm = load_llm()
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert isinstance(llm.scheduler.graphs, DecodeRecordings)
    assert not llm.scheduler.graphs._possible


def test_prompts_are_not_taken() -> None:
    some = DecodeRecordings.__new__(DecodeRecordings)
    some._possible = True
    one, two = Chunk([1], 5, [0]), Chunk([1, 2], 5, [1])
    assert some.takes(make_batch([one], CPU))
    assert not some.takes(make_batch([one, two], CPU))
    silent = Chunk([1], 5, [0], wants_logits=False)  # a prompt's chunk of one token
    assert not some.takes(make_batch([silent], CPU))


@pytest.mark.parametrize("case", ["int8-64", "exact-128", "int8-channel-ignore"])
def test_completions_are_those_without(quantized_case: Callable[[str], Any], case: str) -> None:
    directory: Path = quantized_case(case).output
    prompts = [[(5 * t + i) % 250 for t in range(1 + 17 * i)] for i in range(7)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=5 + 4 * i, ignore_eos=True) for i in range(7)
    ]
    found = []
    for eager in (True, False):
        llm = LLM(directory, device="cpu", enforce_eager=eager, max_num_seqs=4)
        outputs = llm.generate(prompts, params) + llm.generate(prompts[:2], params[:2])
        found.append([output.outputs[0].token_ids for output in outputs])
        assert (llm.scheduler.graphs is None) == eager
    assert found[0] == found[1]
