"""KV4 rows: bounds from the formulas, exactness where it is promised, and attention from codes."""

import math

import pytest
import torch
from torch import Tensor

from quant_kernels.formats import FormatError
from quant_kernels.kv4 import CODES, KVFormat, dequantize_kv, quantize_kv

FORMATS = [KVFormat(), KVFormat(symmetric=True)]
U16 = 2.0**-11  # FP16's unit roundoff
SUBNORMAL = 2.0**-25  # half of FP16's smallest number


def rows(seed: int = 0, count: int = 400, dim: int = 64) -> Tensor:
    """Rows of very different sizes, off centre, with channels that stand out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim, generator=generator)
    x = x * torch.rand(dim, generator=generator).add(0.1) + torch.randn(dim, generator=generator)
    x[:, 5] += 6
    return x * torch.rand(count, 1, generator=generator).mul(12).sub(7).exp()


def relative_rms(x: Tensor, fmt: KVFormat) -> float:
    return float((dequantize_kv(quantize_kv(x, fmt)) - x).norm() / x.norm())


def test_asymmetric_error_is_at_most_half_a_step():
    x = rows()
    found = quantize_kv(x, KVFormat())
    step, offset = found.scale.float(), found.offset.float()
    # FP32 rounds (x - o) / s, and FP16 moves s and o; the ends lie a quarter of a step inside.
    bound = step / 2 * (1 + 1e-5) + U16 * offset.abs() + 8 * SUBNORMAL
    assert bool(((dequantize_kv(found) - x).abs() <= bound).all())
    wanted = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15.5
    assert bool(((step - wanted).abs() <= U16 * wanted + SUBNORMAL).all())
    assert int(found.codes.min()) == -8
    assert int(found.codes.max()) == 7


def test_symmetric_error_is_half_a_step_and_the_largest_is_exact():
    x = rows(1)
    found = quantize_kv(x, KVFormat(symmetric=True))
    step = found.scale.float().abs()
    error = (dequantize_kv(found) - x).abs()
    # Only what lies within half a step of the largest, on the other side of zero, is cut off.
    cut = x / found.scale.float() > 7.5
    bound = torch.where(cut, step, step / 2) * (1 + 1e-5) + 8 * (U16 * step + SUBNORMAL)
    assert bool((error <= bound).all())
    largest = x.abs().argmax(-1, keepdim=True)
    assert bool((found.codes.gather(-1, largest) == -8).all())
    assert bool((found.offset == 0).all())
    assert bool((found.scale < 0).any())  # where the largest is positive
    assert bool((found.scale > 0).any())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_codes_are_the_nearest_levels_of_what_is_stored(fmt):
    x = rows(2)
    found = quantize_kv(x, fmt)
    levels = torch.arange(CODES[0], CODES[1] + 1).float() * found.scale.float().unsqueeze(-1)
    levels = levels + found.offset.float().unsqueeze(-1)  # [rows, 1, 16]
    best = (levels - x.unsqueeze(-1)).abs().amin(-1)
    error = (dequantize_kv(found) - x).abs()
    assert bool((error <= best * (1 + 1e-4) + 1e-6 * x.abs()).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_rows_are_quantized_one_by_one(fmt):
    x = rows(3, count=24).view(2, 3, 4, 64)
    together = quantize_kv(x, fmt)
    for index in [(0, 0, 0), (1, 2, 3), (0, 2, 1)]:
        alone = quantize_kv(x[index], fmt)
        for one, other in zip(
            (alone.codes, alone.scale, alone.offset),
            (together.codes[index], together.scale[index], together.offset[index]),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_an_exact_grid_comes_back_exactly():
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(-8, 8, (50, 32), generator=generator).float()
    q[:, 0], q[:, 1] = -8.25, 7.25  # the ends of a range of 15.5 steps
    scale = 2.0 ** torch.randint(-4, 5, (50, 1), generator=generator)
    offset = scale * torch.randint(-20, 5, (50, 1), generator=generator)
    x = q * scale + offset
    found = quantize_kv(x, KVFormat())
    assert torch.equal(found.scale.float(), scale)
    assert torch.equal(found.offset.float(), offset)
    assert torch.equal(dequantize_kv(found)[:, 2:], x[:, 2:])


@pytest.mark.parametrize("value", [0.0, 3.14159, -250.7, 6e-5, 1e-7])
def test_a_constant_row_is_exact_to_fp16(value):
    x = torch.full((3, 16), value)
    assert torch.equal(dequantize_kv(quantize_kv(x, KVFormat())), x.half().float())
    symmetric = dequantize_kv(quantize_kv(x, KVFormat(symmetric=True)))
    # Positive or negative, it is the largest: code -8 times a scale that FP16 holds.
    assert bool(((symmetric - x).abs() <= U16 * abs(value) + 8 * SUBNORMAL).all())


def test_a_nearly_constant_row_keeps_its_level():
    x = 100 + 1e-3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    assert float((dequantize_kv(quantize_kv(x, KVFormat())) - x).abs().max()) <= 100 * U16 + 1e-3


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e8, -1e8])
def test_what_fp16_does_not_reach_is_never_finite_again(fmt, value):
    x = rows(6, count=3)
    clean = dequantize_kv(quantize_kv(x, fmt))
    x[1, 7] = value
    found = dequantize_kv(quantize_kv(x, fmt))
    assert not bool(torch.isfinite(found[1]).any())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_measured_errors_are_those_of_the_docstring():
    generator = torch.Generator().manual_seed(0)
    for dim, gaussian, log_normal in ((64, (0.088, 0.095), (0.104, 0.196)),
                                      (128, (0.097, 0.103), (0.127, 0.247))):  # fmt: skip
        x = torch.randn(5000, dim, generator=generator)
        for data, wanted in ((x, gaussian), (x.exp() - 1.6, log_normal)):
            found = tuple(relative_rms(data, fmt) for fmt in FORMATS)
            assert found == pytest.approx(wanted, rel=0.04)


def test_dtype_of_the_input_does_not_matter():
    x = rows(7).bfloat16()
    assert torch.equal(quantize_kv(x, KVFormat()).codes, quantize_kv(x.float(), KVFormat()).codes)


def test_other_widths_are_refused():
    with pytest.raises(FormatError, match="8 bits"):
        KVFormat(bits=8)


def test_bits_per_element_count_scale_and_offset():
    assert KVFormat().bits_per_element(64) == 4.5
    assert KVFormat(symmetric=True).bits_per_element(64) == 4.25
