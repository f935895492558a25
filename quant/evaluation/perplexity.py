"""Perplexity over non-overlapping windows.

The stream is cut into windows of `window` tokens. Inside a window every token but the first is
predicted from those before it, and

    perplexity = exp( - mean over all predicted tokens of log p(token | tokens before it) )

No token is added (no BOS); an incomplete last window is dropped. The model runs as stored: packed
weights, quantized activations.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.architectures import check_length
from quant.calibration.data import load_tokens
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.checkpoint.source import resolve_model
from quant.device import select_device, select_dtype
from quant.errors import RequestError, WorkFailed
from quant.memory import peak_memory_bytes, reset_peak_memory
from quant.report import OnProgress, Progress, ignore_progress
from quant.runtime.batch import Chunk, in_order, make_batch, pages_needed
from quant.runtime.model import Model, load_model

# Rows of logits computed together: 512 x 128k vocabulary x FP32 is 0.26 GB.
LOGIT_ROWS = 512


@dataclass(frozen=True)
class Perplexity:
    """perplexity over `tokens` predicted tokens in `windows` windows of `window` tokens."""

    perplexity: float
    tokens: int
    windows: int
    window: int
    seconds: float
    peak_memory_bytes: int


@torch.inference_mode()
def perplexity(
    model: Model,
    tokens: Tensor,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Perplexity:
    """Perplexity of a token stream [T]; the first max_windows windows of it, or all.

    Raises RequestError where there is not one full window, WorkFailed where the loss is not finite.
    """
    started = time.perf_counter()
    count = check_windows(len(tokens), window, max_windows)
    loss = 0.0
    for i in range(count):
        on_progress(Progress("perplexity", i, count))
        ids = tokens[i * window : (i + 1) * window]
        (hidden,) = hidden_states(model, [ids.tolist()])
        loss += _negative_log_likelihood(model, hidden[:-1], ids[1:].to(model.device))
    on_progress(Progress("perplexity", count, count))
    predicted = count * (window - 1)
    if not math.isfinite(loss):
        raise WorkFailed(f"the loss is {loss} after {predicted:,} tokens: the model is broken")
    return Perplexity(
        perplexity=math.exp(loss / predicted),
        tokens=predicted,
        windows=count,
        window=window,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def hidden_states(model: Model, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The last block's output for every token of whole sequences, [S, H] each.

    By the runtime's own prefill, all of them packed into one, over a cache of their own.
    """
    counts = [pages_needed(len(tokens)) for tokens in sequences]
    firsts = itertools.accumulate(counts, initial=0)
    chunks = [
        Chunk(tokens, 0, range(first, first + count))
        for tokens, first, count in zip(sequences, firsts, counts, strict=False)
    ]
    order = in_order(chunks)
    cache = model.new_cache(sum(counts), max(map(len, sequences)))
    batch = make_batch([chunks[i] for i in order], model.device)
    parts = model.forward(batch, cache).split(list(batch.chunk_lengths))
    found = dict(zip(order, parts, strict=True))
    return [found[i] for i in range(len(sequences))]


def evaluate_perplexity(
    model: str,
    dataset: str = "builtin",
    *,
    window: int = 2048,
    max_windows: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Perplexity:
    """Perplexity of MODEL (anything that `LLM` loads) on a dataset (see `calibration/data.py`).

    "builtin" is the part of the built-in text that calibration does not see.
    """
    reset_peak_memory()
    kept_dtype, target = select_dtype(dtype), select_device(device)
    directory = resolve_model(model, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    part = "builtin:evaluation" if dataset == "builtin" else dataset
    enough = None if max_windows is None else max_windows * window
    tokens = load_tokens(part, tokenizer, reader.config.vocab_size, enough)
    check_windows(len(tokens), window, max_windows)
    check_length(window, reader.config)
    decoder = load_model(
        directory, device=target, dtype=kept_dtype, trust_remote_code=trust_remote_code
    )
    return perplexity(
        decoder, tokens, window=window, max_windows=max_windows, on_progress=on_progress
    )


def check_windows(tokens: int, window: int, max_windows: int | None) -> int:
    """How many windows are measured; RequestError where there is none."""
    if window < 2:
        raise RequestError(f"the window is {window} tokens; it must be at least 2")
    if max_windows is not None and max_windows < 1:
        raise RequestError(f"the number of windows is {max_windows}; it must be at least 1")
    if tokens < window:
        raise RequestError(
            f"the dataset has {tokens:,} tokens, less than one window of {window:,}; "
            "use a smaller --max-seq-length or more text"
        )
    return min(tokens // window, max_windows or tokens // window)


def _negative_log_likelihood(model: Model, hidden: Tensor, targets: Tensor) -> float:
    """hidden [S, H], targets [S] -> summed over S."""
    total = 0.0
    for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        total += float(F.cross_entropy(model.logits(rows).float(), wanted, reduction="sum"))
    return total
