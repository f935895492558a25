"""Checkpoints of any size with random weights: for limits of memory and time, not for accuracy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quant.architectures import DecoderConfig, block_prefix
from quant.checkpoint.hf_config import decoder_config
from quant.checkpoint.shards import DTYPE_NAMES, ShardWriter, header_bytes

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """Of a Llama: hidden and intermediate size, heads, layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int

    def config(self) -> dict[str, object]:
        """As config.json has it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def write_checkpoint(shape: Shape, directory: Path, shards: int = 4) -> int:
    """Write a BF16 checkpoint with a tokenizer; returns its bytes.

    The tensors of a block lie in different shards, as a careless export leaves them. One block is
    drawn, and every other is it with its rows rolled: drawing billions of numbers takes longer.
    """
    directory.mkdir(parents=True)
    config = shape.config()
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    cfg = decoder_config(config, directory / "config.json")
    files = {i: directory / f"part-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)}
    held: dict[int, dict[str, tuple[int, ...]]] = {i: {} for i in files}
    weight_map = {}
    for number, (name, dims) in enumerate(_shapes(cfg)):
        held[number % shards][name] = dims
        weight_map[name] = files[number % shards].name
    generator = torch.Generator().manual_seed(0)
    drawn = {name: _draw(name, dims, generator) for name, dims in cfg.block_shapes().items()}
    for i, tensors in held.items():
        _write_shard(files[i], tensors, drawn, generator)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(directory)
    return sum(path.stat().st_size for path in files.values())


def write_tokens(path: Path, count: int) -> None:
    """Random token ids as a .npy dataset."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, count, dtype=np.int32)
    np.save(path, ids)


def _shapes(cfg: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from cfg.outer_shapes().items()
    for layer in range(cfg.num_layers):
        for name, dims in cfg.block_shapes().items():
            yield block_prefix(layer) + name, dims


def _draw(name: str, dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return 1 + 0.1 * torch.randn(dims, generator=generator).bfloat16()
    std = dims[-1] ** -0.5  # keeps activations of order one through any number of blocks
    if "embed" in name:
        std = 1.0
    return torch.empty(dims, dtype=torch.bfloat16).normal_(0, std, generator=generator)


def _write_shard(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    drawn: dict[str, Tensor],
    generator: torch.Generator,
) -> None:
    kinds = {name: (DTYPE_NAMES[torch.bfloat16], dims) for name, dims in tensors.items()}
    writer = ShardWriter(path.parent / path.stem, 2**62, header_bytes(kinds))
    writer.directory.mkdir()
    for name, dims in tensors.items():
        _, _, layer, inside = (*name.split(".", 3), "", "")[:4]
        if layer.isdigit():
            writer.add(name, drawn[inside].roll(int(layer), dims=0))
        else:
            writer.add(name, _draw(name, dims, generator))
    writer.finish()
    (made,) = writer.directory.iterdir()
    os.replace(made, path)
    writer.directory.rmdir()


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{i}>": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
