"""Pages are given once, a step writes its own rows and sees its own sequence, and nothing leaks."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.decoder import Decoder
from quant.errors import RequestError
from quant.runtime.batch import Chunk, make_batch, pages_needed
from quant.runtime.buffers import Buffers
from quant.runtime.kv_cache import DenseCache, HeadOptions, Int4Cache, PagePool
from quant.runtime.model import Cache
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import KV_PAGE

CPU = torch.device("cpu")
KINDS = ("llama", "mistral", "qwen2-windows", "qwen3")


@settings(deadline=None)
@given(st.data())
def test_a_page_is_owned_once(data: st.DataObject) -> None:
    pool = PagePool(data.draw(st.integers(0, 12)))
    owned: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        if owned and data.draw(st.booleans()):
            pool.free(owned.pop(data.draw(st.integers(0, len(owned) - 1))))
        else:
            count, free = data.draw(st.integers(0, 6)), len(pool.unused)
            pages = pool.allocate(count)
            assert (pages is None) == (count > free)
            if pages is not None:
                owned.append(pages)
        taken = [page for pages in owned for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(pool.count))
        assert len(pool.unused) == pool.count - len(taken)


def test_pages_are_not_freed_twice() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert pages is not None
    for wrong in ([pages[0], pages[0]], [*pages, 2]):
        with pytest.raises(ValueError, match="freed twice"):
            pool.free(wrong)
        assert len(pool.unused) == 1
    pool.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(pages)
    assert len(pool.unused) == 3


def caches(decoder: Decoder, pages: int) -> list[Cache]:
    config = decoder.config
    dense = DenseCache(config, pages, torch.float32, max_len=200, device=CPU)
    return [dense, Int4Cache(config, pages, KVFormat(), max_len=200, device=CPU)]


def stored(cache: Cache) -> list[Tensor]:
    """What the cache holds, with the places of pages flat: [slots, ...] of the last layer."""
    held = (cache.kv,) if isinstance(cache, DenseCache) else (cache.codes, cache.scales)
    places = (x[-1].transpose(2, 3).flatten(1, 2) for x in held)
    return [part for both in places for part in both.unbind(0)]


def rows_of(decoder: Decoder, tokens: int, seed: int = 0) -> Tensor:
    cfg, generator = decoder.config, torch.Generator().manual_seed(seed)
    width = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    return torch.randn(tokens, width, generator=generator)


def attend(cache: Cache, chunks: list[Chunk], rows: Tensor) -> Tensor:
    """The last layer's attention, [T, Hq, D]; what it is written into holds NaN before."""
    cfg, batch = cache.config, make_batch(chunks, CPU)
    out = torch.full((len(rows), cfg.num_heads, cfg.head_dim), math.nan)
    cache.attend(cfg.num_layers - 1, rows, batch, HeadOptions(), out, None, Buffers(CPU))
    return out


