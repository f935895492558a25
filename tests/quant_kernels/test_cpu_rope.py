"""The C++ rope_append against its definition, and nothing else in the cache touched.

Without a norm every step is one correctly rounded operation, so all bits agree; a norm's sum has
another order, which `assert_next_to` bounds.
"""

import itertools
import math

import pytest
import torch

from benchmarks.shapes import GQA_RATIOS
from quant_kernels import ops
from quant_kernels.packing import KV_PAGE, unpack_kv
from quant_kernels.registration import HEAD_DIMS
from tests.quant_kernels.triton.test_kv_append import (
    PAGES,
    Step,
    assert_next_to,
    assert_nothing_else_written,
    assert_same,
    each_dtype,
    each_mode,
)

pytestmark = pytest.mark.usefixtures("isa")

each_transform = pytest.mark.parametrize("transform", [False, True], ids=("", "transform"))


@each_mode
@each_transform
@each_dtype
def test_rows_are_the_definitions_to_the_last_bit(dtype, transform, symmetric):
    step = Step(dtype=dtype, transform=transform, symmetric=symmetric)
    found = step.run("cpu")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


@each_mode
@each_transform
@each_dtype
def test_rows_of_normed_heads(dtype, transform, symmetric):
    step = Step(dtype=dtype, norm=True, transform=transform, symmetric=symmetric, dim=96)
    for weights in (step.norms, tuple(w.to(dtype) for w in step.norms)):
        step.norms = weights
        found = step.run("cpu")
        assert_next_to(found, step.run("reference"))
        assert_nothing_else_written(step, found)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_heads_of_every_shape(ratio, dim):
    """Symmetric and transformed in turn, so that every ratio and dimension meets both."""
    odd = (GQA_RATIOS.index(ratio) + HEAD_DIMS.index(dim)) % 2 == 1
    step = Step(tokens=2, ratio=ratio, dim=dim, symmetric=odd, transform=not odd)
    found = step.run("cpu")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)
    normed = Step(tokens=2, ratio=ratio, dim=dim, symmetric=not odd, transform=odd, norm=True)
    assert_next_to(normed.run("cpu"), normed.run("reference"))


@pytest.mark.parametrize("indices", [torch.int32, torch.int64], ids=("int32", "int64"))
def test_a_token_without_a_slot_has_queries_and_stores_nothing(indices):
    step = Step(indices=indices)
    step.arguments["slots"][:] = torch.tensor([-1, -64, -65, -128])
    found = step.run("cpu")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


def test_the_ends_of_pages():
    step = Step(tokens=6, ratio=1)
    last = PAGES * KV_PAGE - 1
    step.arguments["slots"][:] = torch.tensor([0, KV_PAGE - 1, KV_PAGE, last, 2 * KV_PAGE - 1, -1])
    found = step.run("cpu")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


@each_mode
@each_dtype
def test_rows_that_no_scale_fits(dtype, symmetric):
    """Zeros, equal numbers, NaN, Inf, and what FP16 does not reach, in queries, keys and values."""
    step = Step(tokens=8, kv_heads=1, ratio=2, dtype=dtype, symmetric=symmetric)
    qkv = step.arguments["qkv"].unflatten(1, (-1, step.dim))
    for head, place in itertools.product(range(4), (7, 40)):
        qkv[2, head, place] = math.nan
        qkv[3, head, place] = math.inf
        qkv[4, head, place] = -math.inf
        qkv[5, head, place] = min(torch.finfo(dtype).max / 4, 3e6)
    qkv[0], qkv[1] = 0.0, -0.3
    qkv[5, :, 8] *= -1
    qkv[6] *= 1e-5
    qkv[7, :, 9] = 6e4
    step.arguments["slots"][:] = torch.arange(8) + KV_PAGE
    found = step.run("cpu")
    assert_same(found, step.run("reference"))
    rows = found["kv_scales"][:, 1]  # [2, Hk, KV_PAGE, 2]
    assert bool((rows[:, :, 0] == 0).all())
    assert bool(rows[:, :, 2, 0].isnan().all())
    assert bool(found["q_scale"][2, 1:-1].isnan().all())


