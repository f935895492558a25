"""Random weights of any format, with scales that no transposition or shift leaves in place."""

from __future__ import annotations

import torch

from quant_kernels.formats import (
    INT8_ANCHOR,
    LUT_ANCHOR,
    LUT_SCALE_MIN,
    WeightFormat,
    join_scales,
    round_row_unit,
)
from quant_kernels.packing import PackedWeight, pack_int4


def random_packed(rows: int, columns: int, fmt: WeightFormat, least: int = -8) -> PackedWeight:
    """Codes from `least` to 7, both of which occur; scales on the format's grid, none alike."""
    codes = torch.randint(least, 8, (rows, columns), dtype=torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = least, 7
    groups = fmt.groups(columns)
    units = round_row_unit(torch.rand(rows, 1) * 0.02 + 0.003)
    if fmt.per_channel or fmt.numerics == "exact":
        scales = (torch.rand(rows, groups) * 0.02 + 0.003).bfloat16()
        return PackedWeight(pack_int4(codes), scales, fmt)
    if fmt.numerics == "lut":
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        legal, anchor = values[(values >= LUT_SCALE_MIN) & (values <= LUT_ANCHOR)], LUT_ANCHOR
    else:
        legal, anchor = torch.arange(1.0, INT8_ANCHOR + 1), INT8_ANCHOR
    t = legal[torch.randint(0, len(legal), (rows, groups))]
    t[torch.arange(rows), torch.randint(0, groups, (rows,))] = anchor
    return PackedWeight(pack_int4(codes), join_scales(t, units), fmt)
