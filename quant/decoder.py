"""The arithmetic of one decoder block, in plain torch, as four steps between four sites.

A site is a place whose input x is quantized and fed to one or more linears (`SITES`). `begin` gives
the first site's input; `advance` takes a site's linear outputs and gives the next site's input:

    begin -> [q, k, v] -> attention -> [o] -> add, norm -> [gate, up] -> silu * -> [down] -> add

Calibration stops at every site to look at x; `Decoder` runs straight through, and is what
`runtime/model.py`, made of fused ops, must agree with. Norms, RoPE, softmax and SiLU are computed
in FP32, and attention over quantized keys and values by the op that the runtime calls.

Shapes: B sequences, S tokens, H hidden, Hq / Hk query / KV heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.architectures import SITES, DecoderConfig
from quant.errors import RequestError
from quant_kernels import ops, reference
from quant_kernels.formats import WeightFormat
from quant_kernels.kv4 import KVFormat, quantize_kv
from quant_kernels.packing import KV_PAGE, PackedWeight
from quant_kernels.reference import ExpandedWeight, rms_norm
from quant_kernels.reference_attention import append_kv, apply_rope
from quant_kernels.reference_dense import scaled_dot_product
from quant_kernels.registration import HEAD_DIMS

# q [B, S, Hq, D], k and v [B, S, Hk, D], all after RoPE -> [B, S, Hq, D]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotary_table(cfg: DecoderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [..., S] int -> cos, sin [..., S, D] FP32; channel i turns with i + D/2."""
    inv_freq = torch.tensor(cfg.inv_freq, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * cfg.rope_factor, angles.sin() * cfg.rope_factor


@dataclass(frozen=True)
class KeyTransform:
    """Of a layer's keys after RoPE: k' = scale (k - shift), q' = q / scale; both [Hk, D] FP32.

    For one query, all q' . k' differ from q . k by the same number, which softmax does not see.
    """

    scale: Tensor
    shift: Tensor

    def to(self, device: torch.device) -> KeyTransform:
        return KeyTransform(self.scale.to(device), self.shift.to(device))

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q [..., Hq, D] and k [..., Hk, D] -> q' and k', FP32; query heads of a KV head alike."""
        grouped = q.float().unflatten(-2, (len(self.scale), -1))  # [..., Hk, Hq / Hk, D]
        return (grouped / self.scale.unsqueeze(1)).flatten(-3, -2), (
            k.float() - self.shift
        ) * self.scale

    def to_lists(self) -> tuple[list[list[float]], list[list[float]]]:
        """Scale and shift as plain numbers, without loss."""
        return self.scale.tolist(), self.shift.tolist()


def causal_attention(
    window: int | None, kv: KVFormat | None = None, keys: KeyTransform | None = None
) -> Attention:
    """Attention over the sequence itself: token i sees i - window + 1 .. i, or all before it.

    keys: what is done to keys and queries after RoPE. kv: how the cache stores keys and values
    (`kv4.py`); queries are FP8 then, and softmax meets values as the op defines it
    (`reference_attention.py`), so that calibration sees what a kernel computes.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype, length = q.dtype, q.shape[1]
        if keys is not None:
            q, k = keys.apply(q, k)
        if kv is not None:
            return attend_quantized(q, k, v, kv, window).to(dtype)
        q, k = q.to(dtype), k.to(dtype)
        if window is None or window >= length:
            return scaled_dot_product(q, k, v, None)
        i = torch.arange(length, device=q.device)
        distance = i[:, None] - i[None, :]
        return scaled_dot_product(q, k, v, (distance >= 0) & (distance < window))

    return attend


def check_head_dim(cfg: DecoderConfig) -> None:
    """RequestError where no attention over a quantized cache takes heads of this dimension."""
    if cfg.head_dim not in HEAD_DIMS:
        raise RequestError(
            f"kv_cache kv4 takes heads of dimension {', '.join(map(str, HEAD_DIMS))}; this "
            f"model's have {cfg.head_dim}: use kv_cache none"
        )


def attend_quantized(
    q: Tensor, k: Tensor, v: Tensor, kv: KVFormat, window: int | None = None
) -> Tensor:
    """Causal attention as over a quantized cache, by the op `prefill_attention`.

    q [B, S, Hq, D] is rounded to FP8, k and v [B, S, Hk, D] to kv's grid, per token and head.
    Returns [B, S, Hq, D] FP32.
    """
    batch, length, heads, dim = q.shape
    pages = math.ceil(length / KV_PAGE)
    table = torch.arange(batch * pages, device=q.device, dtype=torch.int32).view(batch, pages)
    slots = (table[:, :1] * KV_PAGE + torch.arange(length, device=q.device)).flatten()
    shape = (2, batch * pages, k.shape[2], KV_PAGE)
    codes = torch.zeros(*shape, dim // 2, dtype=torch.uint8, device=q.device)
    scales = torch.zeros(*shape, 2, dtype=torch.float16, device=q.device)
    keys, values = (quantize_kv(x.flatten(0, 1), kv) for x in (k, v))
    append_kv(keys, values, slots, codes, scales)
    q_codes, q_scale = reference.quantize_activation(q.flatten(0, 1), "fp8")
    starts = torch.arange(0, (batch + 1) * length, length, device=q.device, dtype=torch.int32)
    out = torch.empty(batch * length, heads, dim, device=q.device)
    ops.prefill_attention(
        q_codes, q_scale.squeeze(-1), codes, scales, table, starts, starts.diff(), length, out,
        sm_scale=1 / math.sqrt(dim), window=window or 0,
    )  # fmt: skip
    return out.unflatten(0, (batch, length))


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
            y = reference.dense_linear(tokens, weight, linear.bias)
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


@dataclass(frozen=True)
class Block:
    """One decoder block: norm weights and linears by their names inside the block.

    keys: what is done to keys and queries after RoPE, so that keys lose less in a quantized cache.
    """

    norms: Mapping[str, Tensor]
    linears: Mapping[str, Linear]
    keys: KeyTransform | None = None


@dataclass(frozen=True)
class Decoder:
    """A model in plain torch: embedding [V, H], blocks, norm [H], lm_head [V, H] (maybe tied).

    fmt: the weight format of its packed linears; None for a dense checkpoint. kv: how keys and
    values are stored; None: as computed.
    """

    config: DecoderConfig
    fmt: WeightFormat | None
    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    lm_head: Tensor
    kv: KVFormat | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions [B, S] int -> the last block's output after the norm, [B, S, H].

        Attention is causal inside each of the B sequences.
        """
        cfg = self.config
        rope = rotary_table(cfg, positions)
        hidden = self.embedding[tokens]
        for layer, block in enumerate(self.blocks):
            attend = causal_attention(cfg.sliding_windows[layer], self.kv, block.keys)
            hidden = block_forward(cfg, block.norms, block.linears, hidden, rope, attend)
        return rms_norm(hidden, self.norm, cfg.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], in the model's dtype."""
        return reference.dense_linear(hidden, self.lm_head)
