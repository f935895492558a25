"""Numbers, against exact rational arithmetic that shares no code with them."""

import bisect
import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.calibration.scales import choose_scales
from quant.passes import SCALE_SEARCHES
from quant_kernels.formats import (
    GROUP_SIZES,
    FormatError,
    WeightFormat,
    bits_per_weight,
    effective_weight,
    every_format,
    join_scales,
    kernel_operand,
    midpoints,
    nearest_codes,
    on_grid,
    product_levels,
    round_e4m3,
    round_row_unit,
    split_scales,
)

FORMATS = every_format()
ANCHORED = [fmt for fmt in FORMATS if fmt.numerics != "exact" and fmt.group_size != -1]
LUT_32 = WeightFormat("w4afp8", 32, "lut")
EXACT_32 = WeightFormat("w4afp8", 32, "exact")
INT8_32 = WeightFormat("w4a8", 32, "int8")

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
each_anchored_format = pytest.mark.parametrize("fmt", ANCHORED, ids=str)

# E4M3 by its definition: four exponent bits with bias 7, three mantissa bits, exponent 0 subnormal,
# no infinity; exponent 15 with mantissa 7 is NaN. Code e * 8 + m is odd where m is odd.
E4M3 = [
    Fraction(m, 8) * Fraction(2) ** -6 if e == 0 else (1 + Fraction(m, 8)) * Fraction(2) ** (e - 7)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
]


def nearest_e4m3(x: Fraction) -> Fraction:
    """The nearest entry of the table, ties to the even code, saturating."""
    magnitude = min(abs(x), E4M3[-1])
    above = bisect.bisect_left(E4M3, magnitude)
    if E4M3[above] != magnitude:
        low, high = magnitude - E4M3[above - 1], E4M3[above] - magnitude
        if low < high or (low == high and above % 2):
            above -= 1
    return E4M3[above] if x >= 0 else -E4M3[above]


