"""What the dense_* ops compute: attention over a paged cache of plain numbers, in plain torch.

kv [2, pages, Hk, KV_PAGE, D] holds keys after RoPE and values, in the model's dtype. With T query
tokens of B sequences, a query i over the keys of its sequence:

    O_i = sum_t P_it v_t,   P_i = softmax_t(q_i . k_t sm_scale),   max(0, i - window + 1) <= t <= i
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_kernels.packing import KV_PAGE
from quant_kernels.reference import rms_norm
from quant_kernels.reference_attention import apply_rope


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    kv: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> None:
    """`ops.dense_rope_append`: q [T, Hq, D] and rows `slots` of kv become what qkv holds."""
    kv_heads, dim = kv.shape[2], kv.shape[4]
    rows = qkv.unflatten(-1, (-1, dim))
    queries, keys, values = rows.split((q.shape[1], kv_heads, kv_heads), dim=1)
    if norms is not None:
        queries, keys = (
            rms_norm(x, weight, eps) for x, weight in zip((queries, keys), norms, strict=True)
        )
    turn = [torch.cat((table[positions],) * 2, -1) for table in (cos, sin)]
    q.copy_(apply_rope(queries, *turn))
    page, place = slots.long() // KV_PAGE, slots.long() % KV_PAGE  # of -1: the last of the last
    kv[0][page, :, place] = apply_rope(keys, *turn)
    kv[1][page, :, place] = values


def decode_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    sm_scale: float,
    window: int = 0,
) -> Tensor:
    """q [B, Hq, D], one a sequence -> [B, Hq, D]. Length 0 gives what its first token would.

    The query heads that share a KV head become rows of one product, so that keys and values are
    read once per KV head and never repeated.
    """
    keys, values = (x[block_table].transpose(2, 3).flatten(1, 2) for x in kv)
    t = torch.arange(keys.shape[1], device=q.device)
    newest = (kv_lens - 1).clamp(min=0).unsqueeze(1)
    seen = t <= newest
    if window:
        seen &= t > newest - window
    grouped = q.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)  # [B, Hq / Hk, Hk, D]
    attended = scaled_dot_product(grouped, keys, values, seen[:, None, None], sm_scale)
    return attended.transpose(1, 2).flatten(1, 2)


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    sm_scale: float,
    window: int = 0,
) -> Tensor:
    """q [T, Hq, D]: the last query_lens[b] of the kv_lens[b] tokens of each sequence."""
    parts = q.split(list(query_lens))
    return torch.cat(
        [
            _attend_last(part, *_read(kv, pages, length), sm_scale, window)
            for part, pages, length in zip(parts, block_table, kv_lens, strict=True)
        ]
    )


def _read(kv: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values of a sequence, [length, Hk, D]."""
    used = pages[: -(-length // KV_PAGE)]
    keys, values = (x[used].transpose(1, 2).flatten(0, 1)[:length] for x in kv)
    return keys, values


def _attend_last(q: Tensor, k: Tensor, v: Tensor, sm_scale: float, window: int) -> Tensor:
    """The last S tokens of one sequence: q [S, Hq, D]; k, v [T, Hk, D] -> [S, Hq, D]."""
    count, length = len(q), len(k)
    seen = None
    if count != length or 0 < window < length:
        distance = torch.arange(length - count, length, device=q.device)[:, None] - torch.arange(
            length, device=q.device
        )
        seen = (distance >= 0) & (distance < (window or length))
    return scaled_dot_product(q[None], k[None], v[None], seen, sm_scale)[0]


def scaled_dot_product(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float | None = None
) -> Tensor:
    """softmax(q k^T sm_scale) v with grouped heads; sm_scale: 1 / sqrt(D) where None.

    q [B, S, Hq, D]; k, v [B, T, Hk, D]; mask broadcastable to [B, Hq, S, T], True where seen; None
    means causal (S == T). Returns [B, S, Hq, D].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=sm_scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
