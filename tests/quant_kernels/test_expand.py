"""A weight that is expanded once multiplies as the packed one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quant_kernels import reference
from quant_kernels.formats import (
    WeightFormat,
    every_format,
    join_scales,
    kernel_operand,
    round_row_unit,
)
from quant_kernels.packing import PackedWeight, pack_int4, unpack_int4

N, K = 48, 256


def packed(fmt: WeightFormat) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    c = round_row_unit(torch.rand(N, 1, generator=generator) * 1e-2 + 1e-3)
    t = torch.randint(1, 17, (N, fmt.groups(K)), generator=generator).float()
    if fmt.anchor is not None:
        t[:, 0] = fmt.anchor
    return PackedWeight(pack_int4(codes), join_scales(t, c), fmt)


@pytest.mark.parametrize("fmt", every_format(), ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("rows", [1, 5, 48])
def test_expanded_weight_is_the_operand_however_it_is_split(
    fmt: WeightFormat, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(fmt)
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(4))
    codes, scale = reference.quantize_activation(x, fmt.activation)
    expected = reference.gemm(codes, scale, weight, None, torch.float32)
    monkeypatch.setattr(reference, "ELEMENTS_AT_ONCE", rows * K)
    expanded = reference.expand(weight)
    operand, c = kernel_operand(unpack_int4(weight.words), weight.scales, fmt)
    assert expanded.operand.dtype == (torch.int8 if fmt.scheme == "w4a8" else torch.float32)
    assert torch.equal(expanded.operand.float(), operand)
    assert torch.equal(expanded.c, c)
    assert torch.equal(reference.gemm(codes, scale, expanded, None, torch.float32), expected)
