"""A checkpoint as a decoder: dense, or packed 4-bit weights as stored, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, block_prefix
from quant.checkpoint.compressed_tensors import (
    is_ignored,
    packed_shapes,
    parse_quantization_config,
)
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.side import read_side
from quant.decoder import Block, Decoder, Linear, check_head_dim
from quant.errors import RequestError
from quant_kernels import cpu
from quant_kernels.formats import WeightFormat, on_grid
from quant_kernels.packing import PackedWeight


class DecoderSource:
    """The parts of the decoder that a directory holds, read when they are asked for.

    directory: dense, or compressed-tensors `pack-quantized`. dtype: of activations and of what is
    not packed; None takes the embedding's. Tensors go straight to `device`, so that a caller who
    takes block after block holds one copy of the model. Raises RequestError, in the constructor or
    when a part is read, where the checkpoint is not one that runs here.
    """

    def __init__(
        self,
        directory: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
        self._device = device or torch.device("cpu")
        raw = self._reader.raw_config
        self.fmt = parse_quantization_config(directory, raw)
        self._ignore = (raw.get("quantization_config") or {}).get("ignore") or []
        self.config = self._reader.config
        side = read_side(directory, self.config)
        self.kv = side.kv
        if self.kv is not None:
            check_head_dim(self.config)
        self._keys = [transform.to(self._device) for transform in side.keys]
        self._reader.check_shapes(self.config.outer_shapes())
        self._reader.check_tied()
        self.embedding = self._reader.read(f"{EMBEDDING}.weight", dtype).to(self._device)
        if self.config.tie_word_embeddings:
            self.embedding = cpu.in_huge_pages(self.embedding)

    def blocks(self) -> Iterator[Block]:
        """First to last."""
        shapes, prefixes = self.config.block_shapes(), map(block_prefix, self._layers)
        norms = {name: shape for name, shape in shapes.items() if "norm" in name}
        biases = {name: shape for name, shape in shapes.items() if name.endswith(".bias")}
        for layer, prefix in enumerate(prefixes):
            self._reader.check_shapes({prefix + name: shape for name, shape in biases.items()})
            linears = {name: self._linear(prefix, name) for name in LINEARS}
            self._reader.check_shapes({prefix + name: shape for name, shape in norms.items()})
            keys = self._keys[layer] if self._keys else None
            yield Block({name: self._read(prefix + name) for name in norms}, linears, keys)

    def norm(self) -> Tensor:
        """The final norm's weight [H]."""
        return self._read(f"{FINAL_NORM}.weight")

    def lm_head(self) -> Tensor:
        """[V, H]: the embedding itself where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.embedding if tied else cpu.in_huge_pages(self._read(f"{LM_HEAD}.weight"))

    @property
    def _layers(self) -> range:
        return range(self.config.num_layers)

    def _read(self, name: str) -> Tensor:
        return self._reader.read(name, self.embedding.dtype).to(self._device)

    def _linear(self, prefix: str, name: str) -> Linear:
        shape, weight = self.config.linear_shape(name), f"{prefix}{name}.weight"
        bias = f"{prefix}{name}.bias" if self.config.has_bias(name) else None
        if self.fmt is None or is_ignored(prefix + name, self._ignore):
            self._reader.check_shapes({weight: shape})
            found: Tensor | PackedWeight = self._read(weight)
        else:
            found = self._packed(prefix + name, shape, self.fmt)
        return Linear(found, self._read(bias) if bias else None)

    def _packed(self, name: str, shape: tuple[int, int], fmt: WeightFormat) -> PackedWeight:
        reader = self._reader
        fmt.check(*shape, name)
        reader.check_shapes(packed_shapes(name, shape, fmt))
        for suffix in ("weight_g_idx", "weight_zero_point"):
            if f"{name}.{suffix}" in reader.names:
                raise RequestError(
                    f"{name}.{suffix}: this layout of 4-bit weights is not supported"
                )
        words = reader.read(f"{name}.weight_packed")
        scales = reader.read(f"{name}.weight_scale")
        if words.dtype != torch.int32:
            raise RequestError(f"{name}.weight_packed is {words.dtype}; expected torch.int32")
        if not on_grid(scales, fmt):
            raise RequestError(
                f"{name}.weight_scale: the scales are not on the grid of {fmt.scheme} "
                f"({fmt.numerics}, group size {fmt.group_size}), so this kernel would multiply "
                "other weights than the file says; quantize the original checkpoint with "
                "`quantize run`"
            )
        return PackedWeight(words.to(self._device), scales.to(self._device), fmt)


def load_decoder(
    directory: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Decoder:
    """The whole of a `DecoderSource` as a model in plain torch; arguments and errors are its."""
    source = DecoderSource(
        directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return Decoder(
        config=source.config,
        fmt=source.fmt,
        embedding=source.embedding,
        blocks=tuple(source.blocks()),
        norm=source.norm(),
        lm_head=source.lm_head(),
        kv=source.kv,
    )
