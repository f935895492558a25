"""config.json: the same decoder as transformers makes of it, and what is refused before that."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from quant.architectures import DecoderConfig
from quant.checkpoint.hf_config import NULLABLE, OPTIONAL, REQUIRED, ROPE, decoder_config
from quant.errors import RequestError

PATH = Path("dir/config.json")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "architectures": ["Qwen2ForCausalLM"],
    "initializer_range": 0.02,
}
# As they lie on the hub, written by transformers 4: rope_theta beside rope_scaling.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-1": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_sequence_length": 2048,
        "rms_norm_eps": 1e-06,
        "pad_token_id": -1,
    },
    "llama-2-16k": {
        **LLAMA,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "pretraining_tp": 1,
        "num_key_value_heads": None,
    },
    "llama-3.1": {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "head_dim": 64,
        "num_hidden_layers": 16,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "both-rope-keys": {
        **LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen2.5": QWEN2,
    "qwen2.5-yarn": {
        **QWEN2,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
    },
    "qwen2-windows": {
        **QWEN2,
        "use_sliding_window": True,
        "max_window_layers": 21,
        "rope_scaling": None,
    },
    "qwen3": {
        **QWEN2,
        "model_type": "qwen3",
        "head_dim": 128,
        "num_attention_heads": 64,
        "attention_bias": False,
        "sliding_window": None,
        "rope_scaling": None,
        "layer_types": ["full_attention"] * 28,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "attention_factor": None,
            "beta_fast": 32,
            "truncate": False,
            "mscale": 1.0,
            "mscale_all_dim": 0,
        },
    },
    "mistral-0.1": {
        **LLAMA,
        "model_type": "mistral",
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    },
    "mistral-0.3": {
        **LLAMA,
        "model_type": "mistral",
        "sliding_window": None,
        "rope_theta": 1e6,
        "head_dim": None,
    },
    "mistral-nemo": {**LLAMA, "model_type": "mistral", "hidden_size": 5120, "head_dim": 128},
}


def theirs(raw: dict[str, Any], directory: Path) -> DecoderConfig:
    """What transformers makes of the whole file."""
    from transformers import AutoConfig

    (directory / "config.json").write_text(json.dumps(raw))
    return DecoderConfig.from_hf(AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_makes_of_them(name: str, tmp_path: Path) -> None:
    raw = PUBLISHED[name]
    before = json.dumps(raw)
    assert decoder_config(raw, PATH) == theirs(raw, tmp_path)
    assert json.dumps(raw) == before  # transformers writes into the dicts it is given


def test_tiny_configs_mean_what_transformers_makes_of_them(
    kind: str, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    raw = json.loads((tiny_checkpoint(kind) / "config.json").read_text())
    assert decoder_config(raw, PATH) == theirs(raw, tmp_path)


def test_the_rope_dicts_count() -> None:
    """The comparisons above could pass over a key that both sides drop."""
    found = [
        decoder_config(PUBLISHED[name], PATH).inv_freq for name in ("llama-3.1", "llama-3.2-1b")
    ]
    plain = decoder_config({**LLAMA, "rope_theta": 500000.0}, PATH).inv_freq
    assert found[0] != plain
    assert len(found[0]) == 64
    assert len(found[1]) == 32


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_size_is_named(key: str) -> None:
    raw = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(RequestError, match=rf"dir/config\.json: it has no '{key}'"):
        decoder_config(raw, PATH)


BAD: list[Any] = ["32", [32], {"a": 1}, float("nan"), float("inf"), -1, 10**19, -(10**19)]


def refused(key: str, raw: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        decoder_config(raw, PATH)
    assert str(caught.value).startswith(f"{PATH}: {key} is "), caught.value
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", {**REQUIRED, **OPTIONAL, **NULLABLE})
def test_values_of_another_type_or_size_are_named(key: str) -> None:
    bad = [*BAD, None] if key not in NULLABLE else BAD
    for value in bad:
        if key == "hidden_act" and value == "32":
            continue
        refused(key, {**LLAMA, key: value})
    if key not in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        refused(key, {**LLAMA, key: True})
    if key not in ("hidden_act", "rms_norm_eps", "rope_theta", "partial_rotary_factor"):
        refused(key, {**LLAMA, key: 0.5})


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ROPE)
def test_rope_values_of_another_type_or_size_are_named(key: str, where: str) -> None:
    rope = {**LLAMA3_ROPE, "rope_theta": 1e4}
    for value in BAD:
        if (key in ("rope_type", "type") and value == "32") or isinstance(value, dict):
            continue
        refused(f"{where}.{key}", {**LLAMA, where: {**rope, key: value}})
    if key != "truncate":
        refused(f"{where}.{key}", {**LLAMA, where: {**rope, key: True}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_key_value_heads": 5}, "num_attention_heads 32.*num_key_value_heads 5"),
        ({"hidden_size": 4100}, "hidden_size 4100.*num_attention_heads 32"),
        ({"hidden_size": 4100, "head_dim": 64}, "hidden_size 4100.*num_attention_heads 32"),
        ({"hidden_size": 32 * 33}, "hidden_size 1056 / num_attention_heads 32.*odd"),
        ({"head_dim": 33}, "head_dim is 33.*even"),
        ({"layer_types": ["full_attention"] * 31}, "layer_types has 31.*num_hidden_layers 32"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types is .*not a list of"),
        ({"layer_types": [["full_attention"]] * 32}, "layer_types is .*not a list of"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "per_layer_config"),
        ({"quantization_config": [1]}, "quantization_config is .*not an object"),
        ({"rope_scaling": [1]}, "rope_scaling is .*not an object"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.*differ by layer type"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type.*'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json.*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-99}}, "frequencies.*rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_fields_at_odds_with_each_other_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decoder_config({**LLAMA, **config}, PATH)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"num_labels": 10**9},
        {"id2label": {"x": "y"}},
        {"problem_type": 3},
        {"torch_dtype": "no_such"},
        {"use_cache": "maybe"},
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"transformers_version": 5},
        {"hidden_sizes": float("nan")},
        {"from_pretrained": 1},
    ],
)
def test_keys_that_the_decoder_does_not_depend_on_have_no_effect(config: dict[str, Any]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert decoder_config({**LLAMA, **config}, PATH) == decoder_config(LLAMA, PATH)
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20 << 10  # KiB
