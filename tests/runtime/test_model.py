"""The model on fused ops is the decoder in plain torch, however its tokens come: packed, in chunks,
one by one, beside others."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.checkpoint.loading import load_decoder
from quant.decoder import Block, Decoder, KeyTransform
from quant.evaluation.perplexity import hidden_states
from quant.runtime.batch import Chunk, in_order, make_batch, pages_needed
from quant.runtime.model import Model, load_model, make_layer
from quant_kernels import ops
from quant_kernels.cpu_linear import MOST_TOKENS
from quant_kernels.kv4 import KVFormat

AsModel = Callable[[Decoder], Model]

# FP32 sums in another order, on logits of order one, and codes that they tip over: a code of an
# activation is 1/127 of its token's largest number, or 1/16 of itself in FP8. Kernels that sum in
# another order than the definitions do so more often. What is dropped or misplaced moves logits by
# their own size (`test_the_bounds_notice_what_is_wrong`).
DENSE_TOLERANCE = 1e-4
ERRORS = {"reference": 2e-4, "cpu": 4e-3, "triton": 4e-3}  # 1 - 2 <x, y> / (|x|^2 + |y|^2)
LENGTHS = (40, 1, 17, 64, 65, 2)  # longer than windows; a page and one more
PACKED = (
    "lut-128", "lut-64", "lut-32-ignore", "lut-channel", "exact-32", "exact-64", "exact-128",
    "exact-channel", "int8-64", "int8-128", "int8-channel-ignore",
)  # fmt: skip


def random_sequences(lengths: Sequence[int] = LENGTHS, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def with_kv(decoder: Decoder, kv: KVFormat | None, transformed: bool = False) -> Decoder:
    """The decoder with keys and values stored as kv says, and keys transformed at random."""
    generator = torch.Generator().manual_seed(8)
    shape = (decoder.config.num_kv_heads, decoder.config.head_dim)

    def keys() -> KeyTransform | None:
        if not transformed:
            return None
        scale = torch.rand(shape, generator=generator) * 2 + 0.3
        return KeyTransform(scale, torch.randn(shape, generator=generator))

    blocks = tuple(Block(block.norms, block.linears, keys()) for block in decoder.blocks)
    return dataclasses.replace(decoder, kv=kv, blocks=blocks)


def wanted_logits(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[S, V], by the definition."""
    positions = torch.arange(len(tokens)).unsqueeze(0)
    return decoder.logits(decoder.hidden_states(torch.tensor([tokens]), positions))[0]


def in_steps(model: Model, sequences: list[list[int]], sizes: Sequence[int]) -> list[Tensor]:
    """Logits [S, V] of every sequence, computed together in chunks of sizes in turn, the last of
    which goes on to the end; a sequence that has ended is absent from later steps."""
    counts = [pages_needed(len(tokens)) for tokens in sequences]
    cache = model.new_cache(sum(counts) + 3, max(map(len, sequences)))
    # Pages in no order, with garbage in them that would drown everything else.
    for tensor in vars(cache).values():
        if isinstance(tensor, Tensor) and tensor.dim() > 4:
            tensor.fill_(100)
    pages = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    owned = [[pages.pop() for _ in range(count)] for count in counts]
    done = [0] * len(sequences)
    found: list[list[Tensor]] = [[] for _ in sequences]
    step = 0
    while any(at < len(tokens) for at, tokens in zip(done, sequences, strict=True)):
        size = sizes[min(step, len(sizes) - 1)]
        rows = [i for i, tokens in enumerate(sequences) if done[i] < len(tokens)]
        chunks = [Chunk(sequences[i][done[i] : done[i] + size], done[i], owned[i]) for i in rows]
        order = in_order(chunks)
        batch = make_batch([chunks[i] for i in order], model.device)
        hidden = model.forward(batch, cache).split(MOST_TOKENS)  # as many as decode together
        logits = torch.cat([model.logits(some) for some in hidden])
        parts = logits.split(list(batch.chunk_lengths))
        for i, part in zip(order, parts, strict=True):
            found[rows[i]].append(part)
            done[rows[i]] += len(part)
        step += 1
    return [torch.cat(parts) for parts in found]


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


STEPS = {
    "whole": (1000,),
    "chunks": (7, 1, 1, 20, 1000),
    "token by token": (1,),
    "prompt, then decode": (13, 1),
}


@pytest.mark.parametrize("steps", STEPS)
def test_a_dense_model_is_the_decoder(
    kind: str, load_fp32: Callable[[str], Decoder], as_model: AsModel, steps: str
) -> None:
    decoder = load_fp32(kind)
    limit = decoder.config.max_position_embeddings
    sequences = [tokens[:limit] for tokens in random_sequences()]
    found = in_steps(as_model(decoder), sequences, STEPS[steps])
    for tokens, logits in zip(sequences, found, strict=True):
        wanted = wanted_logits(decoder, tokens)
        assert float((logits - wanted).abs().max()) < DENSE_TOLERANCE


