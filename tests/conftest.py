"""Tiny checkpoints of every architecture, a byte-level tokenizer, and what was made from them."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Triton decides when it is imported whether its kernels are interpreted, as they are in the tests.
os.environ["TRITON_INTERPRET"] = "1"

# A shell without job control lets what it runs in the background ignore Ctrl-C, and processes
# inherit that; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from torch import Tensor

from quant.calibration.quantize import quantize
from quant.report import RunReport
from quant_kernels import reference

ROOT = Path(__file__).parents[1]

SPECIAL_TOKENS = ("<|begin|>", "<|end|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)

# Hidden 128, intermediate 256, head_dim 32: multiples of every group size. Weights are large
# enough for logits of order one, so that an absolute tolerance means something.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@dataclass(frozen=True)
class Kind:
    """A checkpoint that transformers makes: model_type, what differs from SMALL, shard size."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"


KINDS = {
    "llama": Kind("llama"),
    "llama-biases": Kind("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": Kind("llama", {"tie_word_embeddings": True}),
    "llama-mha": Kind("llama", {"num_key_value_heads": 4}),
    # Three query heads share a KV head, and the residual stream's width is no power of two.
    "llama-gqa3": Kind(
        "llama", {"hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 4}
    ),
    "llama-linear-rope": Kind(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "llama-llama3-rope": Kind(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    # The windows and the original length below are shorter than every sequence in the tests.
    "llama-yarn-rope": Kind(
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": Kind("mistral", {"sliding_window": 12}),
    "qwen2": Kind("qwen2", max_shard_size="300KB"),
    "qwen2-windows": Kind(
        "qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    ),
    # head_dim is not hidden / heads, and eight query heads share a KV head.
    "qwen3": Kind("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
}


@dataclass(frozen=True)
class Case:
    """A quantization of a tiny checkpoint: which one, and the recipe's overrides."""

    kind: str
    overrides: dict[str, Any]


DOWN_OF_LAYER_1 = "model.layers.1.mlp.down_proj"
CASES = {
    "lut-128": Case("llama", {"scheme": "w4afp8", "group_size": 128}),
    "lut-64": Case("mistral", {"scheme": "w4afp8", "group_size": 64}),
    "lut-32-ignore": Case(
        "llama-mha",
        {"group_size": 32, "ignore": (DOWN_OF_LAYER_1, r"re:model\.layers\.0\.self_attn\.k_proj")},
    ),
    "lut-channel": Case("qwen3", {"group_size": -1}),
    "exact-32": Case("llama-yarn-rope", {"group_size": 32, "numerics": "exact"}),
    "exact-64": Case("llama-tied", {"group_size": 64, "numerics": "exact"}),
    "exact-128": Case("qwen2-windows", {"group_size": 128, "numerics": "exact"}),
    "exact-channel": Case("llama-linear-rope", {"group_size": -1, "numerics": "exact"}),
    "int8-64": Case("llama-biases", {"scheme": "w4a8", "group_size": 64}),
    "int8-128": Case("qwen2", {"scheme": "w4a8", "group_size": 128}),
    "int8-channel-ignore": Case(
        "llama-llama3-rope",
        {"scheme": "w4a8", "group_size": -1, "ignore": (r"re:.*\.(gate|up)_proj",)},
    ),
}


@dataclass(frozen=True)
class Quantized:
    """A finished run: where from, where to, the recipe's overrides, and the report."""

    source: Path
    output: Path
    overrides: dict[str, Any]
    report: RunReport


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and lose much where cores are shared."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def real_models_in_fp32_where_bf16_is_emulated(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' BF16 linears of many tokens go the way of ours on CPUs without BF16 products.

    They too sum in FP32 and round once, in a seventh of the time.
    """
    if request.node.get_closest_marker("slow") is None:
        return
    original = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        emulated = reference._is_better_in_fp32(x) and not torch.is_grad_enabled()
        return (reference.dense_linear if emulated else original)(x, weight, bias)

    if reference._bf16_is_emulated():
        monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token a byte, ids 0..255, then the two special tokens; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == VOCABULARY
    return fast


@pytest.fixture(scope="session")
def tiny_checkpoint(
    byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A kind of KINDS -> a Hugging Face directory in BF16; the same one all session long.

    Norm weights and biases are random: at their initial ones and zeros a dropped one hides.
    """
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            _save_model(KINDS[kind], _seed(kind), directory)
            byte_tokenizer.save_pretrained(directory)
            made[kind] = directory
        return made[kind]

    return make


@pytest.fixture(scope="session")
def deep_checkpoint(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, where two are too few to stop between them more than once."""
    directory = tmp_path_factory.mktemp("deep")
    _save_model(Kind("llama", {"num_hidden_layers": 4}), _seed("deep"), directory)
    byte_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of tiny checkpoint, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local text of 4,000 bytes, none of which the tokenizer joins."""
    generator = torch.Generator().manual_seed(11)
    letters = torch.randint(32, 127, (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def calibration(calibration_text: Path) -> dict[str, Any]:
    """Overrides that calibrate on few short samples of the local text."""
    return {"dataset": str(calibration_text), "num_calibration_samples": 6, "max_seq_length": 48}


@pytest.fixture(scope="session")
def quantized_case(
    tiny_checkpoint: Callable[[str], Path],
    calibration: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Quantized]:
    """A case of CASES -> its finished run, made once a session; what it gives is only read."""
    made: dict[str, Quantized] = {}

    def make(name: str) -> Quantized:
        if name not in made:
            case = CASES[name]
            source, output = tiny_checkpoint(case.kind), tmp_path_factory.mktemp(name) / "out"
            overrides = {**calibration, **case.overrides}
            # The recipe whose report can be recomputed from source and output alone.
            report = quantize(str(source), output, "gptq", device="cpu", **overrides)
            made[name] = Quantized(source, output, overrides, report)
        return made[name]

    return make


@pytest.fixture(params=CASES)
def quantized(
    request: pytest.FixtureRequest, quantized_case: Callable[[str], Quantized]
) -> Quantized:
    """Every case, one after the other."""
    return quantized_case(str(request.param))


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """quantize ARGS -> (exit code, stdout, stderr), in this process."""

    from quant import cli

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capfd.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, fetched once into the user's cache."""
    from quant.demo import fetch_demo_model

    return fetch_demo_model()


@dataclass(frozen=True)
class RealText:
    """Datasets of real text. peers_saw_it: the peers' published figures are of these tokens."""

    calibration: str
    evaluation: str
    peers_saw_it: bool


@pytest.fixture(scope="session")
def real_text() -> RealText:
    """WikiText-2 where it lies beside the checkout, elsewhere the text that ships with Python."""
    folder = ROOT.parent / "shared" / "data" / "text"
    calibration, evaluation = (
        folder / name for name in ("wikitext2-valid-tokenized.txt", "wikitext2-test.txt")
    )
    if calibration.is_file() and evaluation.is_file():
        return RealText(str(calibration), str(evaluation), peers_saw_it=True)
    return RealText("builtin:calibration", "builtin:evaluation", peers_saw_it=False)


def _seed(kind: str) -> int:
    return int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4], "big")


def _save_model(kind: Kind, seed: int, directory: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind.model_type, **{**SMALL, **kind.config})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(config.initializer_range * noise)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=kind.max_shard_size)
