"""config.json: the fields that the decoder depends on, checked before transformers sees them.

transformers builds a config from every key of the file, and believes it: `num_labels` of a billion
makes a dict of a billion strings, `num_hidden_layers` a list. So its class gets only the fields
below, each of a known type and size; no other key of the file has an effect.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quant.architectures import LAYER_TYPES, DecoderConfig, check_rope_type
from quant.errors import RequestError
from quant.memory import without_triton

# What is wrong with a value, as the end of "FIELD is VALUE, ..."; None where nothing is.
Check = Callable[[Any], str | None]

MAX_STRING_CHARACTERS = 64
MAX_LENGTH = 2**31 - 1  # positions and windows, in tokens


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:  # not bool, which is an int to Python
            return None
        return f"not an integer in {low:,}..{high:,}"

    return check


def _number(low: float, high: float) -> Check:
    """Numbers in the open interval."""

    def check(value: Any) -> str | None:
        # NaN fails both comparisons; integers are compared exactly, however large.
        if type(value) in (int, float) and low < value < high:
            return None
        return f"not a number between {low:g} and {high:g}"

    return check


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "neither true nor false"


def _string(value: Any) -> str | None:
    if isinstance(value, str) and len(value) <= MAX_STRING_CHARACTERS:
        return None
    return f"not a string of at most {MAX_STRING_CHARACTERS} characters"


def _layer_types(value: Any) -> str | None:
    if isinstance(value, list) and all(item in LAYER_TYPES for item in value):
        return None
    return f"not a list of {' and '.join(LAYER_TYPES)}"


# Far above every published model, far below what hurts before the shapes are compared.
REQUIRED: dict[str, Check] = {
    "num_hidden_layers": _integer(1, 10_000),
    "hidden_size": _integer(1, 2**20),
    "intermediate_size": _integer(1, 2**24),
    "num_attention_heads": _integer(1, 2**16),
    "vocab_size": _integer(1, 2**24),
    "rms_norm_eps": _number(0.0, 1.0),
}
# Absent: the architecture's own default, as transformers has it.
OPTIONAL: dict[str, Check] = {
    "hidden_act": _string,
    "max_position_embeddings": _integer(1, MAX_LENGTH),
    "tie_word_embeddings": _boolean,
    "attention_bias": _boolean,
    "mlp_bias": _boolean,
    "use_sliding_window": _boolean,
    "max_window_layers": _integer(0, MAX_LENGTH),
    "rope_theta": _number(1.0, 1e15),
    "partial_rotary_factor": _number(0.0, 2.0),
    "original_max_position_embeddings": _integer(1, MAX_LENGTH),
}
# null: as if absent.
NULLABLE: dict[str, Check] = {
    "num_key_value_heads": _integer(1, 2**16),
    "head_dim": _integer(2, 2**14),
    "sliding_window": _integer(1, MAX_LENGTH),
    "layer_types": _layer_types,
}
ROPE_DICTS = ("rope_parameters", "rope_scaling")
# Of a rope dict; null counts as absent in all of them.
ROPE: dict[str, Check] = {
    "rope_type": _string,
    "type": _string,
    "rope_theta": _number(1.0, 1e15),
    "factor": _number(0.0, 1e6),
    "original_max_position_embeddings": _number(0.0, MAX_LENGTH),
    "low_freq_factor": _number(0.0, 1e6),
    "high_freq_factor": _number(0.0, 1e6),
    "beta_fast": _number(0.0, 1e6),
    "beta_slow": _number(0.0, 1e6),
    "attention_factor": _number(0.0, 1e6),
    "mscale": _number(-1e-9, 1e6),
    "mscale_all_dim": _number(-1e-9, 1e6),
    "partial_rotary_factor": _number(0.0, 2.0),
    "truncate": _boolean,
}


def decoder_config(raw: Mapping[str, Any], path: Path) -> DecoderConfig:
    """The decoder that a parsed config.json describes; path names the file in messages.

    Equal to what transformers makes of the whole file. RequestError names the field that is
    missing, of another type, out of bounds, or at odds with another.
    """
    try:
        return DecoderConfig.from_hf(_transformers_config(raw))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except Exception as error:  # transformers raises many kinds over values that do not agree
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{path}: {reason}") from error


def _transformers_config(raw: Mapping[str, Any]) -> Any:
    with without_triton():
        from transformers import CONFIG_MAPPING

    for name in REQUIRED:
        if name not in raw:
            raise RequestError(f"it has no {name!r}")
    fields = {
        name: _checked(name, raw[name], check)
        for name, check in {**REQUIRED, **OPTIONAL, **NULLABLE}.items()
        if name in raw
    }
    for name in ROPE_DICTS:
        if raw.get(name) is not None:
            fields[name] = _rope(name, raw[name])
    _check_unsupported(raw)
    model_type = raw["model_type"]
    _check_agreement(model_type, fields)
    with without_triton():  # the class is imported here
        return CONFIG_MAPPING[model_type](**fields)


def _checked(name: str, value: Any, check: Check) -> Any:
    if value is None and name in NULLABLE:
        return None
    if wrong := check(value):
        raise RequestError(f"{name} is {reprlib.repr(value)}, {wrong}")
    return value


def _rope(where: str, raw: Any) -> dict[str, Any]:
    """The known keys of a rope dict, in a dict of their own: transformers writes into its own."""
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} is {reprlib.repr(raw)}, not an object")
    for name, value in raw.items():
        if isinstance(value, Mapping):
            raise RequestError(
                f"{where} has an object, {name!r:.80}: rotary embeddings that differ by "
                "layer type are not supported"
            )
    rope = {
        name: _checked(f"{where}.{name}", raw[name], check)
        for name, check in ROPE.items()
        if raw.get(name) is not None
    }
    check_rope_type(rope.get("rope_type", rope.get("type", "default")))
    return rope


def _check_unsupported(raw: Mapping[str, Any]) -> None:
    """Fields that no other check sees, but with which the model is not the one it seems."""
    if raw.get("per_layer_config"):
        raise RequestError("per_layer_config: layers of different shapes are not supported")
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping):
        raise RequestError(f"quantization_config is {reprlib.repr(quantization)}, not an object")


def _check_agreement(model_type: str, fields: Mapping[str, Any]) -> None:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    kv_heads, head_dim = fields.get("num_key_value_heads"), fields.get("head_dim")
    if kv_heads is not None and heads % kv_heads:
        raise RequestError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    # transformers insists on it for llama even where head_dim is given.
    if hidden % heads and (head_dim is None or model_type == "llama"):
        raise RequestError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if head_dim is None and model_type != "qwen3" and (hidden // heads) % 2:
        raise RequestError(
            f"hidden_size {hidden} / num_attention_heads {heads} is an odd head_dim; rotary "
            "embeddings need an even one"
        )
    if head_dim is not None and head_dim % 2:
        raise RequestError(f"head_dim is {head_dim}; rotary embeddings need an even one")
    layers, types = fields["num_hidden_layers"], fields.get("layer_types")
    if types is not None and len(types) != layers:
        raise RequestError(f"layer_types has {len(types)} entries for num_hidden_layers {layers}")
