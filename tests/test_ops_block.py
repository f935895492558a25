"""A decoder block made of the ops alone is the decoder's block, which calibration sees."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quant.decoder import (
    KeyTransform,
    Linear,
    block_forward,
    causal_attention,
    quantized_attention,
    rotary_table,
)
from quant.runtime.model import Block, Decoder, load_decoder
from quant_kernels import ops, reference_attention
from quant_kernels.kv4 import KVFormat
from quant_kernels.packing import KV_PAGE, PackedWeight

LENGTH = 40
ALL_PACKED = (
    "lut-128", "lut-64", "lut-channel", "exact-32", "exact-64", "exact-128", "exact-channel",
    "int8-64", "int8-128",
)  # fmt: skip
F8 = torch.float8_e4m3fn


def fused(linears: Sequence[Linear]) -> tuple[PackedWeight, Tensor | None]:
    """Linears of one input as one, with their biases (zeros where some have none)."""
    weights = [linear.weight for linear in linears]
    words, scales = (torch.cat([getattr(w, part) for w in weights]) for part in ("words", "scales"))
    biases = [
        torch.zeros(len(linear.weight.words)) if linear.bias is None else linear.bias.float()
        for linear in linears
    ]
    bias = None if all(linear.bias is None for linear in linears) else torch.cat(biases)
    return PackedWeight(words, scales, weights[0].fmt), bias


def block_of_ops(
    decoder: Decoder, block: Block, hidden: Tensor, window: int, backend: str
) -> Tensor:
    """hidden [T, H], one sequence from its beginning -> the block's output [T, H]."""
    cfg, fmt = decoder.config, decoder.fmt
    kind = F8 if fmt.activation == "fp8" else torch.int8
    tokens, (heads, kv_heads, dim) = len(hidden), (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)

    def quantized(width: int) -> tuple[Tensor, Tensor]:
        return torch.empty(tokens, width, dtype=kind), torch.empty(tokens, 1)

    def linear(names: str, x: tuple[Tensor, Tensor], **options: object) -> Tensor:
        weight, bias = fused([block.linears[name] for name in names.split()])
        rows = len(weight.words) // (2 if options.get("silu_mul") else 1)
        out = torch.empty(tokens, rows, dtype=hidden.dtype)
        prepared = ops.prepare(weight, backend=backend)
        ops.gemm(*x, prepared, out, bias=bias, backend=backend, **options)
        return out

    def norm(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        outputs = quantized(cfg.hidden_size)
        weight = block.norms[f"{name}.weight"]
        ops.rms_norm_quantize(x, weight, cfg.rms_norm_eps, *outputs, backend=backend)
        return outputs

    def again(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = quantized(x.shape[1])
        ops.quantize_activation(x, *outputs, backend=backend)
        return outputs

    qkv = linear(
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj", norm(hidden, "input_layernorm")
    )
    cos, sin = rotary_table(cfg, torch.arange(tokens))
    pages = math.ceil(tokens / KV_PAGE)
    kv_codes = torch.full((2, pages, kv_heads, KV_PAGE, dim // 2), 0xAA, dtype=torch.uint8)
    kv_scales = torch.full((2, pages, kv_heads, KV_PAGE, 2), torch.nan, dtype=torch.float16)
    q = torch.empty(tokens, heads, dim, dtype=F8), torch.empty(tokens, heads)
    norms = tuple(block.norms[f"self_attn.{n}.weight"] for n in ("q_norm", "k_norm") if cfg.qk_norm)
    ops.rope_append(
        qkv, torch.arange(tokens), *(table[:, : dim // 2].contiguous() for table in (cos, sin)),
        torch.arange(tokens), *q, kv_codes, kv_scales,
        norms=norms or None, eps=cfg.rms_norm_eps,
        key_transform=(block.keys.scale, block.keys.shift) if block.keys else None,
        symmetric=decoder.kv.symmetric, backend=backend,
    )  # fmt: skip
    attended = torch.full((tokens, heads, dim), torch.nan, dtype=hidden.dtype)
    table = torch.arange(pages, dtype=torch.int32).unsqueeze(0)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    ops.prefill_attention(
        *q, kv_codes, kv_scales, table, torch.tensor([0, tokens], dtype=torch.int32), lengths,
        tokens, attended, sm_scale=1 / math.sqrt(dim), window=window, backend=backend,
    )  # fmt: skip
    hidden = linear("self_attn.o_proj", again(attended.flatten(1)), residual=hidden)
    x = norm(hidden, "post_attention_layernorm")
    gated = linear("mlp.gate_proj mlp.up_proj", x, silu_mul=True)
    return linear("mlp.down_proj", again(gated), residual=hidden)


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", ALL_PACKED)
def test_a_block_of_ops_is_the_decoders_block(
    case, quantized_case, symmetric, backend, monkeypatch
):
    quantized = quantized_case(case)
    kv = KVFormat(symmetric=symmetric)
    decoder = dataclasses.replace(load_decoder(quantized.output, dtype=torch.float32), kv=kv)
    cfg, generator = decoder.config, torch.Generator().manual_seed(0)
    hidden = torch.randn(LENGTH, cfg.hidden_size, generator=generator)
    shape = (cfg.num_kv_heads, cfg.head_dim)
    keys = KeyTransform(
        torch.rand(shape, generator=generator) * 2 + 0.3, torch.randn(shape, generator=generator)
    )
    rope = rotary_table(cfg, torch.arange(LENGTH).unsqueeze(0))
    for layer, block in enumerate(decoder.blocks):
        block, window = dataclasses.replace(block, keys=keys), cfg.sliding_windows[layer]
        attend = quantized_attention(causal_attention(window), kv, keys)
        wanted = block_forward(cfg, block.norms, block.linears, hidden[None], rope, attend)[0]
        found = block_of_ops(decoder, block, hidden, window or 0, backend)
        # P has four significant bits, an error of 1/16 at most, and moves codes of the next input.
        assert relative_error(found - hidden, wanted - hidden) < 5e-3
        if backend != "reference":
            continue
        with monkeypatch.context() as patch:
            patch.setattr(reference_attention, "round_e4m3", lambda x: x)
            found = block_of_ops(decoder, block, hidden, window or 0, backend)
        # Without that: FP32 sums in another order, and a code here and there that they tip over.
        assert relative_error(found - hidden, wanted - hidden) < 2e-4