def test_a_step_writes_the_places_of_its_tokens(load_fp32: Callable[[str], Decoder]) -> None:
    decoder = load_fp32("llama")
    for cache in caches(decoder, 5):
        attend(cache, [Chunk([0] * 70, 0, [3, 1])], rows_of(decoder, 70))
        before = [x.clone() for x in stored(cache)]
        # One token at position 70, on the second page; three from position 62 on, on two pages.
        chunks = [Chunk([0], 70, [3, 1]), Chunk([0, 0, 0], 62, [4, 0])]
        attend(cache, chunks, rows_of(decoder, 4, seed=1))
        wanted = {64 + 6, 4 * 64 + 62, 4 * 64 + 63, 0}
        for x, y in zip(stored(cache), before, strict=True):
            changed = (x != y).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(changed) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_dense_pages_is_the_formula(
    load_fp32: Callable[[str], Decoder], kind: str
) -> None:
    decoder = load_fp32(kind)
    # Positions turn nothing here, so that keys are stored as they come.
    frozen = dataclasses.replace(decoder.config, inv_freq=(0.0,) * len(decoder.config.inv_freq))
    cfg, window = frozen, frozen.sliding_windows[-1]
    cache = DenseCache(frozen, 4, torch.float32, max_len=200, device=CPU)
    cache.kv[:, 0] = 30.0
    cache.kv[:, 1] = -1000.0
    rows = rows_of(decoder, 90)
    parts = rows.unflatten(-1, (-1, cfg.head_dim))
    q, k, v = parts.split((cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), dim=1)
    pages = [2, 0]
    found = torch.cat(
        [
            attend(cache, [Chunk([0] * 66, 0, pages)], rows[:66]),
            attend(cache, [Chunk([0], 66, pages)], rows[66:67]),
            attend(cache, [Chunk([0] * 23, 67, pages)], rows[67:]),
        ]
    )
    for i in (0, 5, 11, 12, 13, 65, 66, 67, 89):
        first = 0 if window is None else max(0, i - window + 1)
        for head in range(cfg.num_heads):
            shared = head // (cfg.num_heads // cfg.num_kv_heads)
            seen_k, seen_v = k[first : i + 1, shared], v[first : i + 1, shared]
            p = torch.softmax(seen_k @ q[i, head] / cfg.head_dim**0.5, dim=0)
            torch.testing.assert_close(found[i, head], p @ seen_v, rtol=1e-4, atol=1e-4)


def test_padding_stores_nothing_and_is_finite(load_fp32: Callable[[str], Decoder]) -> None:
    decoder = load_fp32("llama")
    for cache in caches(decoder, 3):
        attend(cache, [Chunk([0] * 64, 0, [2])], rows_of(decoder, 64))
        before = [x.clone() for x in stored(cache)]
        batch = make_batch([Chunk([0], 0, [0]), Chunk([0], 0, [0])], CPU)
        padded = dataclasses.replace(
            batch, slots=torch.full_like(batch.slots, -1), kv_lens=torch.zeros_like(batch.kv_lens)
        )
        out = torch.full((2, decoder.config.num_heads, decoder.config.head_dim), math.nan)
        cache.attend(1, rows_of(decoder, 2), padded, HeadOptions(), out, None, Buffers(CPU))
        assert bool(out.isfinite().all())
        places = 3 * KV_PAGE  # a dense cache has a page more, for padding
        for x, y in zip(stored(cache), before, strict=True):
            assert torch.equal(x[:places], y[:places])


def test_bytes_per_token_is_what_is_allocated(load_fp32: Callable[[str], Decoder]) -> None:
    config = load_fp32("qwen3").config
    for dtype in (torch.bfloat16, torch.float32):
        cache = DenseCache(config, 3, dtype, max_len=17, device=CPU)
        size = cache.kv.nbytes * 3 / 4
        assert DenseCache.bytes_per_token(config, dtype) * 3 * KV_PAGE == size
    packed = Int4Cache(config, 3, KVFormat(), max_len=17, device=CPU)
    size = packed.codes.nbytes + packed.scales.nbytes
    assert Int4Cache.bytes_per_token(config) * 3 * KV_PAGE == size
    # 4 bits and, for a head of 32, 32 bits of scale and offset, against 16 bits.
    assert size / (DenseCache.bytes_per_token(config, torch.bfloat16) * 3 * KV_PAGE) == 5 / 16


def test_memory_that_is_not_there_is_refused(load_fp32: Callable[[str], Decoder]) -> None:
    config = load_fp32("llama").config
    for make in (
        lambda: DenseCache(config, 10**15, torch.bfloat16, max_len=8, device=CPU),
        lambda: Int4Cache(config, 10**15, KVFormat(), max_len=8, device=CPU),
    ):
        with pytest.raises(RequestError, match=r"GB does not fit on cpu.*kv_cache_memory_bytes"):
            make()  # more than an address can name


def test_pages_needed_counts_the_last_one() -> None:
    assert [pages_needed(n) for n in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]