def random_scales(fmt: WeightFormat, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Scales [N, G] on the format's grid, different in every row and group, from integers alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    groups = fmt.groups(columns)
    if fmt.anchor is None:
        mantissa, exponent = draw(128, 256, rows, groups), draw(-16, -8, rows, groups)
        return torch.ldexp(mantissa.double(), exponent).to(torch.bfloat16)
    if fmt.numerics == "int8":
        t = draw(1, 16, rows, groups).double()
    else:
        codes = [i for i, value in enumerate(E4M3) if Fraction(1, 4) <= value < 56]
        chosen = draw(codes[0], codes[-1] + 1, rows, groups)
        t = torch.tensor([[float(E4M3[i]) for i in row] for row in chosen.tolist()]).double()
    t.scatter_(1, draw(0, groups, rows, 1), 56.0 if fmt.numerics == "lut" else 16.0)
    c = torch.ldexp(draw(8, 16, rows, 1).double(), draw(-16, -8, rows, 1))
    scales = (t * c).to(torch.bfloat16)
    assert torch.equal(scales.double(), t * c)
    return scales


def random_codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


def fractions(x: Tensor) -> list[list[Fraction]]:
    return [[Fraction(value) for value in row] for row in x.double().tolist()]


def exact_effective_weight(codes: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """The table of the module's docstring, element by element, in rational numbers."""
    s, rows, columns = fractions(scales), *codes.shape
    size = columns // len(s[0])
    out = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            q, stored = int(codes[n, k]), s[n][k // size]
            if fmt.numerics == "lut" and fmt.group_size != -1:
                c = max(s[n]) / 56
                value = nearest_e4m3(q * (stored / c)) * c
            else:
                value = q * stored
            out[n, k] = float(value)
    return out


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def test_round_e4m3_gives_back_every_e4m3_value():
    values = torch.tensor([[float(v), -float(v)] for v in E4M3])
    assert torch.equal(round_e4m3(values), values)


def test_round_e4m3_is_nearest_with_ties_to_even():
    # Every midpoint between neighbours, and both sides of it as close as FP32 can say.
    middle = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(E4M3)])
    zero, far = torch.zeros(()), torch.full((), 1e9)
    x = torch.cat([middle, torch.nextafter(middle, zero), torch.nextafter(middle, far)])
    x = torch.cat([x, -x])
    expected = torch.tensor([float(nearest_e4m3(Fraction(v))) for v in x.double().tolist()])
    assert torch.equal(round_e4m3(x), expected)


@pytest.mark.parametrize("x", [448.0, 449.0, 463.9, 464.0, 480.0, 1e6, 3e38, float("inf")])
def test_round_e4m3_saturates_instead_of_overflowing(x):
    assert round_e4m3(torch.tensor([x, -x])).tolist() == [448.0, -448.0]


def test_lut_levels_are_rounded_products_for_every_code_and_e4m3_scale():
    t = torch.tensor([float(v) for v in E4M3[1:]])  # positive, the largest of them saturate
    levels = product_levels(t, LUT_32)
    expected = [[float(nearest_e4m3(q * v)) for q in range(-8, 8)] for v in E4M3[1:]]
    assert torch.equal(levels, torch.tensor(expected))


@pytest.mark.parametrize("fmt", [EXACT_32, INT8_32], ids=str)
def test_other_levels_are_the_plain_products(fmt):
    t = torch.tensor([1.0, 3.0, 16.0])
    expected = torch.tensor([[float(q * v) for q in range(-8, 8)] for v in (1, 3, 16)])
    assert torch.equal(product_levels(t, fmt), expected)


@each_format
def test_effective_weight_is_the_table_in_rational_arithmetic(fmt):
    codes, scales = random_codes(5, 384), random_scales(fmt, 5, 384)
    # Operands have four significant bits and units at most eight: the product is exact in FP32.
    expected = exact_effective_weight(codes, scales, fmt)
    assert torch.equal(effective_weight(codes, scales, fmt).double(), expected)


@each_format
def test_effective_weight_takes_codes_of_any_strides(fmt):
    codes, scales = random_codes(6, 128), random_scales(fmt, 6, 128)
    strided = codes.T.contiguous().T
    assert not strided.is_contiguous()
    expected = effective_weight(codes, scales, fmt)
    assert torch.equal(effective_weight(strided, scales, fmt), expected)


@each_format
def test_effective_weight_tells_scales_of_another_group_or_row_apart(fmt):
    rows = groups = 4
    columns = rows * (32 if fmt.group_size == -1 else fmt.group_size)
    codes, scales = random_codes(rows, columns), random_scales(fmt, rows, columns)
    expected = effective_weight(codes, scales, fmt)
    wrong = {"rows rolled": scales.roll(1, dims=0)}
    if fmt.group_size != -1:
        assert scales.shape == (rows, groups)
        wrong |= {"groups rolled": scales.roll(1, dims=1), "transposed": scales.T.contiguous()}
    for what, other in wrong.items():
        assert relative_error(effective_weight(codes, other, fmt), expected) > 0.01, what


@each_format
def test_operand_is_exact_in_the_type_that_multiplies_it(fmt):
    codes, scales = random_codes(16, 384), random_scales(fmt, 16, 384)
    operand, c = kernel_operand(codes, scales, fmt)
    assert operand.shape == (16, 384)
    assert c.shape == (16, 1)
    if fmt.numerics == "lut" or fmt.per_channel:
        assert torch.equal(operand, operand.to(torch.float8_e4m3fn).float())
    if fmt.numerics == "int8":
        assert torch.equal(operand, operand.round())
        assert operand.min() >= -128
        assert operand.max() <= 127
    assert torch.equal(operand * c, effective_weight(codes, scales, fmt))


@each_format
def test_operand_refuses_scales_of_another_shape(fmt):
    codes, scales = random_codes(4, 384), random_scales(fmt, 4, 384)
    for wrong in (scales[:3], torch.cat((scales, scales), dim=1)):
        with pytest.raises(FormatError, match=r"need scales \[4, "):
            kernel_operand(codes, wrong, fmt)


@each_anchored_format
def test_grid_scales_split_and_join_without_loss(fmt):
    scales = random_scales(fmt, 64, 1152)
    t, c = split_scales(scales, fmt)
    assert torch.equal(join_scales(t, c), scales)
    assert torch.equal(t.double() * c.double(), scales.double())
    assert torch.equal(round_row_unit(c), c)
    assert bool((t.amax(dim=1) == fmt.anchor).all())
    assert on_grid(scales, fmt)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(ANCHORED),
    st.lists(st.integers(0, 62), min_size=1, max_size=9),
    st.integers(8, 15),
    st.integers(-60, 60),
)
def test_join_then_split_gives_back_group_scales_and_row_unit(fmt, picks, mantissa, exponent):
    if fmt.numerics == "lut":
        admissible = [float(v) for v in E4M3 if Fraction(1, 4) <= v <= 56]
    else:
        admissible = [float(i) for i in range(1, 17)]
    t = torch.tensor([[fmt.anchor, *(admissible[i % len(admissible)] for i in picks)]])
    c = torch.tensor([[mantissa * 2.0**exponent]])
    found_t, found_c = split_scales(join_scales(t, c), fmt)
    assert torch.equal(found_t, t)
    assert torch.equal(found_c, c)


