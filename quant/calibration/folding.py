"""Moving the scales of a site's input channels into what makes them, without changing the model.

    x = g * n         a norm's weight g:           g' = g / s
    x = P v           attention over value rows:   W_v' = W_v / s, one s for the r query heads
    x = silu(a) * u   rows of up_proj:             W_u' = W_u / s

A norm's weight is rounded to its type, and s is what that makes of it; `fold` returns it. Rows are
quantized already, and may not move against their codes: there s is a power of two, which every
number of a row takes up exactly, whatever its type. Then the same activations come out bit for bit
divided by s, which a resumed run counts on.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.calibration.rotation import NORM_OF
from quant_kernels.packing import PackedWeight

# The linear whose rows make a site's input channels; where there is none, it is a norm.
PRODUCER = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}


def shared_by(cfg: DecoderConfig, site: str) -> int:
    """How many of a site's input channels come from one row of its producer."""
    return cfg.num_heads // cfg.num_kv_heads if site == "o" else 1


def fold(
    cfg: DecoderConfig,
    site: str,
    block: MutableMapping[str, Tensor],
    packed: MutableMapping[str, PackedWeight],
    s: Tensor,
) -> Tensor:
    """Divide what makes a site's inputs by s [K]; returns the s that this really is, FP32.

    block and packed: a block's tensors by name; those of the producer are replaced. Where channels
    share a producer's row, their s is equal.
    """
    if site in NORM_OF:
        block[NORM_OF[site]], real = fold_into_norm(block[NORM_OF[site]], s)
        return real
    name, shared = PRODUCER[site], shared_by(cfg, site)
    s = torch.exp2(s.log2().round())
    rows = s.view(-1, shared, cfg.head_dim)[:, 0].reshape(-1) if shared > 1 else s
    if name in packed:
        packed[name] = fold_into_rows(packed[name], rows)
    else:
        weight = block[f"{name}.weight"]
        block[f"{name}.weight"] = weight / rows.unsqueeze(1).to(weight.device, weight.dtype)
    if f"{name}.bias" in block:
        bias = block[f"{name}.bias"]
        block[f"{name}.bias"] = bias / rows.to(bias.dtype)
    return s


def fold_into_norm(norm: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weight [H] by s [H] -> (in its own dtype, the s that this really is, FP32)."""
    folded = (norm.float() / s).to(norm.dtype)
    usable = (folded != 0) & torch.isfinite(folded)
    folded = torch.where(usable, folded, norm)
    return folded, folded_scale(norm, folded)


def folded_scale(norm: Tensor, folded: Tensor) -> Tensor:
    """The s [H] FP32 that turned a norm's weight [H] into another one."""
    norm, folded = norm.float(), folded.float()
    return torch.where(folded != 0, norm / folded, torch.ones_like(norm))


def fold_into_rows(weight: PackedWeight, s: Tensor) -> PackedWeight:
    """A quantized linear's rows [N] divided by powers of two s [N]; exact, and codes stay."""
    scales = weight.scales / s.unsqueeze(1).to(weight.scales.dtype)
    return PackedWeight(weight.words, scales, weight.fmt)
