"""Attention over the INT4 cache: what its definition means, and the cache it reads."""

import math

import pytest
import torch
from torch import Tensor

from quant_kernels import reference_attention as ra
from quant_kernels.kv4 import KVCodes, KVFormat, dequantize_kv, quantize_kv
from quant_kernels.packing import KV_PAGE, pack_kv, unpack_kv
from quant_kernels.reference import dequantize_activation, quantize_activation

FORMATS = [KVFormat(), KVFormat(symmetric=True)]


def rows(seed: int, tokens: int, heads: int, dim: int, fmt: KVFormat) -> KVCodes:
    """Keys or values of very different sizes, off centre, one channel that stands out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, dim, generator=generator)
    x = x * torch.rand(dim, generator=generator).add(0.1) + torch.randn(dim, generator=generator)
    x[..., 5] += 6
    return quantize_kv(x * torch.rand(tokens, heads, 1, generator=generator).mul(2).exp(), fmt)


def queries(seed: int, tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed)) * 2
    codes, scale = quantize_activation(x, "fp8")
    return codes, scale.squeeze(-1)


def attention_in_fp64(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One query head and one query after the other, so that nothing is left to broadcasting."""
    (length, heads, dim), total = q.shape, len(k)
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for h in range(heads):
        kv_head = h // (heads // k.shape[1])
        for i in range(length):
            last = total - length + i
            seen = slice(max(0, last - window + 1) if window else 0, last + 1)
            score = k[seen, kv_head] @ q[i, h] / math.sqrt(dim)
            out[i, h] = score.softmax(-1) @ v[seen, kv_head]
    return out


def misread(keys: KVCodes, values: KVCodes, fmt: KVFormat) -> list[tuple[KVCodes, KVCodes]]:
    def without_scale(x: KVCodes) -> KVCodes:
        return KVCodes(x.codes, torch.ones_like(x.scale), x.offset)

    def without_offset(x: KVCodes) -> KVCodes:
        return KVCodes(x.codes, x.scale, torch.zeros_like(x.offset))

    def swapped(x: KVCodes) -> KVCodes:
        return KVCodes(x.codes, x.offset, x.scale)

    changes = [without_scale, swapped] + ([] if fmt.symmetric else [without_offset])
    return [pair for f in changes for pair in ((f(keys), values), (keys, f(values)))]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize(("ratio", "length", "window"), [(1, 21, 0), (3, 9, 0), (8, 13, 7)])
def test_attention_from_codes_is_attention_over_dequantized_rows(fmt, ratio, length, window):
    heads, total, dim = 2, 21, 32
    keys, values = (rows(seed, total, heads, dim, fmt) for seed in (8, 9))
    codes, scale = queries(ratio, length, heads * ratio, dim)
    arguments = dict(sm_scale=1 / math.sqrt(dim), window=window, round_p=False)
    found = ra.attention(codes, scale, keys, values, **arguments)
    q = dequantize_activation(codes, scale.unsqueeze(-1))
    expected = attention_in_fp64(q, dequantize_kv(keys), dequantize_kv(values), window)
    size = dequantize_kv(values).abs().max()
    assert float((found - expected).abs().max()) < 1e-5 * size
    # What would pass unseen if the bound were loose: an offset or a scale dropped, or misplaced.
    for other_keys, other_values in misread(keys, values, fmt):
        moved = ra.attention(codes, scale, other_keys, other_values, **arguments) - expected
        assert not float(moved.abs().max()) <= 1e-3 * size


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_rounding_p_moves_the_output_by_a_sixteenth_at_most(fmt):
    total, dim = 150, 64
    keys, values = (rows(seed, total, 1, dim, fmt) for seed in (1, 2))
    codes, scale = queries(3, total, 2, dim)
    arguments = dict(sm_scale=1 / math.sqrt(dim))
    exact = ra.attention(codes, scale, keys, values, **arguments, round_p=False)
    found = ra.attention(codes, scale, keys, values, **arguments)
    # E4M3 moves P by a sixteenth of itself, or half its last subnormal bit: 2^-10, times z / 256.
    # So an output moves by sum_t (P_t / 16 + 2^-18 z) |q_t| / l, where attention with |q_t| in the
    # place of values gives the first sum, l > 1/2 because M < max S + 1, and |q_t| <= 8.
    size = KVCodes(values.codes.abs(), values.scale.abs(), torch.zeros_like(values.offset))
    absolute = ra.attention(codes, scale, keys, size, **arguments, round_p=False)
    z = 2 * float(values.scale.abs().max())
    bound = absolute / 16 + total * 8 * 2 * 2.0**-18 * z
    assert bool(((found - exact).abs() <= bound * (1 + 1e-5) + 1e-6).all())
    assert float((found - exact).abs().max()) > 1e-4  # P was rounded at all
    # Offsets of values meet p as it is: of codes 0, rounding changes nothing.
    flat = KVCodes(torch.zeros_like(values.codes), values.scale, values.offset)
    pair = (ra.attention(codes, scale, keys, flat, **arguments, round_p=r) for r in (True, False))
    assert torch.equal(*pair)


