"""The arithmetic of one decoder block, in plain torch, as four steps between four sites.

A site is a place whose input x is quantized and fed to one or more linears (`SITES`). `begin` gives
the first site's input; `advance` takes a site's linear outputs and gives the next site's input:

    begin -> [q, k, v] -> attention -> [o] -> add, norm -> [gate, up] -> silu * -> [down] -> add

Calibration stops at every site to look at x; the runtime runs straight through. Both call these
functions, so what is calibrated is what runs. Norms, RoPE, softmax and SiLU are computed in FP32.

Shapes: B sequences, S tokens, H hidden, Hq / Hk query / KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.architectures import SITES, DecoderConfig
from quant_kernels import reference
from quant_kernels.kv4 import KVFormat, dequantize_kv, quantize_kv
from quant_kernels.packing import PackedWeight
from quant_kernels.reference import ExpandedWeight, rms_norm
from quant_kernels.reference_attention import apply_rope

# q [B, S, Hq, D], k and v [B, S, Hk, D], all after RoPE -> [B, S, Hq, D]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotary_table(cfg: DecoderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [..., S] int -> cos, sin [..., S, D] FP32; channel i turns with i + D/2."""
    inv_freq = torch.tensor(cfg.inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * cfg.rope_factor, angles.sin() * cfg.rope_factor


def causal_attention(window: int | None) -> Attention:
    """Attention over the sequence itself: token i sees i - window + 1 .. i, or all before it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        if window is None or window >= length:
            return scaled_dot_product(q, k, v, None)
        i = torch.arange(length, device=q.device)
        distance = i[:, None] - i[None, :]
        return scaled_dot_product(q, k, v, (distance >= 0) & (distance < window))

    return attend


@dataclass(frozen=True)
class KeyTransform:
    """Of a layer's keys after RoPE: k' = scale (k - shift), q' = q / scale; both [Hk, D] FP32.

    For one query, all q' . k' differ from q . k by the same number, which softmax does not see.
    """

    scale: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> KeyTransform:
        return KeyTransform(self.scale.to(device), self.shift.to(device))

    def to_lists(self) -> tuple[list[list[float]], list[list[float]]]:
        """Scale and shift as plain numbers, without loss."""
        return self.scale.tolist(), self.shift.tolist()


def quantized_attention(
    attend: Attention, kv: KVFormat | None, keys: KeyTransform | None = None
) -> Attention:
    """Attention over keys and values as the KV cache holds them.

    Keys and queries are transformed, queries of all query heads of a KV head alike. Then with kv,
    keys and values are rounded to its grid (`kv4.py`) and queries to FP8, per token and head. So
    `attend` may store what it is given, in prefill and decode, and calibration sees the same.

    The rounded numbers go on in q's dtype. In BF16 they are rounded once more, by up to 2^-9 of
    themselves, where a kernel that reads codes does not; a step of the grid is 2^-4 of the range.
    """

    def attend_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype = q.dtype
        if keys is not None:
            k = (k.float() - keys.shift) * keys.scale
            grouped = q.float().unflatten(2, (len(keys.scale), -1))  # [B, S, Hk, r, D]
            q = (grouped / keys.scale.unsqueeze(1)).flatten(2, 3)
        if kv is not None:
            q = reference.dequantize_activation(*reference.quantize_activation(q, "fp8"))
            k, v = (dequantize_kv(quantize_kv(rows, kv)) for rows in (k, v))
        return attend(q.to(dtype), k.to(dtype), v.to(dtype))

    return attend_rounded


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with grouped heads.

    q [B, S, Hq, D]; k, v [B, T, Hk, D]; mask broadcastable to [B, Hq, S, T], True where seen; None
    means causal (S == T). Returns [B, S, Hq, D].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def begin(cfg: DecoderConfig, norms: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """hidden [B, S, H] -> the input of site "qkv"."""
    return rms_norm(hidden, norms["input_layernorm.weight"], cfg.rms_norm_eps)


def advance(
    cfg: DecoderConfig,
    norms: Mapping[str, Tensor],
    site: str,
    hidden: Tensor,
    outputs: Sequence[Tensor],
    rope: tuple[Tensor, Tensor],
    attend: Attention,
) -> tuple[Tensor, Tensor]:
    """From a site's outputs to the next site's input.

    norms: the block's norm weights by name inside the block. hidden [B, S, H]: the residual stream.
    outputs: what the site's linears gave, [B, S, N] each. rope: `rotary_table` of the positions.
    Returns (hidden, x): the residual stream and the next input; after "down" both are the block's
    output.
    """
    if site == "qkv":
        q, k, v = (y.unflatten(-1, (-1, cfg.head_dim)) for y in outputs)
        if cfg.qk_norm:
            q = rms_norm(q, norms["self_attn.q_norm.weight"], cfg.rms_norm_eps)
            k = rms_norm(k, norms["self_attn.k_norm.weight"], cfg.rms_norm_eps)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return hidden, attend(q, k, v).flatten(-2)
    if site == "o":
        hidden = hidden + outputs[0]
        weight = norms["post_attention_layernorm.weight"]
        return hidden, rms_norm(hidden, weight, cfg.rms_norm_eps)
    if site == "gate_up":
        gate, up = outputs
        return hidden, (F.silu(gate.float()) * up.float()).to(gate.dtype)
    if site == "down":
        hidden = hidden + outputs[0]
        return hidden, hidden
    raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")


@dataclass(frozen=True)
class Linear:
    """A block's linear: weight [N, K], dense or packed, and bias [N] or None."""

    weight: Tensor | PackedWeight
    bias: Tensor | None


def site_outputs(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
    """The outputs of linears that share the input x [B, S, K]: [B, S, N] each, in x's dtype.

    x is quantized once for all packed linears; dense ones see it as it is.
    """
    tokens = x.flatten(0, 1)
    quantized: dict[str, tuple[Tensor, Tensor]] = {}
    outputs = []
    for linear in linears:
        weight = linear.weight
        if isinstance(weight, PackedWeight):
            kind = weight.fmt.activation
            if kind not in quantized:
                quantized[kind] = reference.quantize_activation(tokens, kind)
            y = reference.gemm(*quantized[kind], weight, linear.bias, x.dtype)
        else:
            y = F.linear(tokens, weight, linear.bias)
        outputs.append(y.unflatten(0, x.shape[:2]))
    return outputs


def packed_outputs(
    linears: Sequence[tuple[ExpandedWeight, Tensor | None]],
    codes: Tensor,
    scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """`site_outputs` of weights (with biases) that all are packed, from an input that is quantized.

    codes [T, K], scale [T, 1]: of x [B, S, K]; shape: (B, S). Returns [B, S, N] each, in dtype.
    """
    outputs = (reference.gemm(codes, scale, weight, bias, dtype) for weight, bias in linears)
    return [y.unflatten(0, tuple(shape)) for y in outputs]


def block_forward(
    cfg: DecoderConfig,
    norms: Mapping[str, Tensor],
    linears: Mapping[str, Linear],
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    attend: Attention,
) -> Tensor:
    """One block, straight through: hidden [B, S, H] -> [B, S, H]. linears by name in the block."""
    x = begin(cfg, norms, hidden)
    for site, names in SITES.items():
        outputs = site_outputs([linears[name] for name in names], x)
        hidden, x = advance(cfg, norms, site, hidden, outputs, rope, attend)
    return hidden