@each_anchored_format
def test_scales_off_the_grid_are_told_apart(fmt):
    scales = random_scales(fmt, 8, 1152)
    for n, g in ((0, 0), (7, scales.shape[1] - 1)):
        moved = scales.clone()
        moved[n, g] = moved[n, g] * 1.01
        assert not on_grid(moved, fmt)


@each_format
@pytest.mark.parametrize("method", SCALE_SEARCHES)
def test_chosen_scales_are_on_the_grid_with_the_anchor_in_every_row(fmt, method):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 384, generator=generator) * torch.logspace(-6, 3, 24).unsqueeze(1)
    weight[:, 200:] *= torch.rand(24, 184, generator=generator).square()
    weight[5], weight[6, :128], weight[7, :383] = 0, 0, 0
    moments = torch.rand(384, generator=generator).square() + 0.01
    scales = choose_scales(weight, fmt, method, moments)
    assert scales.dtype == torch.bfloat16
    assert scales.shape == (24, fmt.groups(384))
    assert bool((scales > 0).all())
    assert on_grid(scales, fmt)
    if fmt.anchor is not None:
        t, c = split_scales(scales, fmt)
        assert bool((t == fmt.anchor).any(dim=1).all())
        assert bool((t >= (0.25 if fmt.numerics == "lut" else 1)).all())
        assert torch.equal(round_row_unit(c), c)


@pytest.mark.parametrize("fmt", [f for f in ANCHORED if f.numerics == "lut"], ids=str)
def test_vllm_loader_recovers_group_scales_and_row_units_exactly(fmt):
    """vLLM's W4A8-FP8 loader: c = max(s) / 448, t = E4M3(s / c), then t = E4M3(t / 8), c = 8 c."""
    weight = torch.randn(96, 1152, generator=torch.Generator().manual_seed(5))
    weight *= torch.logspace(-4, 2, 96).unsqueeze(1)
    weight[:, ::128] *= 9.0
    moments = torch.rand(1152) + 0.1
    for method in SCALE_SEARCHES:
        scales = choose_scales(weight, fmt, method, moments)
        c = scales.float().amax(dim=1, keepdim=True) / 448
        t = (scales.float() / c).to(torch.float8_e4m3fn).float()
        t = (t / 8).to(torch.float8_e4m3fn).float()
        c = c * 8
        assert torch.equal(t * c, scales.float())
        ours_t, ours_c = split_scales(scales, fmt)
        assert torch.equal(t, ours_t)
        assert torch.equal(c, ours_c)


