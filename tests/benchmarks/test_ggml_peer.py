"""ggml computes what the benchmark says it does: Q4_0 and Q4_K weights by INT8 activations.

gguf's reader of the formats is the reference. The input's INT8 codes are known and their scales are
powers of two, so that what remains is the rounding of FP32 sums.
"""

import importlib.util

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from benchmarks import ggml_peer

N, K, COUNT = 96, 768, 3
installed = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"
)


def int8(x: np.ndarray, block: int) -> np.ndarray:
    """Rounded to a 127th of the largest in a block."""
    blocks = x.reshape(len(x), -1, block).astype(np.float64)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


@installed
@pytest.mark.parametrize("without", [(), ("AMX",), ("AMX", "CPU_REPACK")])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
@pytest.mark.parametrize("m", [1, 4, 33])
def test_every_product_is_that_of_the_dequantized_weight_and_int8_activations(
    m: int, kind: str, without: tuple[str, ...]
):
    work = ggml_peer.Work(kind, m, N, K, COUNT, threads=2, without=without)
    peer = ggml_peer.start(work)
    assert peer.buffer not in without
    x, form = ggml_peer.random_input(work), GGMLQuantizationType[kind]
    rounded = int8(x, GGML_QUANT_SIZES[form][0])
    assert np.linalg.norm(rounded - x) > 0.003 * np.linalg.norm(x)
    weights = list(ggml_peer.random_weights(work))
    outputs = peer.outputs()
    assert len(outputs) == len(weights) == COUNT
    for weight, out in zip(weights, outputs, strict=True):
        expected = rounded @ dequantize(weight, form).T.astype(np.float64)
        assert np.linalg.norm(out - expected) < 2e-6 * np.linalg.norm(expected)


@installed
def test_outputs_are_not_numbers_before_a_run():
    peer = ggml_peer.Peer(ggml_peer.Work("Q4_0", 4, N, K, COUNT, threads=1))
    assert np.isnan(peer.outputs()).all()


@installed
def test_a_buffer_type_that_ends_the_process_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    run = ggml_peer.Peer.run

    def fragile(peer: ggml_peer.Peer) -> None:
        if peer.buffer != "CPU":
            peer._process.kill()
        run(peer)

    monkeypatch.setattr(ggml_peer.Peer, "run", fragile)
    assert ggml_peer.start(ggml_peer.Work("Q4_0", 1, N, K, 1, threads=1)).buffer == "CPU"


@installed
def test_the_process_ends_with_the_peer():
    peer = ggml_peer.Peer(ggml_peer.Work("Q4_0", 1, N, K, 1, threads=1))
    process = peer._process
    assert process.poll() is None
    del peer
    assert process.wait(10) == 0


def test_without_the_package_the_benchmark_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install llama-cpp-python"):
        ggml_peer.start(ggml_peer.Work("Q4_0", 1, N, K, 1, threads=1))
