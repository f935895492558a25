"""The generation benchmark's arithmetic, and a run of it on a tiny model."""

import argparse
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from benchmarks import generation
from benchmarks.generation import Cell, markdown, measure, prompts

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"


def test_prompts_are_the_same_for_every_engine():
    assert prompts(3, 7) == prompts(3, 7)
    assert [len(row) for row in prompts(3, 7)] == [7, 7, 7]
    assert len({tuple(row) for row in prompts(3, 7)}) == 3


def test_seconds_are_split_in_the_first_token_and_the_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def generate(given, count):
        now[0] += 2.0 + 0.25 * (count - 1)
        return [[5] * count for _ in given]

    cell = measure("fourbyeight", generate, 4, 8, 11, 3, "cpu")
    assert cell.ttft == pytest.approx(2.0)
    assert cell.tpot == pytest.approx(0.25)
    assert cell.tokens_per_second == pytest.approx(16.0)


def test_an_engine_that_stops_early_is_no_measurement():
    with pytest.raises(SystemExit, match=r"gave \[1, 1\] tokens, not 4"):
        measure("transformers", lambda given, count: [[5] for _ in given], 2, 8, 4, 1, "cpu")


def test_ratios_are_transformers_over_the_row():
    shared = {"batch": 2, "prompt": 8, "peak_memory_bytes": 10**9, "peak_device_bytes": None}
    table = markdown(
        [
            Cell("transformers", ttft=0.3, tpot=0.02, tokens_per_second=100, **shared),
            Cell("fourbyeight", ttft=0.1, tpot=0.04, tokens_per_second=50, **shared),
        ]
    ).splitlines()
    assert table[2] == "| fourbyeight | 2 | 8 | 100.0 | 3.00 | 40.00 | 0.50 | 50.0 | 1.00 GB |"
    assert table[3] == "| transformers | 2 | 8 | 300.0 |  | 20.00 |  | 100.0 | 1.00 GB |"


def test_the_command_on_a_tiny_model(quantized_case, tmp_path):
    case, figures = quantized_case("int8-64"), tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), str(case.output), "--baseline", str(case.source)]
    command += ["--batch", "1", "2", "--prompt", "5", "--tokens", "3", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(figures.read_text())["cells"]
    assert [(cell["engine"], cell["batch"]) for cell in cells] == [
        (engine, batch) for engine in ("fourbyeight", "transformers") for batch in (1, 2)
    ]
    assert all(cell["ttft"] > 0 and cell["peak_memory_bytes"] > 10**8 for cell in cells)


def test_a_random_model_of_a_shape_runs(tiny_checkpoint, tmp_path):
    config, figures = tiny_checkpoint("llama-gqa3") / "config.json", tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--random", str(config), "--group-size", "64"]
    command += ["--dense", "--batch", "2", "--prompt", "70", "--tokens", "3", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--max-num-batched-tokens", "32", "--device", "cpu", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(figures.read_text())["cells"]
    assert [cell["engine"] for cell in cells] == [
        "fourbyeight", "fourbyeight dense", "transformers",
    ]  # fmt: skip


def test_configs_are_the_shapes_that_they_are_named_for():
    from benchmarks.random_model import read_config
    from benchmarks.shapes import MODELS

    cfg = read_config(SCRIPT.parent / "configs" / "llama-3-8b.json")
    shape = next(model for model in MODELS if model.name == "Llama-3-8B")
    assert (cfg.hidden_size, cfg.intermediate_size) == (shape.hidden, shape.intermediate)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (32, 8, 128)
    assert round(cfg.num_layers * cfg.block_elements() / 1e9, 1) == 7.0
    large = read_config(SCRIPT.parent / "configs" / "llama-3-70b.json")
    assert round(large.num_layers * large.block_elements() / 1e9, 1) == 68.5


def test_graphs_that_change_tokens_are_told(monkeypatch):
    args = argparse.Namespace(tokens=4)
    given = {False: [[1, 2, 3, 4], [5, 6, 7, 8]], True: [[1, 2, 3, 4], [5, 6, 7, 8]]}

    def engine(args, model, batch, length, eager=False):
        return lambda prompts, count: given[eager]

    monkeypatch.setattr(generation, "our_engine", engine)
    generation.check_graphs(args, None, 2, 8)
    given[True] = [[1, 2, 3, 4], [5, 6, 0, 8]]
    with pytest.raises(SystemExit, match=r"tokens of sequences \[1\] of 2"):
        generation.check_graphs(args, None, 2, 8)


def test_a_cells_cache_is_gone_before_the_next_is_made(monkeypatch):
    # A cache refers to itself here, as recorded steps may: only the collector ends it.
    held = weakref.WeakSet()

    class Cache:
        def __init__(self):
            self.itself = self

    def engine(args, model, batch, length):
        assert len(held) == 0
        cache = Cache()
        held.add(cache)
        return lambda prompts, count, cache=cache: [[1] * count for _ in prompts]

    monkeypatch.setattr(generation, "our_engine", engine)
    monkeypatch.setattr(generation, "our_model", lambda *_: None)
    monkeypatch.setattr(generation, "check_graphs", lambda *_: None)
    args = argparse.Namespace(
        engine="fourbyeight", batch=[1, 2], prompt=[4, 8], tokens=3, repeats=1, device="cpu"
    )
    assert len(generation._work(args)) == 4
