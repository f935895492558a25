"""GGUF files: converted once into a Hugging Face directory, which everything else reads.

transformers reads and dequantizes the file; the weights are kept in BF16.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from quant.architectures import check_model_type
from quant.checkpoint.writer import make_readable
from quant.errors import RequestError

# Goes up with every change to what a conversion gives, so that old ones are not taken from a cache.
CONVERSION = 1
# GGUF names a byte-pair tokenizer's pre-tokenizer in `tokenizer.ggml.pre`. Of this one transformers
# rebuilds only the byte-level part; the original also splits digits one by one.
SPLITS_DIGITS = {"smollm"}


def convert_gguf(path: Path, cache: Path) -> Path:
    """The HF directory made from a GGUF file, from the cache where it was made before.

    Raises RequestError where the file is not GGUF or its architecture is not supported.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RequestError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    directory = cache / f"{path.stem}-{digest[:16]}-v{CONVERSION}"
    if (directory / "config.json").is_file():
        return directory
    architecture, pre_tokenizer = _metadata(path)
    check_model_type(architecture)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".convert-", dir=cache))
    try:
        _convert(path, partial, pre_tokenizer)
        os.replace(partial, directory)
    except OSError:
        if not (directory / "config.json").is_file():  # else another process made it first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _metadata(path: Path) -> tuple[str, str | None]:
    """(general.architecture, tokenizer.ggml.pre) of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields, tensors = reader.fields, {tensor.name for tensor in reader.tensors}
    except Exception as error:  # the reader raises whatever a broken header leads it to
        raise RequestError(f"{path} is not a readable GGUF file: {error}") from error
    if "general.architecture" not in fields:
        raise RequestError(f"{path} has no 'general.architecture'")
    architecture = str(fields["general.architecture"].contents())
    scaling = fields.get(f"{architecture}.rope.scaling.type")
    window = fields.get(f"{architecture}.attention.sliding_window")
    for found, what in (
        ("rope_freqs.weight" in tensors, "rotary scaling (rope_freqs.weight)"),
        (scaling is not None and scaling.contents() != "none", "rotary scaling"),
        (window is not None, "a sliding window"),
    ):
        if found:
            raise RequestError(
                f"{path} has {what}, which transformers does not read from GGUF files; "
                "give the model's safetensors directory or hub id"
            )
    pre = fields.get("tokenizer.ggml.pre")
    return architecture, pre and str(pre.contents())


def _convert(path: Path, directory: Path, pre_tokenizer: str | None) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **source)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.update(architectures=[type(model).__name__], dtype="bfloat16")
    tokenizer.save_pretrained(directory)
    if pre_tokenizer in SPLITS_DIGITS:
        _split_digits(directory / "tokenizer.json")
    make_readable(directory)
    # Last, because its presence says that the conversion is complete.
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _split_digits(tokenizer_json: Path) -> None:
    tokenizer = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    byte_level = tokenizer["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    tokenizer_json.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
