"""Decoding over the cache gives what attention over the whole sequence gives, and nothing leaks."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.errors import RequestError
from quant.runtime.kv_cache import KVCache
from quant.runtime.model import Decoder

# FP32 sums in another order, on logits of order one. What is misplaced moves them by far more:
# see the tests of what a wrong row or position does.
TOLERANCE = 1e-4
NOTICEABLE = 100 * TOLERANCE

# Two query heads per KV head and no window; a window of 12 in every layer, and in one of two;
# eight query heads per KV head.
KINDS = ("llama", "mistral", "qwen2-windows", "qwen3")
MAX_LEN = 40


def random_tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def stale_cache(config: DecoderConfig, slots: int, max_len: int = MAX_LEN) -> KVCache:
    """A cache whose every slot was in use before: finite numbers that would drown all others."""
    cache = KVCache(config, slots, max_len, dtype=torch.float32)
    cache.keys.fill_(30.0)
    cache.values.fill_(-1000.0)
    return cache


def whole(decoder: Decoder, tokens: Tensor) -> Tensor:
    """tokens [S] -> logits [S, V] without a cache."""
    positions = torch.arange(len(tokens)).unsqueeze(0)
    return decoder.logits(decoder.hidden_states(tokens.unsqueeze(0), positions))[0]


def prefill(decoder: Decoder, cache: KVCache, slot: int, tokens: Tensor) -> Tensor:
    hidden = decoder.hidden_states(tokens.unsqueeze(0), *cache.prefill(slot, len(tokens)))
    return decoder.logits(hidden)[0]


def decode(decoder: Decoder, cache: KVCache, slots: Sequence[int], tokens: Tensor) -> Tensor:
    """One token [B] for each slot -> logits [B, V]."""
    hidden = decoder.hidden_states(tokens.unsqueeze(1), *cache.decode(slots))
    return decoder.logits(hidden)[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_length", [1, 11, 25])  # shorter and longer than the windows
def test_token_by_token_equals_the_whole(
    load_fp32: Callable[[str], Decoder], kind: str, prompt_length: int
) -> None:
    decoder = load_fp32(kind)
    (tokens,) = random_tokens(MAX_LEN)
    expected = whole(decoder, tokens)
    cache = stale_cache(decoder.config, slots=3)
    found = [prefill(decoder, cache, 1, tokens[:prompt_length])]
    found += [decode(decoder, cache, [1], tokens[i : i + 1]) for i in range(prompt_length, MAX_LEN)]
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 3, 4], [4, 0, 2], [1, 0], [3]])
def test_each_sequence_of_a_batch_equals_itself_alone(
    load_fp32: Callable[[str], Decoder], kind: str, slots: list[int]
) -> None:
    decoder = load_fp32(kind)
    lengths = [3, 30, 14][: len(slots)]
    sequences = random_tokens(*(length + 4 for length in lengths))
    cache = stale_cache(decoder.config, slots=5)
    for slot, length, tokens in zip(slots, lengths, sequences, strict=True):
        prefill(decoder, cache, slot, tokens[:length])
    for i in range(4):
        step = torch.stack([t[n + i] for n, t in zip(lengths, sequences, strict=True)])
        logits = decode(decoder, cache, slots, step)
        for row, (length, tokens) in enumerate(zip(lengths, sequences, strict=True)):
            expected = whole(decoder, tokens[: length + i + 1])[-1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=TOLERANCE)


def test_a_step_writes_one_row_of_its_own_slots(load_fp32: Callable[[str], Decoder]) -> None:
    decoder = load_fp32("llama")
    cache = stale_cache(decoder.config, slots=4)
    for slot, tokens in enumerate(random_tokens(5, 9, 7)):
        prefill(decoder, cache, slot, tokens)
    for stored in (cache.keys, cache.values):
        before = stored.clone()
        lengths = list(cache.lengths)
        decode(decoder, cache, [2, 0], torch.tensor([1, 2]))
        changed = (stored != before).flatten(3).any(dim=(0, 3))  # [slots, max_len]
        assert changed.nonzero().tolist() == [[0, lengths[0]], [2, lengths[2]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_row_or_a_wrong_position_would_be_noticed(
    load_fp32: Callable[[str], Decoder], kind: str
) -> None:
    decoder = load_fp32(kind)
    (tokens,) = random_tokens(21)
    expected = whole(decoder, tokens)[-1]

    def last_logits(spoil: Callable[[KVCache], None], shift: int = 0) -> Tensor:
        cache = stale_cache(decoder.config, slots=1)
        prefill(decoder, cache, 0, tokens[:20])
        spoil(cache)
        positions, attention_of = cache.decode([0])
        hidden = decoder.hidden_states(tokens[20:].unsqueeze(0), positions + shift, attention_of)
        return decoder.logits(hidden)[0, 0]

    def difference(spoil: Callable[[KVCache], None], shift: int = 0) -> float:
        return float((last_logits(spoil, shift) - expected).abs().max())

    assert difference(lambda cache: None) < TOLERANCE
    assert difference(lambda cache: None, shift=1) > NOTICEABLE
    # The oldest position that a window of 12 shows to position 20 is 9.
    assert difference(lambda cache: cache.values[-1, 0, 9].zero_()) > NOTICEABLE
    assert difference(lambda cache: cache.keys[-1, 0, 9].zero_()) > NOTICEABLE
    is_windowed = decoder.config.sliding_windows[-1] is not None
    beyond = difference(lambda cache: cache.values[-1, 0, 8].zero_())
    assert (beyond < TOLERANCE) == is_windowed


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_the_formula(load_fp32: Callable[[str], Decoder], kind: str) -> None:
    config = load_fp32(kind).config
    layer = config.num_layers - 1
    window = config.sliding_windows[layer]
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    generator = torch.Generator().manual_seed(3)
    lengths = {3: 20, 1: 6}  # slot -> tokens, with the one to come
    cache = stale_cache(config, slots=4)
    k = {s: torch.randn(1, n, kv_heads, dim, generator=generator) for s, n in lengths.items()}
    v = {s: torch.randn(1, n, kv_heads, dim, generator=generator) for s, n in lengths.items()}
    for slot, length in lengths.items():
        q = torch.randn(1, length - 1, heads, dim, generator=generator)
        _, attention_of = cache.prefill(slot, length - 1)
        attention_of(layer)(q, k[slot][:, :-1], v[slot][:, :-1])
    q = torch.randn(2, 1, heads, dim, generator=generator)
    positions, attention_of = cache.decode(list(lengths))
    newest_k, newest_v = (torch.cat([x[slot][:, -1:] for slot in lengths]) for x in (k, v))
    found = attention_of(layer)(q, newest_k, newest_v)
    assert positions.tolist() == [[length - 1] for length in lengths.values()]
    assert found.shape == q.shape
    for row, slot in enumerate(lengths):
        first = 0 if window is None else max(0, lengths[slot] - window)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            seen_k, seen_v = k[slot][0, first:, shared], v[slot][0, first:, shared]
            p = torch.softmax(seen_k @ q[row, 0, head] / dim**0.5, dim=0)
            torch.testing.assert_close(found[row, 0, head], p @ seen_v, rtol=1e-4, atol=1e-5)


def test_memory_never_written_is_not_seen(load_fp32: Callable[[str], Decoder]) -> None:
    # A short sequence beside a long one: its masked positions were never written, and 0 * NaN
    # would be NaN.
    decoder = load_fp32("llama")
    cache = KVCache(decoder.config, 2, MAX_LEN, dtype=torch.float32)
    assert not cache.keys.any()
    assert not cache.values.any()
    long, short = random_tokens(30, 2)
    prefill(decoder, cache, 0, long)
    prefill(decoder, cache, 1, short)
    assert decode(decoder, cache, [0, 1], torch.tensor([1, 2])).isfinite().all()


def test_slots_are_given_lowest_first_and_again(load_fp32: Callable[[str], Decoder]) -> None:
    cache = KVCache(load_fp32("llama").config, 3, MAX_LEN)
    assert [cache.allocate() for _ in range(4)] == [0, 1, 2, None]
    cache.prefill(2, 5)
    cache.free(0)
    cache.free(2)
    assert cache.lengths[2] == 0
    with pytest.raises(ValueError, match="already free"):
        cache.free(0)
    assert [cache.allocate() for _ in range(3)] == [0, 2, None]


def test_bytes_per_token_is_what_is_allocated(load_fp32: Callable[[str], Decoder]) -> None:
    config = load_fp32("qwen3").config
    for dtype in (torch.bfloat16, torch.float32):
        cache = KVCache(config, 3, 17, dtype=dtype)
        assert cache.bytes_per_token * 3 * 17 == cache.keys.nbytes + cache.values.nbytes
        assert cache.keys.dtype == cache.values.dtype == dtype


def test_what_does_not_fit_is_refused(load_fp32: Callable[[str], Decoder]) -> None:
    decoder = load_fp32("llama")
    cache = KVCache(decoder.config, 2, 8, dtype=torch.float32)
    with pytest.raises(RequestError, match=r"9 tokens.* 8 per"):
        cache.prefill(0, 9)
    assert cache.lengths == [0, 0]
    (tokens,) = random_tokens(8)
    prefill(decoder, cache, 1, tokens)
    with pytest.raises(RequestError, match=r"slot 1 .*full"):
        cache.decode([0, 1])
    assert cache.lengths == [0, 8]
    with pytest.raises(ValueError, match="repeat"):
        cache.decode([0, 0])
    with pytest.raises(RequestError, match=r"512,000,000\.0 GB.*max_num_seqs or max_model_len"):
        KVCache(decoder.config, 1, 10**15, dtype=torch.bfloat16)  # more than an address can name
