"""The GEMM against the reference backend: INT8 bit for bit, FP8 within its sums' roundings."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import EDGE_COLUMNS, EDGE_ROWS, EDGE_TOKENS
from quant.calibration.scales import choose_scales
from quant_kernels import ops, reference
from quant_kernels.formats import WeightFormat, effective_weight, every_format, nearest_codes
from quant_kernels.packing import PackedWeight, SplitWeight, pack_int4, split_weight, unpack_int4
from quant_kernels.triton import gemm
from quant_kernels.triton.tuning import Config

FORMATS = every_format()
INT8_FORMATS = [fmt for fmt in FORMATS if fmt.scheme == "w4a8"]
FP8_FORMATS = [fmt for fmt in FORMATS if fmt.scheme == "w4afp8"]
GROUPED = [fmt for fmt in FORMATS if not fmt.per_channel]
U = 2.0**-24  # FP32's unit roundoff
TILE = Config(64, 16, 1, 4, 3)


def make_weight(n: int, k: int, fmt: WeightFormat, seed: int = 0) -> PackedWeight:
    """A packed weight whose scales differ between rows and groups by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, 1, generator=generator).mul(4).exp() * 0.01
    weight *= torch.rand(k, generator=generator).add(0.05)
    weight[:, ::7] *= 3
    scales = choose_scales(weight, fmt, "absmax")
    return PackedWeight(pack_int4(nearest_codes(weight, scales, fmt)), scales, fmt)