@each_format
def test_nearest_codes_are_the_best_of_all_sixteen(fmt):
    scales = random_scales(fmt, 6, 384)
    size = 384 // fmt.groups(384)
    reach = scales.float().repeat_interleave(size, dim=1) * 10  # beyond both ends of the range
    weight = (torch.rand(6, 384, generator=torch.Generator().manual_seed(2)) * 2 - 1) * reach
    every = torch.stack(
        [
            effective_weight(torch.full((6, 384), q, dtype=torch.int8), scales, fmt)
            for q in range(-8, 8)
        ]
    )
    errors = (every.double() - weight.double()).abs()
    codes = nearest_codes(weight, scales, fmt)
    assert codes.dtype == torch.int8
    chosen = (effective_weight(codes, scales, fmt).double() - weight.double()).abs()
    # Levels have at most twelve significant bits, so FP32 holds the midpoints exactly.
    assert torch.equal(chosen, errors.amin(dim=0))


@each_format
def test_ties_go_to_the_smaller_code(fmt):
    scales = random_scales(fmt, 3, 384)
    size = 384 // fmt.groups(384)
    t, c = split_scales(scales, fmt)
    levels = product_levels(t, fmt) * c.unsqueeze(-1)
    middle = midpoints(levels)  # [N, G, 15]: put in the first 15 columns of each group
    weight = torch.zeros(3, 384 // size, size)
    weight[..., :15] = middle
    codes = nearest_codes(weight.view(3, 384), scales, fmt).view(weight.shape)[..., :15]
    assert torch.equal(codes, torch.arange(-8, 7, dtype=torch.int8).expand_as(codes))


def test_nearest_codes_are_contiguous_whatever_the_strides_of_the_weight():
    scales = random_scales(LUT_32, 4, 96)
    weight = torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).T
    codes = nearest_codes(weight, scales, LUT_32)
    assert codes.is_contiguous()
    assert torch.equal(codes, nearest_codes(weight.contiguous(), scales, LUT_32))


@pytest.mark.parametrize(
    ("in_features", "group_size", "advice"),
    [
        (192, 128, "use 64 or 32 or -1 (per channel)"),
        (96, 64, "use 32 or -1 (per channel)"),
        (40, 32, "use -1 (per channel)"),
    ],
)
def test_ragged_groups_are_refused_with_advice(in_features, group_size, advice):
    fmt = WeightFormat("w4afp8", group_size, "lut")
    with pytest.raises(FormatError) as caught:
        fmt.check(256, in_features, "model.layers.0.mlp.up_proj")
    message = str(caught.value)
    assert f"model.layers.0.mlp.up_proj [256, {in_features}]" in message
    assert f"{in_features % group_size} columns" in message
    assert advice in message


def test_advice_names_only_group_sizes_that_fit():
    for columns in range(8, 400, 8):
        for fmt in FORMATS:
            try:
                fmt.check(8, columns)
            except FormatError as error:
                advice = str(error).split("; use ")[1]
                sizes = [g for g in GROUP_SIZES if f"{g} or" in advice]
                assert sizes == [g for g in GROUP_SIZES if columns % g == 0]
            else:
                assert columns % fmt.groups(columns) == 0


@each_format
def test_columns_that_do_not_fill_a_word_are_refused(fmt):
    with pytest.raises(FormatError, match="multiple of 8"):
        fmt.check(8, 100)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("w4a4", 128, "lut"), "w4afp8, w4a8"),
        (("w4a8", 128, "lut"), "int8"),
        (("w4afp8", 128, "int8"), "lut, exact"),
        (("w4afp8", 100, "lut"), "32, 64, 128, or -1"),
        (("w4afp8", 0, "lut"), "32, 64, 128, or -1"),
    ],
)
def test_unknown_formats_are_refused_with_the_known_ones(arguments, known):
    with pytest.raises(FormatError, match=known):
        WeightFormat(*arguments)


def test_bits_per_weight_counts_the_scales():
    assert bits_per_weight(1024, LUT_32) == 4.5
    assert bits_per_weight(1024, WeightFormat("w4a8", 128, "int8")) == 4.125
    assert bits_per_weight(1024, WeightFormat("w4a8", -1, "int8")) == 4 + 16 / 1024
