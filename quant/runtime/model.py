"""The decoder on fused ops: one step for the new tokens of many sequences at once.

    h = embedding[tokens]                                                [T, H]
    in every block:
      x = quantize(norm(h))                    rms_norm_quantize
      z = x Wqkv^T + b                         gemm
      a = attention(rope(z)), into the cache   rope_append, decode_attention, prefill_attention
      h = h + quantize(a) Wo^T                 quantize_activation, gemm with residual
      x = quantize(norm(h))                    rms_norm_quantize
      g = quantize(silu(x Wgate^T) * x Wup^T)  gemm with silu_mul and codes
      h = h + g Wdown^T                        gemm with residual

Linears of one input are one weight, in the layout of the backend that multiplies it. Where a
checkpoint leaves some of them in 16 bits, those see the input before it is quantized, as in
`quant/decoder.py`, which defines what all of this computes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.architectures import SITES, DecoderConfig
from quant.checkpoint.loading import DecoderSource
from quant.decoder import Block, Linear
from quant.runtime.batch import Batch
from quant.runtime.buffers import Buffers
from quant.runtime.kv_cache import DenseCache, HeadOptions, Int4Cache
from quant_kernels import ops, reference
from quant_kernels.formats import WeightFormat
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import PackedWeight
from quant_kernels.reference import rms_norm, silu_mul

Cache = Int4Cache | DenseCache
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Activation:
    """A site's input [T, K]: x for dense parts, codes and scales for packed ones."""

    x: Tensor | None
    quantized: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Part:
    """Rows of a projection: weight [N, K], packed in a backend's layout or dense; bias [N]."""

    weight: ops.Weight | Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    def multiply(
        self, given: Activation, out: Tensor, workspace: Tensor | None, **fused: Any
    ) -> None:
        """The product into out [T, N]; fused: of `ops.gemm`, for a packed part."""
        if isinstance(self.weight, Tensor):
            assert given.x is not None
            out.copy_(reference.dense_linear(given.x, self.weight, self.bias))
        else:
            assert given.quantized is not None
            options = {"bias": self.bias, "workspace": workspace, **fused}
            ops.gemm(*given.quantized, self.weight, out, **options)