@pytest.mark.parametrize("kv", ["none", "asymmetric", "symmetric"])
@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_quantized_model_is_the_decoder(
    backend: str,
    case: str,
    kv: str,
    quantized_case: Callable[[str], Any],
    as_model: AsModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOURBYEIGHT_BACKEND", backend)
    decoder = load_decoder(quantized_case(case).output, dtype=torch.float32)
    if kv != "none":
        decoder = with_kv(decoder, KVFormat(symmetric=kv == "symmetric"), transformed=True)
    limit = decoder.config.max_position_embeddings
    sequences = [tokens[:limit] for tokens in random_sequences()]
    wanted = torch.cat([wanted_logits(decoder, tokens) for tokens in sequences])
    for sizes in STEPS.values():
        found = torch.cat(in_steps(as_model(decoder), sequences, sizes))
        assert relative_error(found, wanted) < ERRORS[backend]


@pytest.mark.parametrize("case", ["lut-64", "int8-64", "exact-64"])
def test_triton_kernels_make_the_same_model(
    case: str,
    quantized_case: Callable[[str], Any],
    as_model: AsModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In Triton's interpreter, which is slow: one prompt and three tokens, beside another."""
    monkeypatch.setenv("FOURBYEIGHT_BACKEND", "triton")
    decoder = load_decoder(quantized_case(case).output, dtype=torch.float32)
    decoder = with_kv(decoder, KVFormat(), transformed=True)
    sequences = random_sequences((9, 5))
    with monkeypatch.context() as patch:
        patch.setenv("FOURBYEIGHT_BACKEND", "reference")
        wanted = torch.cat([wanted_logits(decoder, tokens) for tokens in sequences])
    found = torch.cat(in_steps(as_model(decoder), sequences, (4, 2, 1)))
    assert relative_error(found, wanted) < ERRORS["triton"]


@pytest.mark.parametrize("case", ["lut-64", "int8-64", "exact-64"])
def test_on_a_cpu_a_token_is_the_same_bits_whatever_runs_beside_it(
    case: str,
    quantized_case: Callable[[str], Any],
    as_model: AsModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOURBYEIGHT_BACKEND", "cpu")
    decoder = load_decoder(quantized_case(case).output, dtype=torch.float32)
    model = as_model(with_kv(decoder, KVFormat(), transformed=True))
    sequences = random_sequences()
    whole = in_steps(model, sequences, (1000,))
    for sizes in ((7, 1, 1, 20, 1000), (1,)):
        for x, y in zip(in_steps(model, sequences, sizes), whole, strict=True):
            assert torch.equal(x, y)
    for tokens, y in zip(sequences, whole, strict=True):
        (x,) = in_steps(model, [tokens], (13, 1))
        assert torch.equal(x, y)


def test_the_bounds_notice_what_is_wrong(
    quantized_case: Callable[[str], Any], as_model: AsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURBYEIGHT_BACKEND", "reference")
    decoder = load_decoder(quantized_case("int8-64").output, dtype=torch.float32)
    decoder = with_kv(decoder, KVFormat())
    tokens = random_sequences((64,))[0]
    wanted = wanted_logits(decoder, tokens)
    block = decoder.blocks[1]
    names = "mlp.gate_proj", "mlp.up_proj"
    swapped = dict(zip(names, (block.linears[name] for name in reversed(names)), strict=True))
    norms = "input_layernorm.weight", "post_attention_layernorm.weight"
    scaled = {**block.norms, norms[0]: block.norms[norms[0]] * 1.05}
    wrong = [
        dataclasses.replace(block, linears={**block.linears, **swapped}),
        dataclasses.replace(block, norms=scaled | {norms[1]: block.norms[norms[1]].roll(1)}),
    ]
    for other in wrong:
        changed = dataclasses.replace(decoder, blocks=(decoder.blocks[0], other))
        (found,) = in_steps(as_model(changed), [tokens], (1000,))
        assert relative_error(found, wanted) > 10 * ERRORS["reference"]
    # The second chunk one position late, over the same keys.
    model = as_model(decoder)
    cache = model.new_cache(1, 64)
    for part, start in ((tokens[:30], 0), (tokens[30:60], 31)):
        batch = make_batch([Chunk(part, start, [0])], model.device)
        late = model.logits(model.forward(batch, cache))
    assert relative_error(late, wanted[30:60]) > 10 * ERRORS["reference"]


@pytest.mark.parametrize("case", ["lut-64", "int8-64"])
def test_a_block_is_nine_ops(
    case: str,
    quantized_case: Callable[[str], Any],
    as_model: AsModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = load_decoder(quantized_case(case).output, dtype=torch.float32)
    model = as_model(with_kv(decoder, KVFormat()))
    called, original = [], ops.call

    def recorded(op: str, *args: Any) -> None:
        called.append(op)
        original(op, *args)

    monkeypatch.setattr(ops, "call", recorded)
    gemm = f"gemm_{decoder.fmt.scheme}"
    model.forward(make_batch([Chunk([1], 0, [0])], model.device), model.new_cache(1, 64))
    assert called == 2 * [
        "rms_norm_quantize", gemm, "rope_append", "decode_attention", "quantize_activation", gemm,
        "rms_norm_quantize", gemm, gemm,
    ]  # fmt: skip


def test_hidden_states_come_in_the_order_of_the_sequences(
    load_fp32: Callable[[str], Decoder], as_model: AsModel
) -> None:
    decoder = load_fp32("llama")
    model, sequences = as_model(decoder), random_sequences()
    for tokens, hidden in zip(sequences, hidden_states(model, sequences), strict=True):
        wanted = wanted_logits(decoder, tokens)
        assert float((model.logits(hidden) - wanted).abs().max()) < DENSE_TOLERANCE


def test_loading_takes_one_block_after_the_other(
    quantized_case: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.checkpoint.reader import CheckpointReader

    directory = quantized_case("int8-64").output
    read, original = [], CheckpointReader.read

    def recorded(self: CheckpointReader, name: str, *args: Any) -> Tensor:
        read.append(name)
        return original(self, name, *args)

    made: list[int] = []

    def counted(block: Block) -> Any:
        made.append(len(read))
        return make_layer(block)

    monkeypatch.setattr(CheckpointReader, "read", recorded)
    monkeypatch.setattr("quant.runtime.model.make_layer", counted)
    model = load_model(directory)
    assert len(model.layers) == len(made) == 2
    assert made[0] < made[1] <= len(read)  # the first is made before the second is read
    assert not any("layers.1." in name for name in read[: made[0]])
