"""Options of attention: the soft cap of scores, and pages that are skipped for being negligible.

The Hopper kernels run in the simulator, as in test_cuda_attention.py.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quant_kernels import dispatch, ops, reference_attention
from quant_kernels.kv4 import KVFormat, dequantize_kv, quantize_kv
from quant_kernels.packing import KV_PAGE
from quant_kernels.reference import quantize_activation
from quant_kernels.reference_attention import LOG2_E
from quant_kernels.registration import OpError
from tests.quant_kernels.test_cuda_attention import (
    DIMS,
    cache_of,
    decode,
    decode_arguments,
    prefill,
    wanted_of,
)
from tests.quant_kernels.triton.test_prefill_attention import (
    Case,
    arguments,
    check_against_reference,
)

NEVER = 1e4  # a threshold that no page is under

CAPPED = [
    Case(64, 2, 2, ((130, 130), (3, 3))),
    Case(64, 3, 1, ((70, 100), (0, 80), (1, 65)), symmetric=True),  # chunks; no queries
    Case(64, 2, 1, ((20, 10), (7, 0), (1, 64))),  # rows that see no key
    Case(64, 1, 1, ((140, 400),), window=130),
    Case(128, 8, 2, ((65, 300), (7, 70))),
    Case(128, 4, 1, ((40, 300), (9, 9)), window=50),
    Case(256, 4, 1, ((35, 330), (3, 3))),
]
CAPPED_DECODE = [  # dim, heads, kv_heads, lengths, window, workers
    (64, 6, 2, (0, 260, 30), 0, 4),
    (64, 16, 1, (130, 5), 0, 2),
    (128, 8, 1, (600, 1), 0, 2),
    (128, 4, 2, (300, 70), 70, 3),
    (256, 9, 1, (40, 100), 33, 2),
]


# --- soft cap ---
@pytest.mark.parametrize("soft_cap", [2.0, 30.0])
@pytest.mark.parametrize("case", CAPPED, ids=str)
def test_capped_prefill_is_the_references(simulator, case, soft_cap):
    given = arguments(case)
    wanted = wanted_of(given, case.window, soft_cap)
    found = prefill(simulator, case, given, late=False, soft_cap=soft_cap)
    check_against_reference(found, wanted, given[3])
    # It is not what there is without a cap, except where a query sees one key or none.
    assert not torch.allclose(found, wanted_of(given, case.window), atol=1e-3)
    again = prefill(simulator, case, given, resident=3, seed=2, soft_cap=soft_cap)
    assert torch.equal(again, found)


@pytest.mark.parametrize("soft_cap", [2.0, 30.0])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "lengths", "window", "workers"), CAPPED_DECODE
)
def test_capped_decode_is_the_references(
    simulator, dim, heads, kv_heads, lengths, window, workers, soft_cap
):
    given = decode_arguments(dim, heads, kv_heads, lengths)
    wanted = wanted_of(given, window, soft_cap)
    options = {"window": window, "workers": workers, "soft_cap": soft_cap}
    found = decode(simulator, given, late=False, **options)
    values = given[3][1].float().nan_to_num(0)
    largest = float((values[..., 0].abs() * 8 + values[..., 1].abs()).max())
    error = (found - wanted).abs()
    # As check_against_reference: what is not FP32 rounding is an E4M3 step at a tie.
    assert int((error.amax(-1) > 2e-5 * largest).sum()) <= 1
    assert float(error.max()) <= float(values[..., 0].abs().max())
    assert torch.equal(decode(simulator, given, resident=5, seed=2, **options), found)


def test_chunks_of_a_capped_prompt_are_the_prompt(simulator):
    given = arguments(Case(64, 2, 1, ((150, 150),)), seed=5)
    wanted = prefill(simulator, Case(64, 2, 1, ((150, 150),)), given, soft_cap=10.0)
    for first, last in ((0, 83), (83, 150)):
        bounds, total = torch.tensor([0, last - first]).int(), torch.tensor([last]).int()
        chunk = [given[0][first:last], given[1][first:last], *given[2:5], bounds, total]
        found = prefill(simulator, Case(64, 2, 1, ((last - first, last),)), chunk, soft_cap=10.0)
        assert torch.equal(found, wanted[first:last])


def test_the_reference_caps_scores_before_masks():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(9, 2, 64, generator=generator) * 2 for _ in range(3))
    codes, scale = quantize_activation(q, "fp8")
    keys, values = quantize_kv(k, KVFormat()), quantize_kv(v, KVFormat())
    found = reference_attention.attention(
        codes, scale.squeeze(-1), keys, values, sm_scale=0.2, soft_cap=3.0, round_p=False
    )
    query = (codes.float() * scale).double().transpose(0, 1)
    score = 0.2 * query @ dequantize_kv(keys).double().transpose(0, 1).mT
    score = 3 * torch.tanh(score / 3)
    p = score.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    wanted = (p @ dequantize_kv(values).double().transpose(0, 1)).transpose(0, 1)
    assert torch.allclose(found.double(), wanted, rtol=0, atol=1e-5)


# --- skipping ---
@dataclass(frozen=True)
class Sink:
    """A prompt's last queries, which all attend to key 0, over pages of different loudness."""

    case: Case
    given: list[Tensor]
    keys: Tensor
    values: Tensor


