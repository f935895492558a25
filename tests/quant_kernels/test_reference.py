"""The reference ops against integer and float64 arithmetic, with bounds from their formulas."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.calibration.scales import choose_scales
from quant_kernels import reference
from quant_kernels.formats import (
    FormatError,
    WeightFormat,
    effective_weight,
    every_format,
    kernel_operand,
    nearest_codes,
)
from quant_kernels.packing import PackedWeight, pack_int4, unpack_int4

FORMATS = every_format()
INT8_FORMATS = [fmt for fmt in FORMATS if fmt.scheme == "w4a8"]
FP8_FORMATS = [fmt for fmt in FORMATS if fmt.scheme == "w4afp8"]
LUT_128 = WeightFormat("w4afp8", 128, "lut")
INT8_128 = WeightFormat("w4a8", 128, "int8")
U = 2.0**-24  # FP32's unit roundoff

SHAPES = [(1, 8, 128), (3, 40, 384), (17, 5, 1152)]  # M, N, K


def make_weight(n: int, k: int, fmt: WeightFormat, seed: int = 0) -> PackedWeight:
    """A packed weight whose scales differ between rows and groups by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight *= torch.rand(n, 1, generator=generator).mul(4).exp() * 0.01
    weight *= torch.rand(k, generator=generator).add(0.05)
    weight[:, ::7] *= 3
    scales = choose_scales(weight, fmt, "mse")
    return PackedWeight(pack_int4(nearest_codes(weight, scales, fmt)), scales, fmt)


def make_tokens(m: int, k: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    return x * torch.rand(m, 1, generator=generator).mul(5).exp()


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


@pytest.mark.parametrize("fmt", INT8_FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gemm_is_the_integer_sum_rounded_once(fmt, m, n, k, dtype):
    weight = make_weight(n, k, fmt)
    codes, scale = reference.quantize_activation(make_tokens(m, k), "int8")
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2))
    operand, c = kernel_operand(unpack_int4(weight.words), weight.scales, fmt)
    total = codes.long() @ operand.long().T
    expected = (total.float() * scale * c.T + bias).to(dtype)
    assert torch.equal(reference.gemm_w4a8(codes, scale, weight, bias, dtype), expected)


