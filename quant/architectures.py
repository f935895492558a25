"""Where things are in a decoder, per `model_type`: blocks, linears, norms, rotary layout.

Every supported architecture is the same block,

    h = h + o_proj(attention(rope(q), rope(k), v)),   q, k, v = {q,k,v}_proj(norm(h))
    h = h + down_proj(silu(gate_proj(x)) * up_proj(x)),  x = norm(h)

and differs from the others by configuration only: biases, QK-norm, grouped heads, head_dim, rotary
scaling, sliding windows, tied embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import RequestError

# model_type -> whether a head's q and k are RMS-normalized before RoPE.
SUPPORTED = {"llama": False, "mistral": False, "qwen2": False, "qwen3": True}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")

# The four places of a block whose inputs are quantized, in the order in which they are computed,
# and the linears that share each input.
SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LINEARS = tuple(name for names in SITES.values() for name in names)

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder's arithmetic depends on, read from a Hugging Face config."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # per layer; None: the whole prefix
    inv_freq: tuple[float, ...]  # [head_dim / 2], after rotary scaling
    rope_factor: float  # multiplies cos and sin (YaRN); 1 elsewhere

    @classmethod
    def from_hf(cls, config: Any) -> DecoderConfig:
        """From a transformers config; RequestError where the architecture is not supported."""
        check_model_type(config.model_type)
        if config.hidden_act != "silu":
            raise RequestError(f"hidden_act {config.hidden_act!r} is not supported; only 'silu' is")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        inv_freq, rope_factor = _rotary_frequencies(config, head_dim)
        if not bool(inv_freq.isfinite().all()) or not math.isfinite(rope_factor):
            raise RequestError(
                "rotary frequencies are not finite with these rope_parameters: "
                f"{dict(config.rope_parameters)}"
            )
        attention_bias = bool(getattr(config, "attention_bias", False))
        is_qwen2 = config.model_type == "qwen2"
        return cls(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads or heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=is_qwen2 or attention_bias,
            o_bias=attention_bias and not is_qwen2,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=SUPPORTED[config.model_type],
            sliding_windows=_sliding_windows(config),
            inv_freq=tuple(inv_freq.tolist()),
            rope_factor=float(rope_factor),
        )

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of a block's linear, by its name inside the block."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden_size),
            "self_attn.k_proj": (kv, self.hidden_size),
            "self_attn.v_proj": (kv, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }[linear]

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one block: name inside the block -> shape."""
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden_size,),
            "post_attention_layernorm.weight": (self.hidden_size,),
        }
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        for linear in LINEARS:
            out_features, in_features = self.linear_shape(linear)
            shapes[f"{linear}.weight"] = (out_features, in_features)
            if self.has_bias(linear):
                shapes[f"{linear}.bias"] = (out_features,)
        return shapes

    def block_elements(self) -> int:
        """How many numbers one block's tensors hold."""
        return sum(torch.Size(shape).numel() for shape in self.block_shapes().values())

    def has_bias(self, linear: str) -> bool:
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.o_bias if linear == "self_attn.o_proj" else self.qkv_bias

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors outside the blocks. A tied lm_head is the embedding and not listed."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{EMBEDDING}.weight": (self.vocab_size, self.hidden_size),
            f"{FINAL_NORM}.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes[f"{LM_HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def check_model_type(model_type: str) -> None:
    if model_type not in SUPPORTED:
        supported = ", ".join(sorted(SUPPORTED))
        raise RequestError(
            f"model_type {model_type!r:.80} is not supported; supported: {supported}. "
            "Models of other types are not quantized, not even partly"
        )


def check_rope_type(rope_type: Any) -> None:
    if rope_type not in ROPE_TYPES:
        raise RequestError(
            f"rotary scaling (rope_type) {rope_type!r} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}. Types whose frequencies change with the prompt's length are "
            "refused"
        )


def check_length(length: int, cfg: DecoderConfig) -> None:
    """RequestError where a sequence is longer than the model's positions reach."""
    if length > cfg.max_position_embeddings:
        raise RequestError(
            f"sequences of {length} tokens are longer than this model takes: its "
            f"max_position_embeddings is {cfg.max_position_embeddings}; lower --max-seq-length"
        )


def block_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def split_linear_name(name: str) -> tuple[int, str] | None:
    """'model.layers.3.mlp.up_proj' -> (3, 'mlp.up_proj'); None for anything else."""
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in LINEARS:
        return int(parts[2]), parts[3]
    return None


def _sliding_windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama" or window is None:
        return (None,) * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rotary_frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """inv_freq [head_dim / 2] FP32, and the factor on cos and sin, by transformers' formulas."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: Mapping[str, Any] = config.rope_parameters or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise RequestError("rotary embeddings that differ by layer type are not supported")
    rope_type = rope.get("rope_type", "default")
    check_rope_type(rope_type)
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise RequestError(
            "partial rotary embeddings (partial_rotary_factor < 1) are not supported"
        )
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (float(rope["rope_theta"]) ** exponents), 1.0
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