def with_sink(dim: int, window: int = 0) -> Sink:
    """Scores of key 0 are some 29 in powers of two, half of that in every other group of rows;
    those of other keys up to 2, 7, 15 or 22, by their page."""
    generator = torch.Generator().manual_seed(dim)
    total, length = 700, 100
    x, keys, values = (torch.randn(total, n, dim, generator=generator) for n in (4, 2, 2))
    page = torch.arange(total) // 64
    keys *= torch.tensor([1.0, 0.25, 2.0, 3.0])[page % 4].view(-1, 1, 1)
    keys -= keys.mean(-1, keepdim=True)
    keys[0] = 20 / math.sqrt(dim)
    queries = x[-length:]
    queries += (1 - 0.5 * (torch.arange(length) // 32 % 2)).view(-1, 1, 1)
    codes, scale = quantize_activation(queries, "fp8")
    given = [codes, scale.squeeze(-1), *cache_of(keys, values)]
    given += [torch.tensor([0, length]).int(), torch.tensor([total]).int()]
    return Sink(Case(dim, 4, 2, ((length, total),), window=window), given, keys, values)


def skipped_pages(simulator) -> tuple[int, int]:
    """Pages of all warpgroups in the last launch, and how many of them were skipped."""
    counts = torch.zeros(2, dtype=torch.int64)
    first, second = (ctypes.c_void_p(counts[i:].data_ptr()) for i in range(2))
    simulator.quant_simulate_skipped(first, second)
    return int(counts[0]), int(counts[1])


def by_query_head(x: Tensor) -> Tensor:
    return x.double().repeat_interleave(2, dim=1).transpose(0, 1)  # [Hq, T, ...]


def scores_of(sink: Sink, soft_cap: float) -> Tensor:
    """S [Hq, S, T] in FP64 and base 2, masked."""
    q = (sink.given[0].float() * sink.given[1].unsqueeze(-1)).double().transpose(0, 1)
    k = by_query_head(dequantize_kv(quantize_kv(sink.keys, KVFormat())))
    score = q @ k.mT / math.sqrt(q.shape[2])
    if soft_cap:
        score = soft_cap * torch.tanh(score / soft_cap)
    _, length, total = score.shape
    distance = torch.arange(total - length, total)[:, None] - torch.arange(total)
    window = sink.case.window or total
    return (score * LOG2_E).masked_fill((distance < 0) | (distance >= window), -math.inf)


def skips_of(score: Tensor, threshold: float) -> int:
    """Pages that no row of 32 tokens and two heads needs: all below M - 1 - threshold."""
    _, length, total = score.shape
    count = 0
    for head in (0, 2):
        for first in range(0, length, 32):
            rows = score[head : head + 2, first : first + 32]
            last = total - length + first + rows.shape[1] - 1
            seen = [page.flatten(2).amax(-1) for page in rows.split(KV_PAGE, dim=-1)]
            top = torch.full_like(seen[0], -1e30)
            for largest in seen[: last // KV_PAGE + 1]:
                if bool(largest.isneginf().all()):
                    continue  # outside of the rows' windows
                count += bool((largest < top - 1 - threshold).all())
                top = torch.maximum(top, largest.ceil())
    return count


def bound_of(sink: Sink, threshold: float, soft_cap: float) -> Tensor:
    """How far skipping may move an output, [S, Hq, D].

    With L, W the sums of p over keys that are kept and skipped, outputs differ by
    sum_skipped (p^ v - p O) / (L + W), where O, the output of what is kept, lies among the values,
    and p^ is p as E4M3 rounds it: by p / 16, or by 2^-10 z / 256, times s |q| <= 8 s and z <= 2 s.
    Skipped keys are among those with p < 2^-threshold max p; max p is kept, and above 1/2.
    """
    p = (scores_of(sink, soft_cap) * math.log(2)).softmax(-1)
    small = p < 1.001 * 2.0**-threshold * p.amax(-1, keepdim=True)
    weight = (p * small).sum(-1, keepdim=True)
    v = quantize_kv(sink.values, KVFormat())
    values, scale = by_query_head(dequantize_kv(v)), by_query_head(v.scale).amax(1).view(-1, 1, 1)
    apart = (values.amax(1) - values.amin(1)).unsqueeze(1)
    steps = 2.0**-10 * 2 * scale / 256 * 8 * small.sum(-1, keepdim=True) / 0.5
    return (weight * (apart + 8 * scale / 16) + steps).transpose(0, 1)


@pytest.mark.parametrize("soft_cap", [0.0, 50.0])
@pytest.mark.parametrize(("dim", "window"), [(64, 0), (64, 300), (128, 0), (256, 0)])
def test_skipping_stays_in_its_bound(simulator, dim, window, soft_cap):
    sink = with_sink(dim, window)
    options = {"late": False, "soft_cap": soft_cap}
    whole = prefill(simulator, sink.case, sink.given, **options)
    score = scores_of(sink, soft_cap)
    for threshold in (4.0, 8.0, 12.0):
        found = prefill(simulator, sink.case, sink.given, skip_threshold=threshold, **options)
        pages, skipped = skipped_pages(simulator)
        error = (found - whole).abs()
        assert bool((error <= bound_of(sink, threshold, soft_cap) + 1e-5).all())
        assert skipped == skips_of(score, threshold)
        if window == 0:  # which has the sink in it: 23 to 64 of 86 pages
            assert pages / 4 < skipped < pages
            assert float(error.max()) < {4.0: 0.6, 8.0: 0.1, 12.0: 0.015}[threshold]  # measured


@pytest.mark.parametrize("dim", DIMS)
def test_skipping_does_not_depend_on_the_order_of_threads(simulator, dim):
    sink = with_sink(dim)
    wanted = prefill(simulator, sink.case, sink.given, late=False, skip_threshold=8.0)
    counts = skipped_pages(simulator)
    for resident, seed in ((1, 1), (2, 3)):
        found = prefill(
            simulator, sink.case, sink.given, resident=resident, seed=seed, skip_threshold=8.0
        )
        assert torch.equal(found, wanted)
        assert skipped_pages(simulator) == counts


@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
@pytest.mark.parametrize("case", CAPPED, ids=str)
def test_a_threshold_under_every_page_changes_no_bit(simulator, case, soft_cap):
    given = arguments(case)
    wanted = prefill(simulator, case, given, soft_cap=soft_cap)
    found = prefill(simulator, case, given, soft_cap=soft_cap, skip_threshold=NEVER)
    assert torch.equal(found, wanted)


def test_rows_without_a_query_do_not_keep_pages(simulator):
    sink = with_sink(64)
    given = [x[-5:] for x in sink.given[:2]] + sink.given[2:]
    given[5] = torch.tensor([0, 5]).int()
    case = Case(64, 4, 2, ((5, 700),))
    whole = prefill(simulator, case, given, late=False)
    found = prefill(simulator, case, given, late=False, skip_threshold=8.0)
    pages, skipped = skipped_pages(simulator)
    assert skipped > pages / 4
    assert bool(((found - whole).abs() <= bound_of(sink, 8.0, 0.0)[-5:] + 1e-5).all())


# --- the ops ---
def test_backends_without_an_option_refuse_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "choose", lambda op, device, asked: asked)
    given = arguments(Case(64, 2, 1, ((5, 9),)))
    one = decode_arguments(64, 2, 1, (9,))
    for backend in ("cpu", "triton"):
        for option in ("soft_cap", "skip_threshold"):
            words = rf"'{backend}' has no {option} \(got 9.0\).* cutlass and reference take it"
            out = torch.empty(given[0].shape)
            with pytest.raises(OpError, match=words):
                ops.prefill_attention(
                    *given, 5, out, sm_scale=0.1, backend=backend, **{option: 9.0}
                )
        out = torch.empty(one[0].shape)
        with pytest.raises(
            OpError, match=rf"decode_attention: backend '{backend}' has no soft_cap"
        ):
            ops.decode_attention(*one[:5], one[6], out, sm_scale=0.1, soft_cap=9.0, backend=backend)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(OpError, match="soft_cap must be finite and not negative"):
            ops.prefill_attention(
                *given, 5, torch.empty(given[0].shape), sm_scale=0.1, soft_cap=bad,
                backend="reference",
            )  # fmt: skip


def test_the_reference_caps_and_never_skips():
    given = arguments(Case(64, 2, 1, ((5, 9),)))
    out = torch.empty(given[0].shape)
    ops.prefill_attention(
        *given, 5, out, sm_scale=1 / 8, soft_cap=2.0, skip_threshold=1.0, backend="reference"
    )
    assert torch.equal(out, wanted_of(given, soft_cap=2.0))
    one = decode_arguments(64, 2, 1, (9,))
    out = torch.empty(one[0].shape)
    ops.decode_attention(*one[:5], one[6], out, sm_scale=1 / 8, soft_cap=2.0, backend="reference")
    assert torch.equal(out, wanted_of(one, soft_cap=2.0))
