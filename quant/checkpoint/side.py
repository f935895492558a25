"""What runs of a checkpoint need and compressed-tensors cannot say: the KV cache's format.

    fourbyeight.json          "kv_cache": {"scheme": "kv4", "symmetric": false}, or null
                              "side_tensors": "fourbyeight.safetensors", or null
    fourbyeight.safetensors   model.layers.{i}.self_attn.key_scale, .key_shift   F32 [Hk, D]

Keys are stored as scale * (k - shift), with k after RoPE (`quant/calibration/rope.py`): the two
belong to the format that keys are stored in. The index does not list the second file, so other
readers load the checkpoint without it, with a cache of their own.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from quant.architectures import DecoderConfig, block_prefix
from quant.checkpoint.compressed_tensors import SIDE_FILE, read_side_file
from quant.checkpoint.headers import Header, read_header
from quant.checkpoint.tensor_bytes import read_tensor
from quant.checkpoint.writer import finite
from quant.decoder import KeyTransform
from quant.errors import RequestError
from quant_kernels.kv4 import KVFormat

SIDE_TENSORS = "fourbyeight.safetensors"
KV_SCHEME = "kv4"


@dataclass(frozen=True)
class Side:
    """kv: how the cache is stored, None: as the model computes. keys: of every layer, or empty."""

    kv: KVFormat | None = None
    keys: tuple[KeyTransform, ...] = ()


def key_names(layer: int) -> tuple[str, str]:
    """The names of a layer's scale and shift."""
    prefix = f"{block_prefix(layer)}self_attn."
    return f"{prefix}key_scale", f"{prefix}key_shift"


def side_keys(side: Side) -> dict[str, Any]:
    """The keys of fourbyeight.json that describe the KV cache."""
    kv = None if side.kv is None else {"scheme": KV_SCHEME, "symmetric": side.kv.symmetric}
    return {"kv_cache": kv, "side_tensors": SIDE_TENSORS if side.keys else None}


def side_tensors(side: Side) -> dict[str, Tensor]:
    """The tensors of the side file, by name. WorkFailed where one is not finite."""
    tensors = {}
    for layer, keys in enumerate(side.keys):
        for name, tensor in zip(key_names(layer), (keys.scale, keys.shift), strict=True):
            tensors[name] = finite(name, tensor.float())
    return tensors


def write_side_tensors(directory: Path, side: Side) -> None:
    """Write the side file, where there is something to write, into a directory that a
    `CheckpointWriter` makes durable and renames when it finishes."""
    if side.keys:
        (directory / SIDE_TENSORS).write_bytes(save(side_tensors(side), {"format": "pt"}))


def read_side(directory: Path, cfg: DecoderConfig) -> Side:
    """The KV cache's format of a checkpoint directory; `Side()` where nothing is said.

    Raises RequestError, naming file and key, where what is said cannot be run.
    """
    path = directory / SIDE_FILE
    if not path.is_file():
        return Side()
    found = read_side_file(directory)
    kv = _format(path, found.get("kv_cache"))
    name = found.get("side_tensors")
    if name is None:
        return Side(kv)
    if name != SIDE_TENSORS:
        raise RequestError(
            f"{path}: side_tensors is {reprlib.repr(name)}; only {SIDE_TENSORS!r} or null is read"
        )
    if kv is None:
        raise RequestError(
            f"{path}: side_tensors is {name!r}, but kv_cache is null: key scales are of "
            "a quantized KV cache only"
        )
    return Side(kv, _keys(directory / name, cfg))


def _format(path: Path, found: Any) -> KVFormat | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise RequestError(f"{path}: kv_cache is {reprlib.repr(found)}, not an object or null")
    if unknown := sorted(set(found) - {"scheme", "symmetric"}):
        raise RequestError(
            f"{path}: kv_cache has the key {unknown[0]!r:.80}; known: scheme, symmetric"
        )
    if (scheme := found.get("scheme")) != KV_SCHEME:
        raise RequestError(
            f"{path}: kv_cache.scheme is {reprlib.repr(scheme)}; only {KV_SCHEME!r} is supported"
        )
    symmetric = found.get("symmetric", False)
    if not isinstance(symmetric, bool):
        raise RequestError(
            f"{path}: kv_cache.symmetric is {reprlib.repr(symmetric)}; it must be true or false"
        )
    return KVFormat(symmetric=symmetric)


def _keys(path: Path, cfg: DecoderConfig) -> tuple[KeyTransform, ...]:
    if not path.is_file():
        raise RequestError(
            f"{path.parent / SIDE_FILE}: side_tensors names {path.name!r}, which is not there; "
            "copy it beside the weights: the KV cache is quantized with it"
        )
    header = read_header(path)
    names = [key_names(layer) for layer in range(cfg.num_layers)]
    if unknown := sorted(set(header.tensors) - {name for pair in names for name in pair}):
        raise RequestError(
            f"{path} holds tensor {unknown[0]}, which a model of {cfg.num_layers} layers has not; "
            "the two do not belong together"
        )
    shape = (cfg.num_kv_heads, cfg.head_dim)
    keys = []
    for pair in names:
        scale, shift = (_read(header, name, shape) for name in pair)
        if bool((scale == 0).any()):
            raise RequestError(
                f"{path}: tensor {pair[0]} holds 0; queries are divided by it, so it must not"
            )
        keys.append(KeyTransform(scale, shift))
    return tuple(keys)


def _read(header: Header, name: str, shape: tuple[int, int]) -> Tensor:
    """A finite F32 tensor of that shape, or RequestError."""
    if name not in header.tensors:
        raise RequestError(f"{header.path} has no tensor {name} (expected F32 {list(shape)})")
    info = header.tensors[name]
    if (info.dtype, info.shape) != ("F32", shape):
        raise RequestError(
            f"{header.path}: tensor {name} is {info.dtype} {list(info.shape)}, but config.json "
            f"makes it F32 {list(shape)} (KV heads, head_dim)"
        )
    tensor = read_tensor(header, name, info.start, info.stop, info.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise RequestError(f"{header.path}: tensor {name} holds NaN or Inf; it must be finite")
    return tensor
