"""Models that generate what a test says, and tokenizers that cut text at awkward places."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.checkpoint.loading import load_decoder
from quant.decoder import Decoder
from quant.runtime import scheduler
from quant.runtime.llm import LLM
from quant.runtime.model import Model, make_layer
from quant.runtime.sampling import SamplingParams


@pytest.fixture(scope="session")
def awkward_text() -> str:
    """Characters of one to four bytes, a combining accent, and an emoji made of several."""
    return "naïve cats 猫猫: añejo, e\u0301 🙂👩\u200d🚀 Ω≠∑. END of the line, EN ENDE."


@pytest.fixture(scope="session")
def load_fp32(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Decoder]:
    """A kind of tiny checkpoint -> its decoder in FP32."""
    return lambda kind: load_decoder(tiny_checkpoint(kind), dtype=torch.float32)


@pytest.fixture(scope="session")
def as_model() -> Callable[[Decoder], Model]:
    """A decoder -> what `load_model` makes of the same checkpoint."""

    def convert(decoder: Decoder) -> Model:
        parts = {f.name: getattr(decoder, f.name) for f in dataclasses.fields(Decoder)}
        layers = tuple(map(make_layer, parts.pop("blocks")))
        return Model(**parts, layers=layers)

    return convert


@pytest.fixture(scope="session")
def load_llm(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., LLM]:
    """A kind of tiny checkpoint and LLM's options -> the LLM, in FP32 on the CPU."""

    def load(kind: str = "llama", **options: Any) -> LLM:
        return LLM(tiny_checkpoint(kind), dtype="float32", device="cpu", **options)

    return load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[Sequence[int]]], None]:
    """Scripts, token ids each: the request whose seed is i then gets those of script i in turn.

    All but the choice of tokens stays as it is.
    """

    def install(scripts: Sequence[Sequence[int]]) -> None:
        written: dict[int, int] = {}  # generator -> tokens so far

        def scripted(
            logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[Any]
        ) -> Tensor:
            tokens = []
            for one, generator in zip(params, generators, strict=True):
                assert one.seed is not None
                count = written.get(id(generator), 0)
                written[id(generator)] = count + 1
                tokens.append(scripts[one.seed][count])
            return torch.tensor(tokens)

        monkeypatch.setattr(scheduler, "sample", scripted)

    return install


@pytest.fixture(scope="session")
def merging_tokenizer(awkward_text: str) -> Any:
    """Byte-level BPE whose merges join bytes across characters, and end inside of some."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges, vocab = [], {letter: i for i, letter in enumerate(alphabet)}
    ((letters, _),) = spelled.pre_tokenize_str(awkward_text)
    for at in range(0, len(letters) - 1, 3):  # every third pair, whatever character it lies in
        pair = letters[at], letters[at + 1]
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = spelled
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> Any:
    """As Llama 2's: spaces as "▁" in words, the first one stripped, other bytes spelled <0xE7>."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"naivectsof", "▁c", "at", "ca", "▁o"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "c"), ("a", "t"), ("c", "a"), ("▁", "o")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
