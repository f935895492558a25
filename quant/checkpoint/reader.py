"""Tensors of a Hugging Face directory, by name, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.architectures import EMBEDDING, LM_HEAD, DecoderConfig, block_prefix
from quant.checkpoint.source import check_directory, read_json
from quant.errors import RequestError

FLOAT_BITS = {"BF16": 16.0, "F16": 16.0, "F32": 32.0}


class CheckpointReader:
    """A directory of safetensors files as a mapping from names to tensors.

    Files stay open (memory-mapped); a tensor occupies memory from `read` on. The index file, where
    there is one, says which file holds what; otherwise the files' own headers do.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig

        self.directory = directory
        self.raw_config: dict[str, Any] = check_directory(directory)
        try:
            self.hf_config = AutoConfig.from_pretrained(
                directory, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # a config class may raise anything over a bad value
            raise RequestError(f"{directory / 'config.json'}: {error}") from error
        self.config = DecoderConfig.from_hf(self.hf_config)
        self._files: dict[str, Any] = {}
        self._where = self._locate()

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' terms, e.g. "BF16"."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name, in its own dtype or in the one asked for."""
        try:
            tensor: Tensor = self._file(name).get_tensor(name)
        except SafetensorError as error:
            raise RequestError(f"{self._where[name]}: tensor {name}: {error}") from error
        return tensor if dtype is None else tensor.to(dtype)

    def read_block(self, layer: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of one block by their names inside the block, as stored."""
        prefix = block_prefix(layer)
        return {name: self.read(prefix + name) for name in names}

    def check_dense(self) -> None:
        """RequestError where the directory is not the unquantized decoder its config describes."""
        if method := (self.raw_config.get("quantization_config") or {}).get("quant_method"):
            raise RequestError(
                f"{self.directory} is already quantized ({method}); give the original checkpoint"
            )
        expected: dict[str, tuple[int, ...]] = dict(self.config.outer_shapes())
        for layer in range(self.config.num_layers):
            for name, shape in self.config.block_shapes().items():
                expected[block_prefix(layer) + name] = shape
        self.check_shapes(expected)
        self.check_tied()
        for name in expected:
            dtype = self.dtype(name)
            if dtype not in FLOAT_BITS:
                raise RequestError(
                    f"{self._where[name]}: tensor {name} has type {dtype}; "
                    f"supported: {', '.join(FLOAT_BITS)}"
                )

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """RequestError naming the first tensor that is missing or has another shape."""
        for name, shape in expected.items():
            if name not in self._where:
                raise RequestError(
                    f"{self.directory} has no tensor {name} (expected {list(shape)})"
                )
            if (found := self.shape(name)) != shape:
                raise RequestError(
                    f"{self._where[name]}: tensor {name} is {list(found)}, "
                    f"but config.json makes it {list(shape)}"
                )

    def check_tied(self) -> None:
        """RequestError where the embedding is tied but an lm_head of its own is stored."""
        name = f"{LM_HEAD}.weight"
        if not self.config.tie_word_embeddings or name not in self._where:
            return
        if not torch.equal(self.read(name), self.read(f"{EMBEDDING}.weight")):
            raise RequestError(
                f"{self._where[name]}: {name} differs from the embedding, but config.json says "
                "tie_word_embeddings: true; set it to false, or remove the tensor"
            )

    def size_bytes(self) -> int:
        """Bytes of the safetensors files on disk."""
        return sum(path.stat().st_size for path in set(self._where.values()))

    def _locate(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise RequestError(f"{index} has no 'weight_map'")
            return {name: self._inside(index, str(file)) for name, file in weight_map.items()}
        # Without an index only the one file that every reader agrees on counts.
        path = self.directory / "model.safetensors"
        if not path.is_file():
            raise RequestError(
                f"{self.directory} has neither model.safetensors nor {index.name}: "
                "other *.safetensors files are not read without an index"
            )
        return dict.fromkeys(self._open(path).keys(), path)

    def _inside(self, index: Path, file: str) -> Path:
        path = self.directory / file
        if Path(file).name != file:
            raise RequestError(f"{index} points outside its directory: {file!r}")
        if not path.is_file():
            raise RequestError(f"{index} names {file!r}, which is not there")
        return path

    def _file(self, name: str) -> Any:
        if name not in self._where:
            raise RequestError(f"{self.directory} has no tensor {name}")
        return self._open(self._where[name])

    def _slice(self, name: str) -> Any:
        try:
            return self._file(name).get_slice(name)
        except SafetensorError as error:
            raise RequestError(f"{self._where[name]}: tensor {name}: {error}") from error

    def _open(self, path: Path) -> Any:
        if path.name not in self._files:
            try:
                self._files[path.name] = safe_open(path, framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise RequestError(f"{path} is not a readable safetensors file: {error}") from error
        return self._files[path.name]


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; RequestError where there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds over missing or broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"{directory}: its tokenizer does not load: {reason}") from error
