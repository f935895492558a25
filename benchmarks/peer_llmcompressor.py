"""Quantize a model with llm-compressor, on the tokens that `quantize run` would see.

llm-compressor pins versions of transformers and compressed-tensors that this project does not, so
it lives in an environment of its own, which then has all that this script imports of this project:

    python3 -m venv peer && peer/bin/pip install llmcompressor
    peer/bin/python benchmarks/peer_llmcompressor.py MODEL -o OUT --format w4a8 --method best \\
        --dataset valid.txt --evaluate test.txt --json figures.json

Formats: w4a8 and w4afp8 (group 64), w4a8-channel. Methods, each with sequential GPTQ, static
activation order and damping 0.01:

    gptq    nothing else
    smooth  SmoothQuant 0.5 before it
    best    SmoothQuant 0.5, and scales searched by the activation-weighted observer (imatrix_mse)

OUT holds the weights after quantization as dense BF16, which every loader reads. `quantize eval
OUT` measures them with activations in 16 bits. --evaluate measures the model as llm-compressor
means it to run, activations quantized per token, over the windows of `quantize eval` and with its
formula: that is the figure to compare with a checkpoint of `quantize run`.

The figures, on the screen and as --json: wall seconds of quantizing (the model loaded before), peak
resident bytes of this process, versions, and the perplexity on each text of --evaluate.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also with nothing installed

from quant.calibration.data import calibration_windows, load_tokens  # noqa: E402
from quant.evaluation.perplexity import LOGIT_ROWS, check_windows  # noqa: E402
from quant.memory import peak_memory_bytes, reset_peak_memory  # noqa: E402

FORMATS = {"w4a8": ("int", 64), "w4afp8": ("float", 64), "w4a8-channel": ("int", None)}
METHODS = ("gptq", "smooth", "best")
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja")


def quantization_scheme(activations: str, group: int | None, observer: str | None) -> Any:
    """compressed-tensors' description of the format, for all linears."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
    }
    if observer is not None:
        weights["observer"] = observer
    inputs = {
        "num_bits": 8,
        "type": activations,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
        "observer": None,
    }
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs),
    )


def modifiers(fmt: str, method: str) -> list[Any]:
    """llm-compressor's recipe."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    observer = "imatrix_mse" if method == "best" else None
    gptq = GPTQModifier(
        config_groups={"group_0": quantization_scheme(*FORMATS[fmt], observer)},
        ignore=["lm_head"],
        actorder="static",
        dampening_frac=0.01,
    )
    return [gptq] if method == "gptq" else [SmoothQuantModifier(smoothing_strength=0.5), gptq]


def quantize(model: Any, windows: torch.Tensor, fmt: str, method: str) -> None:
    """Quantize the model in place, on windows [n, S]."""
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows.tolist()]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifiers(fmt, method),
        num_calibration_samples=len(rows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor, window: int, max_windows: int | None) -> float:
    """As `quant.evaluation.perplexity`, of a transformers model; tokens [T]."""
    count, loss = check_windows(len(tokens), window, max_windows), 0.0
    for ids in tokens[: count * window].view(count, window):
        logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        parts = zip(logits.split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True)
        loss += sum(float(F.cross_entropy(p.float(), t, reduction="sum")) for p, t in parts)
    return math.exp(loss / (count * (window - 1)))


def save_dense(model: Any, source: Path, output: Path) -> None:
    """The quantized weights as a plain BF16 checkpoint, with the source's tokenizer."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            args = scheme.weights
            weights[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", args)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    wanted = plain.state_dict().keys()
    missing, _ = plain.load_state_dict(
        {k: weights[k] for k in wanted if k in weights}, strict=False
    )
    if missing and not (plain.config.tie_word_embeddings and missing == ["lm_head.weight"]):
        raise SystemExit(
            f"llm-compressor's model has no {missing[0]}: another layout than expected"
        )
    plain.to(torch.bfloat16).save_pretrained(output)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            shutil.copy(path, output / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory, dense")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--format", choices=FORMATS, default="w4a8")
    parser.add_argument("--method", choices=METHODS, default="best")
    parser.add_argument("--dataset", default="builtin:calibration", help="as of quantize run")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="which windows; as of quantize run")
    parser.add_argument(
        "--evaluate",
        metavar="DATASET",
        action="append",
        default=[],
        help="for perplexity, as of quantize eval; repeatable",
    )
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--max-windows", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; give a new directory or remove it first")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    vocabulary = model.config.vocab_size
    tokens = load_tokens(args.dataset, tokenizer, vocabulary)
    samples, length = args.num_calibration_samples, args.max_seq_length
    windows = calibration_windows(tokens, samples, length, args.seed)
    reset_peak_memory()
    started = time.perf_counter()
    quantize(model, windows, args.format, args.method)
    figures: dict[str, Any] = {
        "peer": "llm-compressor",
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
        | {"transformers": version("transformers"), "torch": torch.__version__},
        "format": args.format,
        "method": args.method,
        "dataset": args.dataset,
        "num_calibration_samples": samples,
        "max_seq_length": length,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    save_dense(model, args.model, args.output)
    np.save(args.output / "calibration_windows.npy", windows.numpy())  # [n, S], as it was seen
    model.eval()
    found = {}
    for text in args.evaluate:
        stream = load_tokens(text, tokenizer, vocabulary)
        found[text] = perplexity(model, stream, args.window, args.max_windows)
    figures["perplexity"] = found
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
