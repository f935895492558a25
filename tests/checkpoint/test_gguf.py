"""GGUF files: what is refused, by name, and that the cache is left alone by a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quant.checkpoint.gguf import convert_gguf
from quant.checkpoint.reader import load_tokenizer
from quant.checkpoint.source import resolve_model
from quant.errors import RequestError


def write_gguf(path: Path, architecture: str, *, tensor: str = "token_embd.weight") -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(RequestError, match=r"model\.gguf is not a GGUF file"):
        resolve_model(str(path))
    with pytest.raises(RequestError, match="no such file"):
        resolve_model(str(tmp_path / "absent.gguf"))


def test_a_truncated_header(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RequestError, match="not a readable GGUF file"):
        convert_gguf(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "mamba")
    with pytest.raises(RequestError, match=r"'mamba'.*llama, mistral, qwen2, qwen3"):
        convert_gguf(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_rotary_scaling_that_transformers_would_drop(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", "llama", tensor="rope_freqs.weight")
    with pytest.raises(RequestError, match=r"rotary scaling \(rope_freqs\.weight\)"):
        convert_gguf(path, tmp_path / "cache")


@pytest.mark.slow
def test_smollm2_is_converted_once_and_splits_digits(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    # Its pre-tokenizer takes digits one by one, which the GGUF only says by the name "smollm".
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    changed = (smollm2 / "model.safetensors").stat().st_mtime_ns
    from quant.demo import fetch_demo_model

    assert fetch_demo_model() == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == changed
