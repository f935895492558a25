"""Models of a given shape with random weights, made where they run: to time an 8B or a 70B without
its checkpoint. Their tokens mean nothing, their bytes and operations are those of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.architectures import LINEARS, DecoderConfig
from quant.checkpoint.hf_config import decoder_config
from quant.checkpoint.source import read_json
from quant.decoder import Block, Linear
from quant.runtime.model import Model, make_layer
from quant_kernels.formats import WeightFormat, join_scales
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import PackedWeight

DEVIATION = 0.02  # of weights, as models are initialized


def read_config(path: Path) -> DecoderConfig:
    """From a config.json, or the directory that holds one."""
    file = path / "config.json" if path.is_dir() else path
    return decoder_config(read_json(file), file)


def random_weight(
    shape: tuple[int, int], fmt: WeightFormat, generator: torch.Generator
) -> PackedWeight:
    """Random codes [N, K] and scales on the format's grid, on the generator's device."""
    device, (rows, columns) = generator.device, shape
    words = torch.randint(
        -(2**31), 2**31, (rows, columns // 8), generator=generator, device=device,
        dtype=torch.int64,
    ).to(torch.int32)  # fmt: skip
    groups = fmt.groups(columns)
    anchor = fmt.anchor or 1.0
    t = torch.randint(1, 17, (rows, groups), generator=generator, device=device) * (anchor / 16)
    t[:, 0] = anchor
    # Codes have a standard deviation of 4.6.
    unit = torch.full((rows, 1), 2.0**-8 / anchor, device=device)
    return PackedWeight(words, join_scales(t, unit), fmt)


def random_model(
    config: DecoderConfig, fmt: WeightFormat | None, kv: KVFormat | None, device: torch.device
) -> Model:
    """A model in BF16 with linears of `fmt` (None: dense too), and a cache of `kv`."""
    generator = torch.Generator(device).manual_seed(0)

    def dense(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.normal_(0, DEVIATION, generator=generator)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=device)

    def block() -> Block:
        linears = {}
        for name in LINEARS:
            shape = config.linear_shape(name)
            weight: Any = dense(*shape) if fmt is None else random_weight(shape, fmt, generator)
            bias = dense(shape[0]) if config.has_bias(name) else None
            linears[name] = Linear(weight, bias)
        shapes = config.block_shapes().items()
        norms = {name: ones(shape[0]) for name, shape in shapes if "norm" in name}
        return Block(norms, linears)

    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = dense(*vocabulary)
    return Model(
        config=config,
        fmt=fmt,
        kv=kv,
        embedding=embedding,
        layers=tuple(make_layer(block()) for _ in range(config.num_layers)),
        norm=ones(config.hidden_size),
        lm_head=embedding if config.tie_word_embeddings else dense(*vocabulary),
    )
