"""Tensors of a Hugging Face directory, by name, one at a time.

What a directory says is checked before anything is allocated by it: config.json, the index, the
headers; then the names, types and shapes of the tensors against config.json (`check_dense`).
"""

from __future__ import annotations

import hashlib
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, LM_HEAD, DecoderConfig, block_prefix
from quant.checkpoint.headers import Header, TensorInfo, read_header
from quant.checkpoint.hf_config import decoder_config
from quant.checkpoint.source import check_directory, read_json
from quant.checkpoint.tensor_bytes import inspect_file, opened, read_tensor
from quant.errors import RequestError, WorkFailed

FLOAT_BITS = {"BF16": 16.0, "F16": 16.0, "F32": 32.0}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# 90,000 tensors, the most of any published model, take 10 MB.
MAX_INDEX_BYTES = 64 << 20

CHUNK_BYTES = 64 << 20
# One call of posix_fadvise reads no further than the device's readahead, 128 KiB by default: of
# 64 MiB asked for at once, 8 were there on a disk with a readahead of 8; in steps, all.
ADVISE_BYTES = 128 << 10


class CheckpointReader:
    """A directory of safetensors files as a mapping from names to tensors.

    The constructor checks config.json, the index and the headers of the files it names, and reads
    no tensor; a tensor occupies memory from `read` on. Without an index only model.safetensors
    counts. trust_remote_code is for the callers' symmetry with `load_tokenizer`: no code of a
    checkpoint's own runs here.

    Raises RequestError where the directory is not what it must be, and WorkFailed where a file is
    no longer what it was in the constructor.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self.raw_config: dict[str, Any] = check_directory(directory)
        self.config: DecoderConfig = decoder_config(self.raw_config, directory / "config.json")
        self._index: Path | None = directory / INDEX
        if not os.path.lexists(self._index):
            self._index = None
        self._shards: dict[str, Header] = {}
        self._where: dict[str, Header] = self._locate()

    @property
    def names(self) -> set[str]:
        return set(self._where)

    @property
    def files(self) -> list[Path]:
        """What the checkpoint consists of: config.json, the index if any, the weights by name."""
        first = [self.directory / "config.json", *([self._index] if self._index else [])]
        return first + [header.path for header in self._shards.values()]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> str:
        """The stored type in safetensors' terms, e.g. "BF16"."""
        return self._find(name)[1].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as stored."""
        info = self._find(name)[1]
        return info.stop - info.start

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name, in its own dtype or in the one asked for."""
        header, info = self._find(name)
        tensor = read_tensor(header, name, info.start, info.stop, info.shape)
        return tensor if dtype is None else tensor.to(dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[start, stop) of the tensor's first dimension, without the rest in memory."""
        header, info = self._find(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"rows {start}..{stop} of {name}, which is {list(info.shape)}")
        row_bytes = (info.stop - info.start) // max(info.shape[0], 1)
        first, last = info.start + start * row_bytes, info.start + stop * row_bytes
        return read_tensor(header, name, first, last, (stop - start, *info.shape[1:]))

    def chunks(self, name: str, max_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """The tensor as consecutive rows, as many at once as max_bytes hold, but at least one."""
        shape, size = self.shape(name), self.nbytes(name)
        if not shape or size <= max_bytes:
            yield self.read(name)
            return
        step = max(1, max_bytes * shape[0] // size)
        for start in range(0, shape[0], step):
            yield self.rows(name, start, min(start + step, shape[0]))

    def read_block(self, layer: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of one block by their names inside the block, as stored."""
        prefix = block_prefix(layer)
        return {name: self.read(prefix + name) for name in names}

    def will_need(self, names: Iterable[str]) -> None:
        """Have the kernel read these tensors ahead, into its own cache, while we do other things.

        A hint: where the platform has no such call, or the files have changed, nothing happens.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            header, info = self._find(name)
            try:
                with opened(header, name) as file:
                    for start in range(info.start, info.stop, ADVISE_BYTES):
                        size = min(ADVISE_BYTES, info.stop - start)
                        os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
            except (OSError, WorkFailed):
                return  # reading will say so

    def inspect_source(self, on_bytes: Callable[[int], None]) -> dict[str, str]:
        """Read every byte of `files` once; the sha256 of each, as hex, by file name.

        on_bytes: called with the bytes done since the last call. Takes INSPECT_BYTES of memory, a
        few times. Raises RequestError, naming the tensor and how many, where a tensor of
        BF16, F16 or F32 holds NaN or Inf.
        """
        digests = {}
        for path in self.files:
            header = self._shards.get(path.name)
            if header is not None:
                digests[path.name] = inspect_file(header, on_bytes)
                continue
            text = path.read_bytes()  # config.json or the index: it has been in memory before
            digests[path.name] = hashlib.sha256(text).hexdigest()
            on_bytes(len(text))
        return digests

    def check_dense(self) -> None:
        """RequestError where the directory is not the unquantized decoder its config describes."""
        if quantization := self.raw_config.get("quantization_config"):
            method = quantization.get("quant_method", "it has a quantization_config")
            raise RequestError(
                f"{self.directory} is already quantized ({method!s:.80}), says its config.json; "
                "give the original checkpoint"
            )
        # One by one and first to last: config.json may speak of far more layers than there are.
        for name, shape in self._expected():
            self._check_there(name, shape)
            self._check_float(name)
            self._check_shape(name, shape)
        self._check_nothing_else()
        self.check_tied()

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """RequestError naming the first tensor that is missing or has another shape."""
        for name, shape in expected.items():
            self._check_there(name, shape)
            self._check_shape(name, shape)

    def check_tied(self) -> None:
        """RequestError where the embedding is tied but an lm_head of its own is stored."""
        name, embedding = f"{LM_HEAD}.weight", f"{EMBEDDING}.weight"
        if not self.config.tie_word_embeddings or name not in self._where:
            return
        self._check_float(name)
        if not self._equal(name, embedding):
            raise RequestError(
                f"{self._where[name].path}: {name} differs from the embedding, but config.json "
                "says tie_word_embeddings: true; set it to false, or remove the tensor"
            )

    def size_bytes(self) -> int:
        """Bytes of the safetensors files on disk."""
        return sum(header.size for header in self._shards.values())

    def _expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from self.config.outer_shapes().items()
        block = self.config.block_shapes()
        for layer in range(self.config.num_layers):
            for name, shape in block.items():
                yield block_prefix(layer) + name, shape

    def _check_there(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._where:
            raise RequestError(
                f"{self._index or self.directory / SINGLE} has no tensor {name} (expected "
                f"{list(shape)} by config.json)"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if (found := self.shape(name)) != shape:
            raise RequestError(
                f"{self._where[name].path}: tensor {name} is {list(found)}, "
                f"but config.json makes it {list(shape)}"
            )

    def _check_float(self, name: str) -> None:
        if (dtype := self.dtype(name)) in FLOAT_BITS:
            return
        if dtype == "F64":
            advice = "convert it to F32"
        elif dtype.startswith("F"):
            advice = f"FP{dtype[1]} weights are not read; give the BF16 checkpoint"
        else:
            advice = "it is already quantized, or no decoder; give the original checkpoint"
        raise RequestError(
            f"{self._where[name].path}: tensor {name} has type {dtype}; supported: "
            f"{', '.join(FLOAT_BITS)}; {advice}"
        )

    def _check_nothing_else(self) -> None:
        """RequestError where tensors would be lost, because the decoder does not know them."""
        expected = {name for name, _ in self._expected()}
        lost = sorted(
            name
            for name in self.names - expected
            if not _is_derived(name)
            and not (name == f"{LM_HEAD}.weight" and self.config.tie_word_embeddings)
        )
        if lost:
            more = f" and {len(lost) - 3:,} more" if len(lost) > 3 else ""
            raise RequestError(
                f"{self._where[lost[0]].path} holds tensors that config.json does not describe and "
                f"that would be lost: {', '.join(lost[:3])}{more}. Correct config.json (its number "
                "of layers, its biases), or remove them"
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; in the memory of two chunks."""
        if self.shape(one) != self.shape(other):
            return False
        start = 0
        for part in self.chunks(one):
            counterpart = self.rows(other, start, start + len(part))
            start += len(part)
            if part.dtype != counterpart.dtype:  # float() is exact for all types of weights
                part, counterpart = part.float(), counterpart.float()
            if not torch.equal(part, counterpart):
                return False
        return True

    def _locate(self) -> dict[str, Header]:
        """Every tensor's file. Fills _shards: the headers by file name, in the names' order."""
        if self._index is None:
            # Without an index only the one file that every reader agrees on counts.
            path = self.directory / SINGLE
            if not path.is_file():
                raise RequestError(
                    f"{self.directory} has neither {SINGLE} nor {INDEX}: "
                    "other *.safetensors files are not read without an index"
                )
            self._shards = {SINGLE: read_header(path)}
            return dict.fromkeys(self._shards[SINGLE].tensors, self._shards[SINGLE])
        weight_map = _weight_map(self._index)
        self._shards = {
            file: read_header(self.directory / file) for file in sorted(set(weight_map.values()))
        }
        for name, file in weight_map.items():
            if name not in self._shards[file].tensors:
                raise RequestError(
                    f"{self.directory / file} has no tensor {name!r:.300}, but {self._index} says "
                    "so; the two do not belong together: download both again"
                )
        for file, header in self._shards.items():
            for name in header.tensors:
                if (listed := weight_map.get(name)) == file or (not listed and _is_derived(name)):
                    continue
                where = f"looks for it in {listed!r}" if listed else "does not list it"
                raise RequestError(
                    f"{header.path} holds tensor {name}, but {self._index} {where}; "
                    "the two do not belong together: download both again"
                )
        return {name: self._shards[file] for name, file in weight_map.items()}

    def _find(self, name: str) -> tuple[Header, TensorInfo]:
        if name not in self._where:
            raise RequestError(f"{self._index or self.directory / SINGLE} has no tensor {name}")
        header = self._where[name]
        return header, header.tensors[name]


def _is_derived(name: str) -> bool:
    """Whether a tensor only repeats what config.json says; old checkpoints store such ones."""
    return name.endswith(".rotary_emb.inv_freq")


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map of tensors to files, all of them regular files in its directory.

    A file may be a link, as in the hub's cache; its name may not be a path.
    """
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise RequestError(f"{index} has no 'weight_map' object")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise RequestError(f"{index}: weight_map has {reprlib.repr(file)} for {name!r:.300}")
    for file in sorted(set(weight_map.values())):
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise RequestError(f"{index} points outside its directory: {file!r:.300}")
        if not file.endswith(".safetensors"):
            raise RequestError(f"{index} names {file!r:.300}, which is no *.safetensors file")
        if not os.path.isfile(index.parent / file):  # unlike Path's, False for impossible names
            raise RequestError(f"{index} names {file!r:.300}, which is not there")
    return weight_map


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; RequestError where there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds over missing or broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"{directory}: its tokenizer does not load: {reason}") from error


def end_of_sequence_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: generation_config.json's, config.json's and the tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = read_json(directory / name).get("eos_token_id")
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return frozenset(found)
