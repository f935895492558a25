"""Recorded decode steps, padded to their bucket, give what the batch gives alone. What a CUDA graph
would replay is here computed again from the same tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.checkpoint.loading import load_decoder
from quant.decoder import Decoder
from quant.runtime.batch import Chunk, make_batch
from quant.runtime.graphs import DecodeGraphs, bucket_of
from quant.runtime.model import Model
from quant_kernels.kv4 import KVFormat

CPU = torch.device("cpu")
MAX_LEN = 200


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(_: Any, compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        logits = compute().clone()
        return logits, lambda: logits.copy_(compute())

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)


def test_buckets_hold_every_size() -> None:
    buckets = [bucket_of(size) for size in range(1, 258)]
    assert all(bucket >= size for size, bucket in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert [bucket_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 256)] == [
        1, 2, 4, 4, 8, 8, 16, 16, 24, 256,
    ]  # fmt: skip
    assert len(set(buckets)) == 3 + 33


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("kv", [None, KVFormat()])
def test_a_replay_is_the_step(
    quantized_case: Callable[[str], Any],
    as_model: Callable[[Decoder], Model],
    kv: KVFormat | None,
) -> None:
    decoder = load_decoder(quantized_case("int8-64").output, dtype=torch.float32)
    model = as_model(dataclasses.replace(decoder, kv=kv))
    eager, recorded = model.new_cache(24, MAX_LEN), model.new_cache(24, MAX_LEN)
    graphs = DecodeGraphs(model, recorded, MAX_LEN)
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 70, 1, 64, 20, 90]
    pages = [list(range(4 * i, 4 * i + 4)) for i in range(6)]
    for cache in (eager, recorded):
        for length, owned in zip(lengths, pages, strict=True):
            tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
            generator.manual_seed(length)
            model.forward(make_batch([Chunk(tokens, 0, owned)], CPU), cache)
        generator.manual_seed(4)
    # Larger and smaller batches in turn: the padding of one must not be what another left.
    for rows in ([0, 1, 2, 3, 4], [5], [1, 3], [2, 0, 4], [0, 1, 2, 3, 4, 5], [4]):
        chunks = [Chunk([(7 * i) % 250], lengths[i], pages[i]) for i in rows]
        for i in rows:
            lengths[i] += 1
        batch = make_batch(chunks, CPU)
        assert graphs.takes(batch)
        wanted = model.next_logits(batch, eager)
        assert float((graphs.next_logits(batch, recorded) - wanted).abs().max()) < 1e-4
    for name in ("kv",) if kv is None else ("codes", "scales"):
        x, y = getattr(eager, name), getattr(recorded, name)
        assert torch.equal(x[:, :, :24], y[:, :, :24])  # a dense cache has a page for padding


def test_only_decode_steps_are_taken() -> None:
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    one, two = Chunk([1], 5, [0]), Chunk([1, 2], 5, [1])
    assert graphs.takes(make_batch([one], CPU))
    assert not graphs.takes(make_batch([one, two], CPU))
    silent = Chunk([1], 5, [0], wants_logits=False)  # a prompt's chunk of one token
    assert not graphs.takes(make_batch([silent], CPU))
