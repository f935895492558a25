"""The pass `rope` on a block: its keys turned and scaled by what calibration has seen of them.

Pair scales are folded into rows of q and k that are quantized already, so they are powers of two:
then codes stay, and every number takes the scale up exactly (`folding.py`). Where channels are
scaled after RoPE, their pairs are left alone before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.calibration.block import BlockWork
from quant.calibration.folding import fold_into_rows
from quant.calibration.rope import (
    KeyStatistics,
    channel_scale,
    fold_pair_scale,
    fold_turn,
    optimal_transform,
    optimal_turn,
    pair_scale,
    shared_pairs,
    without_scaled_pairs,
)
from quant.decoder import KeyTransform
from quant.passes import RopePass


def scale_keys(
    work: BlockWork, step: RopePass, seen: KeyStatistics, *, symmetric: bool
) -> KeyTransform | None:
    """Fold what is folded, and return what is applied online. symmetric: the cache's format."""
    cfg = work.cfg
    keys = None
    if step.post == "optimal":
        keys = optimal_transform(seen.samples(), symmetric=symmetric)
    elif step.post == "channels":
        top_k = step.top_k or None
        s = channel_scale(seen.channel_max, step.strength, top_k)
        keys = KeyTransform(s, torch.zeros_like(s))
    if step.pre:
        n = pair_scale(shared_pairs(seen.pair_max) if cfg.qk_norm else seen.pair_max, step.pre)
        n = torch.exp2(n.log2().round())
        if keys is not None:
            n = without_scaled_pairs(n, keys.scale)
        _fold_pairs(work, n)
    return keys


def turn_pairs(
    work: BlockWork, seen: KeyStatistics, planned: Sequence[str], *, symmetric: bool
) -> None:
    """Turn the pairs of keys and queries, of which nothing is packed yet. planned: linears to
    quantize, by name inside the block."""
    folded = fold_turn(work.tensors, work.cfg, optimal_turn(seen.samples(), symmetric=symmetric))
    for name, tensor in folded.items():
        # What is to be quantized need not be rounded before.
        stays = name.removesuffix(".weight") not in planned
        work.tensors[name] = tensor.to(work.tensors[name].dtype) if stays else tensor


def _fold_pairs(work: BlockWork, n: Tensor) -> None:
    """Multiply keys by n [Hk or 1, D/2] before RoPE, and divide queries."""
    cfg = work.cfg
    dense = dict(work.tensors)
    rows = {} if cfg.qk_norm else _row_factors(cfg, n)
    for name in rows:
        # What is packed is folded below; fold_pair_scale wants to see a weight all the same.
        dense.setdefault(f"{name}.weight", torch.ones(len(rows[name]), 1, device=n.device))
    folded = fold_pair_scale(dense, cfg, n)
    work.tensors.update({name: t for name, t in folded.items() if name in work.tensors})
    for name, factor in rows.items():
        if name in work.packed:
            work.packed[name] = fold_into_rows(work.packed[name], 1 / factor)


def _row_factors(cfg: DecoderConfig, n: Tensor) -> dict[str, Tensor]:
    """By what the rows of q and k are multiplied."""
    both = torch.cat((n, n), dim=-1)  # [Hk, D]
    queries = both.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, dim=0)
    return {"self_attn.k_proj": both.flatten(), "self_attn.q_proj": 1 / queries.flatten()}