def test_queries_without_keys_give_zeros():
    keys, values = (rows(seed, 3, 1, 32, KVFormat()) for seed in (1, 2))
    codes, scale = queries(0, 5, 1, 32)
    found = ra.attention(codes, scale, keys, values, sm_scale=1.0)
    assert bool((found[:2] == 0).all())
    assert bool((found[2:] != 0).any(-1).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("dim", [32, 96])
def test_packed_rows_come_back(fmt, dim):
    wanted = rows(5, 7, 3, dim, fmt)
    packed, scales = pack_kv(wanted)
    assert packed.shape == (7, 3, dim // 2)
    assert scales.shape == (7, 3, 2)
    found = unpack_kv(packed, scales)
    for one, other in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert torch.equal(one, other)
    # Channel j and its partner under RoPE, j + D/2, share a byte.
    byte = packed.view(torch.int8)
    assert torch.equal((byte << 4) >> 4, wanted.codes[..., : dim // 2])
    assert torch.equal(byte >> 4, wanted.codes[..., dim // 2 :])


def test_every_byte_unpacks_and_packs_again():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    scales = torch.ones(4, 2).half()
    assert torch.equal(pack_kv(unpack_kv(packed, scales))[0], packed)


def test_what_is_appended_through_shuffled_pages_is_read_back():
    heads, dim, pages, lengths = 2, 32, 9, (130, 64, 1)
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(pages, generator=generator)[: 3 * len(lengths)].view(len(lengths), 3)
    kv_codes = torch.full((2, pages, heads, KV_PAGE, dim // 2), 0xAA, dtype=torch.uint8)
    kv_scales = torch.full((2, pages, heads, KV_PAGE, 2), math.nan).half()
    before = kv_codes.clone()
    written = torch.zeros(pages, KV_PAGE, dtype=torch.bool)
    stored = []
    for b, length in enumerate(lengths):
        keys, values = (rows(10 * b + i, length + 2, heads, dim, KVFormat()) for i in (1, 2))
        place = torch.arange(length)
        slots = table[b, place // KV_PAGE] * KV_PAGE + place % KV_PAGE
        written.view(-1)[slots] = True
        # Two rows of padding go nowhere, wherever they stand.
        ra.append_kv(keys, values, torch.cat((slots, torch.tensor([-1, -1]))), kv_codes, kv_scales)
        stored.append((keys, values))
    for b, length in enumerate(lengths):
        found = ra.read_kv(kv_codes, kv_scales, table[b], length)
        for read, wanted in zip(found, stored[b], strict=True):
            for name in ("codes", "scale", "offset"):
                assert torch.equal(getattr(read, name), getattr(wanted, name)[:length])
    untouched = ~written[:, None, :].expand(pages, heads, KV_PAGE)
    for i in range(2):
        assert torch.equal(kv_codes[i][untouched], before[i][untouched])
        assert bool(kv_scales[i][untouched].isnan().all())