def test_int8_sum_is_exact_beyond_what_fp32_can_count():
    # 127 * 112 * 2048 > 2^24: an FP32 accumulator would have lost the last product.
    k = 2048
    codes = torch.full((1, k), 127, dtype=torch.int8)
    codes[0, -1] = 1
    q = torch.full((2, k), 7, dtype=torch.int8)
    q[1, :] = -8
    scales = torch.full((2, k // 128), 16.0, dtype=torch.bfloat16)
    weight = PackedWeight(pack_int4(q), scales, INT8_128)
    one = torch.ones(1, 1)
    found = reference.gemm_w4a8(codes, one, weight, out_dtype=torch.float32)
    total = 127 * (k - 1) + 1
    expected = torch.tensor([[7 * 16 * total, -8 * 16 * total]])
    assert abs(int(expected[0, 0])) > 2**24
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("extreme", [-128, 127])
def test_int8_matmul_is_exact_at_the_ends_of_the_range(extreme):
    x = torch.full((2, 64), -127, dtype=torch.int8)
    w = torch.full((3, 64), float(extreme))
    assert torch.equal(reference.int8_matmul(x, w), torch.full((2, 3), -127.0 * extreme * 64))


@pytest.mark.parametrize("fmt", FP8_FORMATS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_gemm_is_within_its_rounding_bound(fmt, m, n, k, biased):
    weight = make_weight(n, k, fmt)
    codes, scale = reference.quantize_activation(make_tokens(m, k), "fp8")
    bias = torch.randn(n, generator=torch.Generator().manual_seed(2)) if biased else None
    w = effective_weight(unpack_int4(weight.words), weight.scales, fmt).double()
    x = codes.double() * scale.double()
    expected = x @ w.T + (bias.double() if biased else 0)
    found = reference.gemm_w4afp8(codes, scale, weight, bias, torch.float32)
    # Products of an E4M3 code and an operand of at most twelve bits are exact in FP32. A sum of K
    # of them in any order is off by at most (K - 1) U sum|x w|, to first order; the two scales
    # and the bias round three times more. Doubled for the higher orders and for hardware that
    # truncates instead of rounding.
    bound = 2 * (k + 2) * U * (x.abs() @ w.abs().T + (bias.abs().double() if biased else 0))
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_bf16_output_is_the_fp32_result_rounded_once(fmt):
    weight = make_weight(24, 384, fmt)
    quantized = reference.quantize_activation(make_tokens(5, 384), fmt.activation)
    bias = torch.randn(24).to(torch.bfloat16)
    full = reference.gemm(*quantized, weight, bias, torch.float32)
    assert full.dtype == torch.float32
    rounded = reference.gemm(*quantized, weight, bias)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, full.to(torch.bfloat16))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gemm_tells_scales_of_another_row_group_or_token_apart(fmt):
    m = n = 4
    k = n * (32 if fmt.group_size == -1 else fmt.group_size)
    weight = make_weight(n, k, fmt)
    codes, scale = reference.quantize_activation(make_tokens(m, k), fmt.activation)
    expected = reference.gemm(codes, scale, weight, out_dtype=torch.float32)
    s = weight.scales
    wrong = [PackedWeight(weight.words, s.roll(1, dims=0), fmt)]
    if s.shape[1] > 1:
        wrong.append(PackedWeight(weight.words, s.roll(1, dims=1), fmt))
        wrong.append(PackedWeight(weight.words, s.T.contiguous(), fmt))
    for other in wrong:
        found = reference.gemm(codes, scale, other, out_dtype=torch.float32)
        assert relative_error(found, expected) > 0.01
    found = reference.gemm(codes, scale.roll(1, dims=0), weight, out_dtype=torch.float32)
    assert relative_error(found, expected) > 0.01


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gemm_of_no_tokens_is_empty(fmt):
    weight = make_weight(8, 128, fmt)
    quantized = reference.quantize_activation(torch.empty(0, 128), fmt.activation)
    assert reference.gemm(*quantized, weight).shape == (0, 8)


def test_gemm_refuses_what_does_not_fit():
    fp8 = reference.quantize_activation(make_tokens(3, 128), "fp8")
    int8 = reference.quantize_activation(make_tokens(3, 128), "int8")
    lut, integer = make_weight(8, 128, LUT_128), make_weight(8, 128, INT8_128)
    with pytest.raises(FormatError, match="takes w4afp8 weights"):
        reference.gemm_w4afp8(*fp8, integer)
    with pytest.raises(FormatError, match="takes w4a8 weights"):
        reference.gemm_w4a8(*int8, lut)
    with pytest.raises(FormatError, match=r"takes torch.float8_e4m3fn .* got torch.int8"):
        reference.gemm_w4afp8(*int8, lut)
    with pytest.raises(FormatError, match=r"takes torch.int8 .* got torch.float8_e4m3fn"):
        reference.gemm_w4a8(*fp8, integer)
    with pytest.raises(FormatError, match="disagree on K"):
        reference.gemm(fp8[0][:, :64], fp8[1], lut)
    with pytest.raises(FormatError, match="disagree on K"):
        reference.gemm(fp8[0][0], fp8[1], lut)
    with pytest.raises(FormatError, match=r"need x_scale \[3, 1\]"):
        reference.gemm(fp8[0], fp8[1][:2], lut)
    with pytest.raises(FormatError, match=r"need x_scale \[3, 1\]"):
        reference.gemm(fp8[0], fp8[1].squeeze(1), lut)


@pytest.mark.parametrize(("kind", "limit"), [("fp8", 448.0), ("int8", 127.0)])
@pytest.mark.parametrize("shape", [(64,), (5, 33), (2, 3, 1), (4, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_codes_are_the_formula(kind, limit, shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    codes, scale = reference.quantize_activation(x, kind)
    assert codes.dtype == (torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    assert codes.shape == x.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (*shape[:-1], 1)
    assert torch.equal(scale, x.float().abs().amax(-1, keepdim=True) / limit)
    # The largest element sits at the end of the range; every other is off by half a step at most:
    # of E4M3 that is 2^-4 of the value (2^-10 below the normal range), of INT8 one half.
    y = x.double() / scale.double()
    error = (codes.double() - y).abs()
    assert torch.equal(codes.double().abs().amax(-1), torch.full(shape[:-1], limit).double())
    half = (y.abs() * 2**-4).clamp_min(2**-10) if kind == "fp8" else torch.full_like(y, 0.5)
    assert bool((error <= half * (1 + 1e-6)).all())


def test_int8_codes_round_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5]])
    codes, scale = reference.quantize_activation(x, "int8")
    assert scale.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126]]


def test_fp8_codes_round_half_to_even():
    x = torch.tensor([[448.0, 17.0, 19.0, 21.0, -17.0, -19.0, 2.0**-10, 3 * 2.0**-10]])
    codes, scale = reference.quantize_activation(x, "fp8")
    assert scale.item() == 1
    assert codes.float().tolist() == [[448, 16, 20, 20, -16, -20, 0, 2.0**-8]]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_token_of_zeros_has_scale_one_and_codes_zero(kind):
    x = make_tokens(3, 16)
    x[1] = 0
    codes, scale = reference.quantize_activation(x, kind)
    assert scale[1].item() == 1
    assert not codes[1].float().any()
    alone, alone_scale = reference.quantize_activation(x[:1], kind)
    assert torch.equal(codes[:1].float(), alone.float())
    assert torch.equal(scale[:1], alone_scale)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("largest", [3.4e38, 1e-20, 1e-38, 1e-40, 1e-44])
def test_extreme_magnitudes_give_finite_codes(kind, largest):
    x = torch.tensor([[1.0, -0.9, 0.4, 1e-9]]) * largest
    codes, scale = reference.quantize_activation(x, kind)
    assert bool(torch.isfinite(codes.float()).all())
    assert bool(torch.isfinite(scale).all())
    assert scale.item() > 0


def test_rounded_up_quotients_do_not_overflow():
    # max / (max / 448) can exceed 448 by an ulp, where an unclamped E4M3 conversion gives NaN.
    x = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    for kind, limit in (("fp8", 448), ("int8", 127)):
        codes, _ = reference.quantize_activation(x, kind)
        assert bool((codes.float() == limit).all())


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_token_stays_poisoned_and_alone(kind, poison):
    x = make_tokens(3, 16)
    clean = reference.dequantize_activation(*reference.quantize_activation(x, kind))
    x[1, 5] = poison
    seen = reference.dequantize_activation(*reference.quantize_activation(x, kind))
    # Calibration finds broken activations by the NaN in what the kernel sees of them.
    assert not torch.isfinite(seen[1]).all()
    assert torch.equal(seen[::2], clean[::2])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_strides_and_the_input_are_left_alone(kind):
    x = make_tokens(16, 12)
    before = x.clone()
    codes, scale = reference.quantize_activation(x.T, kind)
    expected, expected_scale = reference.quantize_activation(x.T.contiguous(), kind)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x, before)


def test_dequantized_activation_is_codes_times_scale():
    codes, scale = reference.quantize_activation(make_tokens(4, 32), "fp8")
    seen = reference.dequantize_activation(codes, scale)
    assert torch.equal(seen, codes.float() * scale)
    assert relative_error(seen, make_tokens(4, 32)) < 1e-3


def test_unknown_activation_type_is_refused():
    with pytest.raises(FormatError, match="'int4' is unknown; known: fp8, int8"):
        reference.quantize_activation(torch.zeros(1, 8), "int4")


@pytest.mark.parametrize("before", ["ieee", "bf16"])
@pytest.mark.parametrize("enabled", [True, False])
def test_bf16_products_restores_the_setting(before, enabled):
    backend = torch.backends.mkldnn.matmul
    outside = backend.fp32_precision
    try:
        backend.fp32_precision = before
        with reference.bf16_products(enabled):
            assert backend.fp32_precision == ("bf16" if enabled else "ieee")
            with reference.bf16_products(not enabled):
                pass
            assert backend.fp32_precision == ("bf16" if enabled else "ieee")
        assert backend.fp32_precision == before
        with pytest.raises(RuntimeError), reference.bf16_products(enabled):
            raise RuntimeError
        assert backend.fp32_precision == before
    finally:
        backend.fp32_precision = outside


def test_bf16_products_are_exact_for_bf16_operands():
    # Integers up to 200 have eight bits; sums of 512 products stay below 2^24 + are exact in FP32.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (64, 512), generator=generator)
    w = torch.randint(-200, 201, (96, 512), generator=generator)
    assert torch.equal(w.to(torch.bfloat16).long(), w)
    with reference.bf16_products():
        found = x.float() @ w.float().T
    assert torch.equal(found.long(), x @ w.T)


def test_disabled_bf16_products_keep_every_bit():
    # 4097 needs thirteen bits: BF16 products would return 4096.
    x, w = torch.full((64, 64), 4097.0), torch.eye(64)
    with reference.bf16_products(), reference.bf16_products(False):
        assert torch.equal(x @ w, x)


def test_grouped_exact_gemm_does_not_round_its_operand_to_bf16():
    fmt = WeightFormat("w4afp8", 128, "exact")
    scales = torch.full((64, 1), 1 + 2**-7, dtype=torch.bfloat16)
    q = torch.full((64, 128), 7, dtype=torch.int8)  # 7 * (1 + 2^-7) has ten bits
    weight = PackedWeight(pack_int4(q), scales, fmt)
    codes = torch.zeros(64, 128).fill_diagonal_(1).to(torch.float8_e4m3fn)
    with reference.bf16_products():  # whatever the setting outside
        found = reference.gemm(codes, torch.ones(64, 1), weight, out_dtype=torch.float32)
    assert torch.equal(found, torch.full((64, 64), 7 * (1 + 2**-7)))


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("rows_at_once", [3, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_product_is_summed_in_fp32_whichever_way_it_goes(
    monkeypatch, emulated, rows_at_once, biased
):
    k, n = 96, 40
    monkeypatch.setattr(reference, "_bf16_is_emulated", lambda: emulated)
    monkeypatch.setattr(reference, "WIDE_ELEMENTS", rows_at_once * k)
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((2, 33, k), (n, k), (n,)))
    found = reference.dense_linear(x, weight, bias if biased else None)
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    bound = k * U * (x.double().abs() @ weight.double().abs().T) + exact.abs() * 2.0**-8
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= bound).all()
    if not biased:
        room = torch.full((2, 33, 2 * n), torch.nan, dtype=torch.bfloat16)
        reference.linear(x.flatten(0, 1), weight, room.flatten(0, 1)[:, :n])
        assert ((room[..., :n].double() - exact).abs() <= bound).all()
        assert room[..., n:].isnan().all()


@pytest.mark.parametrize("worth_it", [False, True])
def test_int8_matmul_is_the_integer_sum_with_and_without_an_int8_product(monkeypatch, worth_it):
    if worth_it and not reference._int_mm_is_worth_it():
        pytest.skip("this CPU's INT8 product is not used")
    monkeypatch.setattr(reference, "_int_mm_is_worth_it", lambda: worth_it)
    x = torch.randint(-128, 128, (33, 2056), dtype=torch.int8)
    w = torch.randint(-128, 128, (40, 2056), dtype=torch.int8)
    assert torch.equal(reference.int8_matmul(x, w).double(), x.double() @ w.double().T)


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "DEFAULT"])
def test_int8_product_is_exact_on_cpus_without_vnni(isa):
    # Without VNNI, oneDNN's kernels saturate the sum of two products at 16 bits.
    code = (
        "import torch; from quant_kernels.reference import int8_matmul;"
        "g = torch.Generator().manual_seed(0);"
        "x = torch.randint(-127, 128, (33, 2600), generator=g).to(torch.int8); x[0] = 127;"
        "w = torch.randint(-128, 129, (17, 2600), generator=g).clamp(-128, 127).float();"
        "w[0] = 127; w[1] = -128;"
        "exact = x.double() @ w.double().T;"
        "assert torch.equal(int8_matmul(x, w), exact.float())"
    )
    paths = [str(Path(__file__).parents[2] / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
