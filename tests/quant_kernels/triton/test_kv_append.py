"""Queries, keys and values as the definition has them, and nothing else in the cache touched.

Without a norm every step is one correctly rounded operation, so all bits agree. A norm's sum has
another order: what it moves is bounded as in `test_activation.py`, and a row's FP16 scale or offset
may go to its neighbour, 2^-10 away.
"""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import GQA_RATIOS, HEAD_DIMS
from quant_kernels import ops
from quant_kernels.packing import KV_PAGE, unpack_kv

PAGES = 3
POSITIONS = 97
MOVED = 0.001
BACKENDS = ("triton", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("bf16", "fp16", "fp32"))
each_mode = pytest.mark.parametrize("symmetric", [False, True], ids=("asymmetric", "symmetric"))


@dataclass
class Step:
    """The arguments of one call, all of them views with gaps between their rows where that goes."""

    tokens: int = 4
    kv_heads: int = 2
    ratio: int = 3
    dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    norm: bool = False
    transform: bool = False
    symmetric: bool = False
    indices: torch.dtype = torch.int64
    arguments: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.tokens + self.ratio + self.dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        heads = self.kv_heads * (self.ratio + 2)
        qkv = normal(self.tokens, heads, self.dim) * normal(1, heads, self.dim).exp()
        qkv = (qkv + 0.7 * normal(1, heads, self.dim)).flatten(1)
        gap = torch.full((self.tokens, 3), math.nan)
        angles = normal(POSITIONS, self.dim // 2 + 1) * 3
        slots = torch.randperm(PAGES * KV_PAGE, generator=generator)[: self.tokens]
        slots[1::3] = torch.tensor([-1, -7, -64]).repeat(len(slots))[: len(slots[1::3])]
        positions = torch.randint(POSITIONS, (self.tokens,), generator=generator)
        self.arguments = {
            "qkv": torch.cat((qkv, gap), dim=1).to(self.dtype)[:, :-3],
            "positions": positions.to(self.indices),
            "cos": angles.cos()[:, 1:],
            "sin": angles.sin()[:, :-1].contiguous(),
            "slots": slots.to(self.indices),
        }
        self.norms = (normal(self.dim) + 1.3, normal(self.dim) + 0.4) if self.norm else None
        self.key_transform = None
        if self.transform:
            wide = normal(2, self.kv_heads, self.dim + 3)
            self.key_transform = (wide[0, :, 1:-2].exp(), wide[1, :, 2:-1])

    def run(self, backend: str) -> dict[str, Tensor]:
        """Every output, poisoned before."""
        hq = self.kv_heads * self.ratio
        q_codes = torch.full((self.tokens, hq + 1, self.dim + 3), 0xAA, dtype=torch.uint8)
        q_scale = torch.full((self.tokens, hq + 2), math.nan)
        cache = (2, PAGES, self.kv_heads, KV_PAGE)
        kv_codes = torch.full((*cache, self.dim // 2), 0xAA, dtype=torch.uint8)
        kv_scales = torch.full((*cache, 2), 123.0, dtype=torch.float16)
        ops.rope_append(
            *self.arguments.values(),
            q_codes[:, :hq, 1:-2].view(torch.float8_e4m3fn), q_scale[:, 1:-1],
            kv_codes, kv_scales, norms=self.norms, eps=0.0123,
            key_transform=self.key_transform, symmetric=self.symmetric, backend=backend,
        )  # fmt: skip
        return {
            "q_codes": q_codes,
            "q_scale": q_scale,
            "kv_codes": kv_codes,
            "kv_scales": kv_scales,
        }

    def written(self) -> Tensor:
        """[pages, KV_PAGE]: which places of the cache the slots name."""
        places = torch.zeros(PAGES * KV_PAGE, dtype=torch.bool)
        slots = self.arguments["slots"].long()
        places[slots[slots >= 0]] = True
        return places.view(PAGES, KV_PAGE)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal, NaN to NaN; the sign of an E4M3 NaN is free."""
    for name, x in found.items():
        y = wanted[name]
        if name == "q_codes":
            x, y = (codes.masked_fill(codes == 0xFF, 0x7F) for codes in (x, y))
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_next_to(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    scales = [(found[name], wanted[name]) for name in ("q_scale", "kv_scales")]
    torch.testing.assert_close(*scales[0], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(*scales[1], rtol=2**-10, atol=2**-24)
    rows = [unpack_kv(x["kv_codes"], x["kv_scales"]).codes.int() for x in (found, wanted)]
    bits = [x["q_codes"].int() for x in (found, wanted)]
    queries = [torch.where(x < 128, x, 127 - x) for x in bits]  # -0 is one below 0
    for x, y in (rows, queries):
        apart = (x - y).abs()
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) <= max(1, MOVED * apart.numel())


def assert_nothing_else_written(step: Step, found: dict[str, Tensor]) -> None:
    free = ~step.written()
    assert bool((found["kv_codes"].transpose(2, 3)[:, free] == 0xAA).all())
    assert bool((found["kv_scales"].transpose(2, 3)[:, free] == 123.0).all())
    kept = found["kv_scales"].transpose(2, 3)[:, ~free]
    assert not bool((kept == 123.0).any())
    assert bool((found["q_codes"][:, -1] == 0xAA).all())
    assert bool((found["q_codes"][:, :, [0, -2, -1]] == 0xAA).all())
    assert bool(found["q_scale"][:, [0, -1]].isnan().all())
    assert not bool(found["q_scale"][:, 1:-1].isnan().any())


@each_mode
@pytest.mark.parametrize("transform", [False, True], ids=("", "transform"))
@each_dtype
def test_rows_are_the_definitions_to_the_last_bit(dtype, transform, symmetric):
    step = Step(dtype=dtype, transform=transform, symmetric=symmetric)
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


@each_mode
@pytest.mark.parametrize("transform", [False, True], ids=("", "transform"))
@each_dtype
def test_rows_of_normed_heads(dtype, transform, symmetric):
    step = Step(dtype=dtype, norm=True, transform=transform, symmetric=symmetric, dim=96)
    found = step.run("triton")
    assert_next_to(found, step.run("reference"))
    assert_nothing_else_written(step, found)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("ratio", GQA_RATIOS)
def test_heads_of_every_shape(ratio, dim):
    """Symmetric and transformed in turn, so that every ratio and dimension meets both."""
    odd = (GQA_RATIOS.index(ratio) + HEAD_DIMS.index(dim)) % 2 == 1
    step = Step(tokens=2, ratio=ratio, dim=dim, symmetric=odd, transform=not odd)
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)
    normed = Step(tokens=2, ratio=ratio, dim=dim, symmetric=not odd, transform=odd, norm=True)
    assert_next_to(normed.run("triton"), normed.run("reference"))


@each_mode
def test_the_padding_of_a_head_is_not_in_its_range(symmetric):
    """A dimension that is no power of two, and keys and values whose range ends far from zero."""
    for sign in (-1, 1):
        step = Step(tokens=2, ratio=1, dim=96, symmetric=symmetric, transform=True)
        step.arguments["qkv"].abs_().add_(2.3).mul_(sign)
        _, shift = step.key_transform
        shift.copy_(shift.abs() * -sign - 31 * sign)
        found = step.run("triton")
        assert_same(found, step.run("reference"))


def test_many_query_heads_and_one_kv_head():
    step = Step(tokens=2, kv_heads=1, ratio=17, dim=32, indices=torch.int32, transform=True)
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


@pytest.mark.parametrize("indices", [torch.int32, torch.int64], ids=("int32", "int64"))
def test_a_token_without_a_slot_has_queries_and_stores_nothing(indices):
    step = Step(indices=indices)
    step.arguments["slots"][:] = torch.tensor([-1, -64, -65, -128])
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


def test_the_ends_of_pages():
    step = Step(tokens=6, ratio=1)
    last = PAGES * KV_PAGE - 1
    step.arguments["slots"][:] = torch.tensor([0, KV_PAGE - 1, KV_PAGE, last, 2 * KV_PAGE - 1, -1])
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    assert_nothing_else_written(step, found)


def test_positions_are_read_per_token():
    """The same projection at other positions: other queries and keys, the same values."""
    step = Step(tokens=2, ratio=1)
    for name in ("qkv", "slots"):
        step.arguments[name] = step.arguments[name].clone()
    step.arguments["qkv"][1] = step.arguments["qkv"][0]
    step.arguments["slots"][:] = torch.tensor([70, 5])
    step.arguments["positions"][:] = torch.tensor([4, 88])
    found = step.run("triton")
    keys, values = found["kv_codes"]
    assert not torch.equal(found["q_codes"][0], found["q_codes"][1])
    assert not torch.equal(keys[1, :, 6], keys[0, :, 5])
    assert torch.equal(values[1, :, 6], values[0, :, 5])
    assert torch.equal(found["kv_scales"][1, 1, :, 6], found["kv_scales"][1, 0, :, 5])


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
    found = step.run("triton")
    assert_same(found, step.run("reference"))
    rows = found["kv_scales"][:, 1]  # [2, Hk, KV_PAGE, 2]
    assert bool((rows[:, :, 0] == 0).all())
    assert bool(rows[:, :, 2, 0].isnan().all())
    assert bool((found["q_scale"][0, 1:-1] == 1).all())
    assert bool(found["q_scale"][2, 1:-1].isnan().all())


@each_mode
def test_codes_at_ties_are_even(symmetric):
    """Values a quarter apart with s = 1 (or -1): every other one is a tie."""
    step = Step(tokens=1, kv_heads=1, ratio=1, symmetric=symmetric, dtype=torch.float32)
    value = torch.arange(64) / 4 - (8.0 if symmetric else 1.0)
    value[0] = -8.0 if symmetric else -0.75
    value[63] = 7.0 if symmetric else 14.75
    step.arguments["qkv"][0, -64:] = value
    step.arguments["slots"][0] = 5
    found = step.run("triton")
    row = unpack_kv(found["kv_codes"][1, 0, 0, 5], found["kv_scales"][1, 0, 0, 5])
    assert abs(float(row.scale)) == 1
    exact = (value - row.offset.float()) / row.scale.float()
    ties = (exact - exact.floor() == 0.5) & (exact > -8) & (exact < 7)
    assert int(ties.sum()) >= 10
    assert bool((row.codes[ties] % 2 == 0).all())
    assert torch.equal(row.codes.float(), exact.round().clamp(-8, 7))


def test_no_tokens():
    step = Step(tokens=3)
    step.tokens = 0
    step.arguments |= {name: step.arguments[name][:0] for name in ("qkv", "positions", "slots")}
    found = step.run("triton")
    assert bool((found["kv_codes"] == 0xAA).all())
    assert bool((found["kv_scales"] == 123.0).all())