def make_tokens(m: int, k: int, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Quantized tokens of very different scales."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator)
    x *= torch.rand(m, 1, generator=generator).mul(5).exp()
    return reference.quantize_activation(x, fmt.activation)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def multiply(
    config: Config,
    tokens: tuple[Tensor, Tensor],
    weight: PackedWeight | SplitWeight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu_mul: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The kernel's answer in a poisoned output, with a poisoned workspace of just enough bytes."""
    split = split_weight(weight) if isinstance(weight, PackedWeight) else weight
    m, n = len(tokens[0]), split.shape[0]
    out = torch.full((m, n // 2 if silu_mul else n), float("nan"), dtype=dtype)
    workspace = torch.full((4 * config.split_k * n * m,), 0xAA, dtype=torch.uint8)
    gemm.run(config, *tokens, split, out, bias, residual, silu_mul, workspace)
    return out


def bound(tokens: tuple[Tensor, Tensor], weight: PackedWeight, *addends: Tensor | None) -> Tensor:
    """How far two FP32 evaluations of Y may lie apart, [M, N]; 0 for INT8, whose sums are exact.

    Products of an E4M3 code and an operand of at most twelve bits are exact in FP32. A sum of K of
    them in any order is off by at most (K - 1) U sum|x w|, to first order; a group's scale rounds
    twice more, the two factors and two addends once each. Twice, as either evaluation may be off,
    and twice again for the higher orders.
    """
    if weight.fmt.scheme == "w4a8":
        return torch.zeros(len(tokens[0]), len(weight.words), dtype=torch.float64)
    w = effective_weight(unpack_int4(weight.words), weight.scales, weight.fmt).double()
    x = tokens[0].double() * tokens[1].double()
    total = x.abs() @ w.abs().T
    for addend in addends:
        total = total if addend is None else total + addend.double().abs()
    return 4 * (w.shape[1] + 5) * U * total


def assert_close(found: Tensor, wanted: Tensor, within: Tensor) -> None:
    assert bool(((found.double() - wanted.double()).abs() <= within).all())


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def fitting(fmt: WeightFormat) -> list[int]:
    """EDGE_COLUMNS that the format and its split layout take."""
    step = 64 if fmt.group_size in (32, 64, -1) else 128
    return [k for k in EDGE_COLUMNS if k % step == 0]


def edge_cases() -> list[tuple[WeightFormat, int, int, int, Config]]:
    """Every format with tokens, rows and columns around the edges of different tiles."""
    tiles = [TILE, Config(128, 32, 1, 8, 3), Config(64, 64, 2, 4, 3), Config(128, 128, 1, 8, 3)]
    cases = []
    for i, fmt in enumerate(FORMATS):
        columns = fitting(fmt)
        for j, tile in enumerate(tiles):
            fits = [m for m in EDGE_TOKENS if tile.block_m // 8 <= m <= 4 * tile.block_m]
            m = fits[(3 * i + j) % len(fits)]
            n = (*EDGE_ROWS, 5)[(i + j) % (len(EDGE_ROWS) + 1)]
            cases.append((fmt, m, n, columns[(i + j) % len(columns)], tile))
    return cases


@pytest.mark.parametrize(("fmt", "m", "n", "k", "config"), edge_cases(), ids=str)
def test_every_format_at_the_edges_of_its_tiles(fmt, m, n, k, config):
    weight, tokens = make_weight(n, k, fmt), make_tokens(m, k, fmt)
    bias = noise(n) if m % 2 else None
    residual = noise(m, n, seed=3).bfloat16() if n % 16 else None
    found = multiply(config, tokens, weight, bias=bias, residual=residual)
    wanted = torch.full((m, n), float("nan"))
    ops.gemm(*tokens, weight, wanted, bias=bias, residual=residual, backend="reference")
    assert_close(found, wanted, bound(tokens, weight, bias, residual))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_op_takes_a_prepared_weight(fmt):
    weight, tokens = make_weight(40, 384, fmt), make_tokens(3, 384, fmt)
    found, wanted = (torch.full((3, 40), float("nan")) for _ in range(2))
    ops.gemm(*tokens, ops.prepare(weight, backend="triton"), found, backend="triton")
    ops.gemm(*tokens, weight, wanted, backend="reference")
    assert_close(found, wanted, bound(tokens, weight))


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=str)
def test_fp16_operands_replace_fp8_ones(fmt, monkeypatch):
    monkeypatch.setattr(gemm, "fp8_operands", lambda _: False)
    weight, tokens = make_weight(72, 384, fmt), make_tokens(17, 384, fmt)
    found = multiply(TILE, tokens, weight)
    wanted = reference.gemm(*tokens, weight, out_dtype=torch.float32)
    assert_close(found, wanted, bound(tokens, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", [INT8_FORMATS[0], FP8_FORMATS[0]], ids=str)
def test_narrow_outputs_are_the_fp32_result_rounded_once(fmt, dtype):
    weight, tokens = make_weight(40, 192, fmt), make_tokens(7, 192, fmt)
    bias = noise(40).to(dtype)
    full = multiply(TILE, tokens, weight, bias=bias)
    narrow = multiply(TILE, tokens, weight, bias=bias, dtype=dtype)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, full.to(dtype))


@pytest.mark.parametrize("split_k", [2, 4, 8])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size in (64, -1)], ids=str)
def test_split_k_adds_its_parts_in_order(fmt, split_k):
    # 576 columns are nine spans of 64: parts of unequal length, and with eight an empty one.
    weight, tokens = make_weight(40, 576, fmt), make_tokens(5, 576, fmt)
    bias, residual = noise(40), noise(5, 40, seed=3)
    config = Config(64, 16, split_k, 4, 3)
    found = multiply(config, tokens, weight, bias=bias, residual=residual)
    again = multiply(config, tokens, weight, bias=bias, residual=residual)
    whole = multiply(TILE, tokens, weight, bias=bias, residual=residual)
    assert torch.equal(found, again)
    assert_close(found, whole, bound(tokens, weight, bias, residual))


@pytest.mark.parametrize("split_k", [1, 4])
@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.group_size in (128, -1)], ids=str)
def test_silu_mul_takes_gate_and_up_from_the_halves_of_the_weight(fmt, split_k):
    m, f, k = 17, 40, 256
    weight, tokens = make_weight(2 * f, k, fmt), make_tokens(m, k, fmt)
    # Gates of some units, where silu is neither 0 nor the identity.
    tokens = tokens[0], tokens[1] / 100
    bias = noise(2 * f)
    found = multiply(Config(64, 16, split_k, 4, 3), tokens, weight, bias=bias, silu_mul=True)
    wanted = torch.full((m, f), float("nan"))
    ops.gemm(*tokens, weight, wanted, bias=bias, silu_mul=True, backend="reference")
    y = reference.gemm(*tokens, weight, bias, torch.float32).double()
    (gate, up), (gate_off, up_off) = y.chunk(2, -1), bound(tokens, weight, bias).chunk(2, -1)
    assert float(gate.abs().median()) > 0.5
    # silu's slope is at most 1.1; it and the product take a few roundings more.
    silu = torch.nn.functional.silu(gate).abs()
    within = 1.1 * gate_off * (up.abs() + up_off) + silu * up_off
    assert_close(found, wanted, within + 32 * U * wanted.double().abs() + 1e-30)


@pytest.mark.parametrize("fmt", [INT8_FORMATS[2], FP8_FORMATS[2]], ids=str)
def test_gate_and_up_may_be_quantized_as_they_are_stored(fmt):
    m, f = 9, 72
    weight, tokens = make_weight(2 * f, 128, fmt), make_tokens(m, 128, fmt)
    weight = ops.prepare(weight, backend="triton")
    for kind, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        out = torch.full((m, f), float("nan"), dtype=torch.float16)
        codes = torch.full((m, f), 0x55, dtype=torch.uint8).view(dtype)
        scale = torch.full((m, 1), float("nan"))
        x = tokens[0], tokens[1] / 100
        ops.gemm(*x, weight, out, silu_mul=True, codes=codes, scale=scale, backend="triton")
        wanted = reference.quantize_activation(out, kind)
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(scale, wanted[1])


@pytest.mark.parametrize("fmt", [INT8_FORMATS[2], FP8_FORMATS[2]], ids=str)
def test_rows_may_be_strided_and_nothing_beside_them_is_written(fmt):
    m, n, k = 18, 72, 128
    weight, (codes, scale) = make_weight(n, k, fmt), make_tokens(m, k, fmt)
    wide = torch.full((m, k + 48), 0x7F, dtype=torch.uint8).view(codes.dtype)
    wide[:, 16 : 16 + k] = codes
    scales = torch.full((m, 3), float("nan"))
    scales[:, 1:2] = scale
    residual = torch.full((m, n + 5), float("nan"))
    residual[:, :n] = noise(m, n)
    around = torch.full((m + 2, n + 7), 77.0)
    out = around[1:-1, 3 : 3 + n]
    for config in (TILE, Config(64, 16, 2, 4, 3)):
        around.fill_(77.0)
        workspace = torch.full((4 * 2 * n * m,), 0xAA, dtype=torch.uint8)
        gemm.run(
            config, wide[:, 16 : 16 + k], scales[:, 1:2], split_weight(weight), out,
            None, residual[:, :n], False, workspace,
        )  # fmt: skip
        plain = reference.gemm(
            codes, scale, weight, None, torch.float32, residual[:, :n].contiguous()
        )
        assert_close(out, plain, bound((codes, scale), weight, residual[:, :n]))
        inside = torch.zeros_like(around, dtype=torch.bool)
        inside[1:-1, 3 : 3 + n] = True
        assert bool((around[~inside] == 77.0).all())


@pytest.mark.parametrize("split_k", [1, 2])
def test_the_residual_may_be_the_output(split_k):
    fmt = INT8_FORMATS[1]
    weight, tokens = make_weight(136, 128, fmt), make_tokens(33, 128, fmt)
    out = noise(33, 136).bfloat16()
    wanted = reference.gemm(*tokens, weight, None, torch.bfloat16, out.clone())
    workspace = torch.empty(4 * 2 * 136 * 33, dtype=torch.uint8)
    config = Config(64, 16, split_k, 4, 3)
    gemm.run(config, *tokens, split_weight(weight), out, None, out, False, workspace)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("group_size", [128, -1])
def test_int8_sums_are_exact_beyond_what_fp32_can_count(group_size):
    # 127 * 112 * 2048 > 2^24: a sum in FP32 would have lost the last product.
    k, fmt = 2048, WeightFormat("w4a8", group_size, "int8")
    codes = torch.full((1, k), 127, dtype=torch.int8)
    codes[0, -1] = 1
    q = torch.full((2, k), 7, dtype=torch.int8)
    q[1] = -8
    scales = torch.full((2, fmt.groups(k)), 16.0, dtype=torch.bfloat16)
    weight = PackedWeight(pack_int4(q), scales, fmt)
    found = multiply(TILE, (codes, torch.ones(1, 1)), weight)
    total = 16 * (127 * (k - 1) + 1)
    assert torch.equal(found, torch.tensor([[7 * total, -8 * total]]).float())


@pytest.mark.parametrize("fmt", GROUPED, ids=str)
def test_scales_of_another_row_or_group_are_told_apart(fmt):
    g = fmt.group_size
    n, k = (4, 4 * g) if g > 32 else (8, 8 * g)
    weight, tokens = split_weight(make_weight(n, k, fmt)), make_tokens(4, k, fmt)
    right = multiply(TILE, tokens, weight)
    t = weight.t
    swapped = t.clone()
    swapped[[0, 1]] = t[[1, 0]]
    for other in (swapped, t.T.contiguous(), t.roll(1, dims=0), t.roll(1, dims=1)):
        wrong = multiply(TILE, tokens, SplitWeight(weight.codes, other, weight.c, fmt))
        assert relative_error(wrong, right) > 1e-4


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_factors_of_another_row_or_token_are_told_apart(fmt):
    weight, (codes, scale) = split_weight(make_weight(8, 128, fmt)), make_tokens(4, 128, fmt)
    right = multiply(TILE, (codes, scale), weight)
    assert relative_error(multiply(TILE, (codes, scale.roll(1, 0)), weight), right) > 0.01
    if fmt.numerics != "exact" or fmt.per_channel:
        other = SplitWeight(weight.codes, weight.t, weight.c.roll(1, 0), fmt)
        assert relative_error(multiply(TILE, (codes, scale), other), right) > 0.01


@pytest.mark.parametrize("fmt", [INT8_FORMATS[0], FP8_FORMATS[-1]], ids=str)
def test_no_tokens_are_no_work(fmt):
    weight, tokens = make_weight(40, 128, fmt), make_tokens(0, 128, fmt)
    assert multiply(TILE, tokens, weight).shape == (0, 40)


@pytest.mark.parametrize("found", [None, 4 * 4 * 40 * 3 - 4])
def test_a_split_without_enough_workspace_is_refused(found):
    fmt = INT8_FORMATS[0]
    weight, tokens = split_weight(make_weight(40, 128, fmt)), make_tokens(3, 128, fmt)
    workspace = None if found is None else torch.zeros(found, dtype=torch.uint8)
    with pytest.raises(ops.OpError, match=r"\[40, 128\] splits K in 4 parts.* 1920 bytes, got"):
        gemm.run(
            Config(64, 16, 4, 4, 3), *tokens, weight, torch.empty(3, 40), None, None, False,
            workspace,
        )  # fmt: skip