@dataclass(frozen=True)
class Projection:
    """The linears of one site, [N, K] in all. kind: of its packed parts' activations, or None."""

    parts: tuple[Part, ...]
    kind: str | None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def is_dense(self) -> bool:
        """Whether any part is."""
        return any(isinstance(part.weight, Tensor) for part in self.parts)

    def quantize(self, x: Tensor, buffers: Buffers) -> Activation:
        """x [T, K] as the parts take it."""
        quantized = self._codes("codes", tuple(x.shape), buffers)
        if quantized is not None:
            ops.quantize_activation(x, *quantized)
        return Activation(x if self.is_dense else None, quantized)

    def norm_quantize(
        self, hidden: Tensor, weight: Tensor, eps: float, buffers: Buffers
    ) -> Activation:
        """RMSNorm of hidden [T, K], as the parts take it."""
        quantized = None
        if not self.is_dense:
            quantized = self._codes("codes", tuple(hidden.shape), buffers)
        if quantized is None:
            return self.quantize(rms_norm(hidden, weight, eps), buffers)
        ops.rms_norm_quantize(hidden, weight, eps, *quantized)
        return Activation(None, quantized)

    def forward(
        self, given: Activation, like: Tensor, workspace: Tensor | None, buffers: Buffers
    ) -> Tensor:
        """[T, N], of like's dtype."""
        out = buffers.empty("product", (len(like), self.rows), like.dtype)
        start = 0
        for part in self.parts:
            part.multiply(given, out[:, start : start + part.rows], workspace)
            start += part.rows
        return out

    def add_to(
        self, hidden: Tensor, given: Activation, workspace: Tensor | None, buffers: Buffers
    ) -> None:
        """hidden [T, N] += the product."""
        if self.is_dense:
            hidden += self.forward(given, hidden, workspace, buffers)
        else:
            self.parts[0].multiply(given, hidden, workspace, residual=hidden)

    def silu_mul(
        self,
        given: Activation,
        like: Tensor,
        following: Projection,
        workspace: Tensor | None,
        buffers: Buffers,
    ) -> Activation:
        """The first half of the rows is the gate, the second up: [T, N / 2] as `following` takes
        it."""
        if self.is_dense:
            gated = silu_mul(self.forward(given, like, workspace, buffers))
            return following.quantize(gated, buffers)
        shape = (len(like), self.rows // 2)
        out = buffers.empty("gated", shape, like.dtype)
        quantized = following._codes("gated codes", shape, buffers)
        codes, scale = quantized or (None, None)
        self.parts[0].multiply(given, out, workspace, silu_mul=True, codes=codes, scale=scale)
        return Activation(out if following.is_dense else None, quantized)

    def _codes(
        self, name: str, shape: tuple[int, ...], buffers: Buffers
    ) -> tuple[Tensor, Tensor] | None:
        """Room for the codes and scales of an input of shape [T, K]."""
        if self.kind is None:
            return None
        codes = buffers.empty(name, shape, CODES[self.kind])
        return codes, buffers.empty(f"scale of {name}", (shape[0], 1), torch.float32)


@dataclass(frozen=True)
class Layer:
    """A block, ready to run: norm weights [H], a projection per site, options of its heads."""

    norms: tuple[Tensor, Tensor]
    projections: dict[str, Projection]
    heads: HeadOptions


@dataclass(frozen=True)
class Model:
    """A decoder on a device. kv: how keys and values are stored; None: in the model's dtype."""

    config: DecoderConfig
    fmt: WeightFormat | None
    kv: KVFormat | None
    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    lm_head: Tensor

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def new_cache(self, pages: int, max_len: int) -> Cache:
        """A cache of that many pages, for sequences of up to max_len tokens."""
        if self.kv is None:
            return DenseCache(self.config, pages, self.dtype, max_len=max_len, device=self.device)
        return Int4Cache(self.config, pages, self.kv, max_len=max_len, device=self.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in a cache."""
        if self.kv is None:
            return DenseCache.bytes_per_token(self.config, self.dtype)
        return Int4Cache.bytes_per_token(self.config)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        """The last block's output [T, H]; stores the batch's keys and values in the cache."""
        hidden = F.embedding(batch.tokens, self.embedding)
        self.run_layers(hidden, batch, cache, Buffers(self.device))
        return hidden

    def run_layers(self, hidden: Tensor, batch: Batch, cache: Cache, buffers: Buffers) -> None:
        """hidden [T, H], the embedded tokens, becomes the last block's output."""
        cfg = self.config
        workspace = self._workspace(len(batch.tokens), batch.singles)
        attended = buffers.empty(
            "attended", (len(hidden), cfg.num_heads, cfg.head_dim), hidden.dtype
        )
        for index, layer in enumerate(self.layers):
            qkv, o, gate_up, down = (layer.projections[site] for site in SITES)
            x = qkv.norm_quantize(hidden, layer.norms[0], cfg.rms_norm_eps, buffers)
            rows = qkv.forward(x, hidden, workspace, buffers)
            cache.attend(index, rows, batch, layer.heads, attended, workspace, buffers)
            o.add_to(hidden, o.quantize(attended.flatten(1), buffers), workspace, buffers)
            x = gate_up.norm_quantize(hidden, layer.norms[1], cfg.rms_norm_eps, buffers)
            gated = gate_up.silu_mul(x, hidden, down, workspace, buffers)
            down.add_to(hidden, gated, workspace, buffers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output [R, H] -> logits [R, V], in the model's dtype."""
        x = rms_norm(hidden, self.norm, self.config.rms_norm_eps)
        out = x.new_empty(len(x), len(self.lm_head))
        ops.linear(x, self.lm_head, out)
        return out

    def next_logits(self, batch: Batch, cache: Cache) -> Tensor:
        """Of the tokens whose logits the batch wants, [R, V]."""
        return self.logits(self.forward(batch, cache)[batch.logit_rows])

    @functools.cached_property
    def _gemms(self) -> tuple[tuple[int, int], ...]:
        shapes = {
            (part.weight.shape[0], part.weight.shape[1])
            for layer in self.layers
            for projection in layer.projections.values()
            for part in projection.parts
            if not isinstance(part.weight, Tensor)
        }
        return tuple(sorted(shapes))

    def _workspace(self, tokens: int, singles: int) -> Tensor | None:
        """For the ops of one step, which run one after the other."""
        cfg = self.config
        shape = (singles, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        attention = shape if singles and self.kv is not None else None
        if not self._gemms and attention is None:
            return None
        size = ops.workspace_bytes(
            self.device, gemms=self._gemms, max_tokens=tokens, attention=attention
        )
        return torch.empty(size, dtype=torch.uint8, device=self.device) if size else None


def load_model(
    directory: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a checkpoint directory onto a device, block by block: one copy at the peak.

    Arguments and errors are those of `DecoderSource`.
    """
    source = DecoderSource(
        directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return Model(
        config=source.config,
        fmt=source.fmt,
        kv=source.kv,
        embedding=source.embedding,
        layers=tuple(map(make_layer, source.blocks())),
        norm=source.norm(),
        lm_head=source.lm_head(),
    )


def make_layer(block: Block) -> Layer:
    """A block's linears side by side, site by site, in the layout of the backend that runs them."""
    norms = block.norms
    q_norm, k_norm = (norms.get(f"self_attn.{name}.weight") for name in ("q_norm", "k_norm"))
    return Layer(
        norms=(norms["input_layernorm.weight"], norms["post_attention_layernorm.weight"]),
        projections={
            site: make_projection([block.linears[name] for name in names])
            for site, names in SITES.items()
        },
        heads=HeadOptions(
            None if q_norm is None or k_norm is None else (q_norm, k_norm), block.keys
        ),
    )


def make_projection(linears: Sequence[Linear]) -> Projection:
    """Linears of one input; neighbours that both are packed, or both dense, become one part."""
    parts, kind = [], None
    for packed, group in itertools.groupby(linears, _is_packed):
        run = list(group)
        weights: list[Any] = [linear.weight for linear in run]
        biases = [linear.bias for linear in run if linear.bias is not None]  # all or none
        bias = torch.cat(biases) if biases else None
        if packed:
            fmt = weights[0].fmt
            kind = fmt.activation
            words, scales = (
                torch.cat([getattr(weight, part) for weight in weights])
                for part in ("words", "scales")
            )
            parts.append(Part(ops.prepare(PackedWeight(words, scales, fmt)), bias))
        else:
            parts.append(Part(weights[0] if len(weights) == 1 else torch.cat(weights), bias))
    return Projection(tuple(parts), kind)


def _is_packed(linear: Linear) -> bool:
    return isinstance(linear.weight, PackedWeight)