@each_mode
def test_rows_of_every_size_that_fp16_has(symmetric):
    """Ranges from below FP16's smallest number to beyond its largest, where s and o saturate."""
    step = Step(tokens=64, kv_heads=1, ratio=1, dtype=torch.float32, symmetric=symmetric)
    step.arguments["qkv"].mul_(torch.logspace(-10, 6, 64)[:, None])
    step.arguments["slots"][:] = torch.arange(64)
    assert_same(step.run("cpu"), step.run("reference"))


@each_mode
def test_codes_at_ties_are_even(symmetric):
    """Values a quarter apart with s = 1 (or -1): every other one is a tie."""
    step = Step(tokens=1, kv_heads=1, ratio=1, symmetric=symmetric, dtype=torch.float32)
    value = torch.arange(64) / 4 - (8.0 if symmetric else 1.0)
    value[0] = -8.0 if symmetric else -0.75
    value[63] = 7.0 if symmetric else 14.75
    step.arguments["qkv"][0, -64:] = value
    step.arguments["slots"][0] = 5
    found = step.run("cpu")
    row = unpack_kv(found["kv_codes"][1, 0, 0, 5], found["kv_scales"][1, 0, 0, 5])
    assert abs(float(row.scale)) == 1
    exact = (value - row.offset.float()) / row.scale.float()
    ties = (exact - exact.floor() == 0.5) & (exact > -8) & (exact < 7)
    assert int(ties.sum()) >= 10
    assert bool((row.codes[ties] % 2 == 0).all())
    assert torch.equal(row.codes.float(), exact.round().clamp(-8, 7))


def test_threads_change_nothing(threads):
    # Enough for several threads; two pages of slots, and most tokens store nothing.
    step = Step(tokens=180, kv_heads=2, ratio=8, dim=128, norm=True, transform=True)
    threads(1)
    wanted = step.run("cpu")
    for count in (2, 3, 16, 64):
        threads(count)
        assert_same(step.run("cpu"), wanted)
    assert_nothing_else_written(step, wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("slots", PAGES * KV_PAGE), ("positions", 97), ("positions", -1)]
)
def test_an_index_out_of_range_is_refused_before_anything_is_written(name, value):
    step = Step()
    step.arguments[name][-1] = value
    before = step.arguments["qkv"].clone()
    with pytest.raises(RuntimeError, match=r"rope_append: a position, slot.* out of range"):
        step.run("cpu")
    assert torch.equal(step.arguments["qkv"].nan_to_num(), before.nan_to_num())


def test_no_tokens():
    step = Step(tokens=3)
    step.tokens = 0
    step.arguments |= {name: step.arguments[name][:0] for name in ("qkv", "positions", "slots")}
    found = step.run("cpu")
    assert bool((found["kv_codes"] == 0xAA).all())
    assert bool((found["kv_scales"] == 123.0).all())


def test_the_cache_may_lie_anywhere():
    """Codes at an odd address, and scales that are not a multiple of four bytes further."""
    step = Step(tokens=4, dim=32)
    wanted = step.run("cpu")
    cache = (2, PAGES, step.kv_heads, KV_PAGE)
    codes = torch.full((math.prod(cache) * 16 + 2,), 0xAA, dtype=torch.uint8)
    scales = torch.full((math.prod(cache) * 2 + 2,), 123.0, dtype=torch.float16)
    q_codes = torch.empty(4, 6, 32, dtype=torch.float8_e4m3fn)
    ops.rope_append(
        *step.arguments.values(), q_codes, torch.empty(4, 6),
        codes[1:-1].view(*cache, 16), scales[1:-1].view(*cache, 2), eps=0.0123, backend="cpu",
    )  # fmt: skip
    assert torch.equal(codes[1:-1].view(*cache, 16), wanted["kv_codes"])
    assert torch.equal(scales[1:-1].view(*cache, 2), wanted["kv_scales"])
    assert codes[[0, -1]].tolist() == [0xAA, 0xAA]
    assert scales[[0, -1]].tolist() == [123, 123]
