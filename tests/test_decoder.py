"""The decoder computes what transformers computes, for every architecture, and refuses the rest."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.architectures import SUPPORTED, block_prefix, split_linear_name
from quant.checkpoint.loading import load_decoder
from quant.decoder import Block, Decoder, Linear
from quant.errors import RequestError

# FP32 sums in another order: a few units in the last place of logits of order one. Whatever is
# dropped or misplaced moves them by more than `NOTICEABLE`, which the tests below hold to.
TOLERANCE = 1e-4
NOTICEABLE = 100 * TOLERANCE

BATCH, LENGTH = 2, 40  # longer than the tiny checkpoints' windows and YaRN's original length


def random_tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BATCH, LENGTH), generator=generator)


def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return decoder.logits(decoder.hidden_states(tokens, positions))


@torch.no_grad()
def transformers_logits(directory: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model(tokens).logits


def edited(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other values in config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_logits_equal_transformers(kind, tiny_checkpoint):
    tokens = random_tokens()
    expected = transformers_logits(tiny_checkpoint(kind), tokens)
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    found = logits_of(decoder, tokens)
    assert expected.std() > 0.5  # or the tolerance would mean nothing
    assert (found - expected).abs().max() < TOLERANCE


def test_every_norm_weight_and_bias_counts(kind, tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    tokens = random_tokens()
    expected = logits_of(decoder, tokens)
    for name, without in decoders_without_one_tensor(decoder):
        moved = (logits_of(without, tokens) - expected).abs().max()
        if name.endswith("k_proj.bias"):  # acts through RoPE alone, softmax ignores the rest
            assert moved > TOLERANCE, name
        else:
            assert moved > NOTICEABLE, name


def decoders_without_one_tensor(decoder: Decoder) -> Iterator[tuple[str, Decoder]]:
    """The decoder with one norm weight at 1, or one bias at 0, in turn."""
    yield "model.norm", dataclasses.replace(decoder, norm=torch.ones_like(decoder.norm))
    for i, block in enumerate(decoder.blocks):
        changed = {
            name: Block({**block.norms, name: torch.ones_like(weight)}, block.linears)
            for name, weight in block.norms.items()
        }
        changed |= {
            f"{name}.bias": Block(block.norms, {**block.linears, name: Linear(linear.weight, None)})
            for name, linear in block.linears.items()
            if linear.bias is not None
        }
        for name, new in changed.items():
            blocks = (*decoder.blocks[:i], new, *decoder.blocks[i + 1 :])
            yield block_prefix(i) + name, dataclasses.replace(decoder, blocks=blocks)


@pytest.mark.parametrize(
    ("kind", "present"),
    [
        ("llama", set()),
        ("mistral", set()),
        ("qwen3", {"q_norm.weight", "k_norm.weight"}),
        ("qwen2", {"q_proj.bias", "k_proj.bias", "v_proj.bias"}),
        (
            "llama-biases",
            {f"{x}_proj.bias" for x in ("q", "k", "v", "o", "gate", "up", "down")},
        ),
    ],
)
def test_block_has_the_biases_and_norms_of_its_architecture(kind, present, tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    shapes = decoder.config.block_shapes()
    common = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    extra = {n for n in set(shapes) - common if n.endswith(".bias") or "norm" in n}
    assert {name.split(".", 1)[1] for name in extra} == present


@pytest.mark.parametrize("kind", ["llama-linear-rope", "llama-llama3-rope", "llama-yarn-rope"])
def test_rotary_scaling_counts(kind, tiny_checkpoint):
    tokens = random_tokens()
    plain = load_decoder(tiny_checkpoint("llama"), dtype=torch.float32).config
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    config = dataclasses.replace(
        decoder.config, inv_freq=plain.inv_freq, rope_factor=plain.rope_factor
    )
    unscaled = dataclasses.replace(decoder, config=config)
    assert (logits_of(unscaled, tokens) - logits_of(decoder, tokens)).abs().max() > NOTICEABLE


@pytest.mark.parametrize(
    ("kind", "windows"), [("mistral", (12, 12)), ("qwen2-windows", (None, 12)), ("qwen2", None)]
)
def test_sliding_windows_are_per_layer_and_count(kind, windows, tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint(kind), dtype=torch.float32)
    assert decoder.config.sliding_windows == (windows or (None, None))
    open_config = dataclasses.replace(decoder.config, sliding_windows=(None, None))
    opened = logits_of(dataclasses.replace(decoder, config=open_config), random_tokens())
    difference = (opened - logits_of(decoder, random_tokens())).abs().amax(dim=(0, 2))
    assert bool((difference[:12] < TOLERANCE).all())
    assert bool((difference[12:] > NOTICEABLE).all()) == (windows is not None)


def test_tied_lm_head_is_the_embedding(tiny_checkpoint):
    tied = load_decoder(tiny_checkpoint("llama-tied"), dtype=torch.float32)
    assert tied.lm_head is tied.embedding
    untied = load_decoder(tiny_checkpoint("llama"), dtype=torch.float32)
    assert not torch.equal(untied.lm_head, untied.embedding)


def test_sequences_of_a_batch_do_not_see_each_other(tiny_checkpoint):
    decoder = load_decoder(tiny_checkpoint("qwen3"), dtype=torch.float32)
    tokens = random_tokens()
    alone = torch.cat([logits_of(decoder, row.unsqueeze(0)) for row in tokens])
    assert (alone - logits_of(decoder, tokens)).abs().max() < TOLERANCE


def test_unsupported_model_type_names_the_supported_ones(tiny_checkpoint, tmp_path):
    directory = edited(tiny_checkpoint("llama"), tmp_path / "m", model_type="gpt_neox")
    with pytest.raises(RequestError, match="gpt_neox") as caught:
        load_decoder(directory)
    assert all(name in str(caught.value) for name in SUPPORTED)


LONGROPE_FACTORS = [1.0 + i / 16 for i in range(16)]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": LONGROPE_FACTORS,
            "long_factor": LONGROPE_FACTORS,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_unsupported_rotary_scaling_names_the_supported_ones(rope, tiny_checkpoint, tmp_path):
    directory = edited(tiny_checkpoint("llama"), tmp_path / "m", rope_parameters=rope)
    with pytest.raises(RequestError, match=rope["rope_type"]) as caught:
        load_decoder(directory)
    assert all(name in str(caught.value) for name in ("default", "linear", "llama3", "yarn"))


def test_partial_rotary_embedding_is_refused(tiny_checkpoint, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    directory = edited(tiny_checkpoint("llama"), tmp_path / "m", rope_parameters=rope)
    with pytest.raises(RequestError, match="partial_rotary_factor"):
        load_decoder(directory)


def test_other_activation_than_silu_is_refused(tiny_checkpoint, tmp_path):
    directory = edited(tiny_checkpoint("llama"), tmp_path / "m", hidden_act="gelu")
    with pytest.raises(RequestError, match=r"'gelu'.*'silu'"):
        load_decoder(directory)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 64), ("intermediate_size", 64), ("num_key_value_heads", 1)]
)
def test_shape_that_contradicts_the_config_names_the_tensor(key, value, tiny_checkpoint, tmp_path):
    directory = edited(tiny_checkpoint("llama"), tmp_path / "m", **{key: value})
    with pytest.raises(RequestError, match=r"tensor model\..* is \[.*config.json makes it"):
        load_decoder(directory)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.layers.12.self_attn.o_proj", (12, "self_attn.o_proj")),
        ("model.layers.3.mlp", None),
        ("model.layers.3.mlp.gate", None),
        ("lm_head", None),
    ],
)
def test_linear_names_split_into_layer_and_place(name, split):
    assert split_linear_name(name) == split
