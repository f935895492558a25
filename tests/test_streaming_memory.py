"""Memory of a run: that of one block, whatever the model's size. Blocks as in Llama 3.2 3B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.streaming import LENGTH, interpreter_bytes, run_under_limit
from benchmarks.synthetic import Shape, write_checkpoint, write_tokens

SAMPLES = 16
# Address space: the interpreter takes 0.6 GB of it, and threads and the allocator reserve more.
LIMIT = 3 * 10**9


def quantized(directory: Path, layers: int) -> dict[str, Any]:
    directory.mkdir()
    shape = Shape(hidden=3072, intermediate=8192, heads=24, kv_heads=8, layers=layers)
    write_checkpoint(shape, directory / "model")
    write_tokens(directory / "tokens.npy", SAMPLES * LENGTH)
    model, tokens = directory / "model", directory / "tokens.npy"
    return run_under_limit(directory, model, tokens, SAMPLES, LIMIT, "cpu")


@pytest.mark.slow
def test_memory_is_that_of_one_block_however_many_there_are(tmp_path: Path) -> None:
    _, interpreter = interpreter_bytes()
    few, many = quantized(tmp_path / "few", 1), quantized(tmp_path / "many", 4)
    for figures in (few, many):
        weights = figures["block_bytes"] + figures["activation_bytes"]
        assert figures["block_bytes"] == 4 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192) + (
            4 * 2 * 3072
        )
        assert figures["activation_bytes"] == SAMPLES * LENGTH * (4 * 3072 + 8192 + 4)
        assert figures["peak_memory_bytes"] <= 1.5 * weights + interpreter
    assert many["source_size_bytes"] > 1e9
    assert many["peak_memory_bytes"] <= 1.03 * few["peak_memory_bytes"]
