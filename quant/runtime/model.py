"""The decoder, loaded from a checkpoint: dense, or packed 4-bit weights as stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.architectures import (
    EMBEDDING,
    FINAL_NORM,
    LINEARS,
    LM_HEAD,
    DecoderConfig,
    block_prefix,
)
from quant.checkpoint.compressed_tensors import (
    is_ignored,
    packed_shapes,
    parse_quantization_config,
)
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.side import read_side
from quant.decoder import (
    Attention,
    KeyTransform,
    Linear,
    block_forward,
    causal_attention,
    quantized_attention,
    rms_norm,
    rotary_table,
)
from quant.errors import RequestError
from quant_kernels.formats import WeightFormat, on_grid
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import PackedWeight

# layer -> how its queries meet keys and values: over the sequence itself, or over a cache
AttentionOf = Callable[[int], Attention]


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
    """A loaded model: embedding [V, H], blocks, final norm [H], lm_head [V, H] (maybe tied).

    fmt: the weight format of its packed linears; None for a dense checkpoint. kv: what keys and
    values are rounded to; None: they stay as computed. A cache still stores them in the model's
    dtype, after rounding: the numbers are those of the quantized cache, the memory is not.
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

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, attention_of: AttentionOf | None = None
    ) -> Tensor:
        """tokens and positions [B, S] int -> the last block's output after the norm, [B, S, H].

        attention_of: per layer; the default is causal attention inside the B sequences. Either
        sees queries and keys with the key transform applied, and all rounded as `kv` says.
        """
        cfg = self.config
        rope = rotary_table(cfg, positions)
        hidden = self.embedding[tokens]
        for layer, block in enumerate(self.blocks):
            attend = (
                attention_of(layer)
                if attention_of is not None
                else causal_attention(cfg.sliding_windows[layer])
            )
            if self.kv is not None or block.keys is not None:
                attend = quantized_attention(attend, self.kv, block.keys)
            hidden = block_forward(cfg, block.norms, block.linears, hidden, rope, attend)
        return rms_norm(hidden, self.norm, cfg.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], in the model's dtype."""
        return F.linear(hidden, self.lm_head)


def load_decoder(
    directory: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Decoder:
    """Load a checkpoint directory, dense or compressed-tensors `pack-quantized`.

    dtype: of activations and of what is not packed; None takes the embedding's. Raises RequestError
    where the checkpoint is not one that runs here.
    """
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    device = device or torch.device("cpu")
    fmt = parse_quantization_config(directory, reader.raw_config)
    ignore = (reader.raw_config.get("quantization_config") or {}).get("ignore") or []
    cfg = reader.config
    side = read_side(directory, cfg)
    keys = [transform.to(device) for transform in side.keys]
    reader.check_shapes(cfg.outer_shapes())
    reader.check_tied()
    embedding = reader.read(f"{EMBEDDING}.weight", dtype).to(device)
    dtype = embedding.dtype

    def read(name: str) -> Tensor:
        return reader.read(name, dtype).to(device)

    blocks = []
    for layer in range(cfg.num_layers):
        prefix = block_prefix(layer)
        shapes = cfg.block_shapes()
        reader.check_shapes({prefix + n: s for n, s in shapes.items() if n.endswith(".bias")})
        linears = {}
        for name in LINEARS:
            weight: Tensor | PackedWeight
            if fmt is None or is_ignored(prefix + name, ignore):
                reader.check_shapes({f"{prefix}{name}.weight": shapes[f"{name}.weight"]})
                weight = read(f"{prefix}{name}.weight")
            else:
                weight = _read_packed(reader, prefix + name, cfg.linear_shape(name), fmt, device)
            bias = read(f"{prefix}{name}.bias") if cfg.has_bias(name) else None
            linears[name] = Linear(weight, bias)
        norms = {name: shape for name, shape in shapes.items() if "norm" in name}
        reader.check_shapes({prefix + name: shape for name, shape in norms.items()})
        blocks.append(
            Block({n: read(prefix + n) for n in norms}, linears, keys[layer] if keys else None)
        )
    return Decoder(
        config=cfg,
        fmt=fmt,
        embedding=embedding,
        blocks=tuple(blocks),
        norm=read(f"{FINAL_NORM}.weight"),
        lm_head=embedding if cfg.tie_word_embeddings else read(f"{LM_HEAD}.weight"),
        kv=side.kv,
    )


def _read_packed(
    reader: CheckpointReader,
    name: str,
    shape: tuple[int, int],
    fmt: WeightFormat,
    device: torch.device,
) -> PackedWeight:
    fmt.check(*shape, name)
    reader.check_shapes(packed_shapes(name, shape, fmt))
    for suffix in ("weight_g_idx", "weight_zero_point"):
        if f"{name}.{suffix}" in reader.names:
            raise RequestError(f"{name}.{suffix}: this layout of 4-bit weights is not supported")
    words = reader.read(f"{name}.weight_packed")
    scales = reader.read(f"{name}.weight_scale")
    if words.dtype != torch.int32:
        raise RequestError(f"{name}.weight_packed is {words.dtype}; expected torch.int32")
    if not on_grid(scales, fmt):
        raise RequestError(
            f"{name}.weight_scale: the scales are not on the grid of {fmt.scheme} "
            f"({fmt.numerics}, group size {fmt.group_size}), so this kernel would multiply other "
            "weights than the file says; quantize the original checkpoint with `quantize run`"
        )
    return PackedWeight(words.to(device), scales.to(device), fmt)
