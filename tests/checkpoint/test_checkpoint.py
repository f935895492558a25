"""What is on disk: complete, the same weights to other readers, and there whole or not at all."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import quant.calibration.pipeline as pipeline
from quant.architectures import LM_HEAD
from quant.calibration.quantize import quantize
from quant.checkpoint.compressed_tensors import is_ignored, parse_quantization_config
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.source import resolve_model
from quant.checkpoint.writer import CheckpointWriter
from quant.decoder import Linear
from quant.errors import RequestError
from quant.runtime.model import Block, Decoder, load_decoder
from quant_kernels.formats import effective_weight
from quant_kernels.packing import PackedWeight, unpack_int4

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def packed_linears(directory: Path) -> dict[str, PackedWeight]:
    """Every packed linear of a checkpoint, as the runtime loads it."""
    decoder = load_decoder(directory, dtype=torch.float32)
    return {
        f"model.layers.{i}.{name}": linear.weight
        for i, block in enumerate(decoder.blocks)
        for name, linear in block.linears.items()
        if isinstance(linear.weight, PackedWeight)
    }


def codes_times_scales(weight: PackedWeight) -> Tensor:
    """q * s: what the file says to a reader that knows nothing of the kernel, FP32."""
    codes = unpack_int4(weight.words).float()
    scales = weight.scales.float()
    return (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view_as(codes)


def with_dense_weights(decoder: Decoder) -> Decoder:
    """The decoder with q * s in place of packed weights: no activation is quantized."""

    def dense(linear: Linear) -> Linear:
        if isinstance(linear.weight, PackedWeight):
            return Linear(codes_times_scales(linear.weight), linear.bias)
        return linear

    blocks = tuple(
        Block(block.norms, {name: dense(linear) for name, linear in block.linears.items()})
        for block in decoder.blocks
    )
    return dataclasses.replace(decoder, blocks=blocks)


def logits_of(decoder: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return decoder.logits(decoder.hidden_states(tokens, positions))


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x.square().sum() + y.square().sum()))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# What is in the directory.


def test_output_directory_is_complete(quantized):
    expected = {"config.json", "fourbyeight.json", "report.jsonl", *COMPANIONS}
    expected |= {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
    assert {path.name for path in quantized.output.iterdir()} == expected
    for name in COMPANIONS:
        kept = (quantized.output / name).read_bytes()
        assert kept == (quantized.source / name).read_bytes(), name


def test_index_lists_exactly_what_the_shards_hold(quantized):
    index = json.loads((quantized.output / "model.safetensors.index.json").read_text())
    held, size = {}, 0
    for shard in quantized.output.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            held[name] = shard.name
            size += tensor.numel() * tensor.element_size()
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size


def test_config_is_the_sources_and_a_quantization_config(quantized):
    config = config_of(quantized.output)
    added = config.pop("quantization_config")
    assert config == config_of(quantized.source)
    assert added["quant_method"] == "compressed-tensors"


def test_every_quantized_linear_has_the_tensors_of_the_format(quantized):
    source, stored = CheckpointReader(quantized.source), CheckpointReader(quantized.output)
    fmt = parse_quantization_config(quantized.output, stored.raw_config)
    expected = set(source.names)
    for row in quantized.report.layers:
        n, k = row.shape
        groups = k // row.group_size if row.group_size != -1 else 1
        expected.remove(f"{row.name}.weight")
        for suffix, dtype, shape in (
            ("weight_packed", torch.int32, (n, k // 8)),
            ("weight_scale", torch.bfloat16, (n, groups)),
            ("weight_shape", torch.int64, (2,)),
        ):
            tensor = stored.read(f"{row.name}.{suffix}")
            assert tensor.dtype == dtype
            assert tensor.shape == shape
            expected.add(f"{row.name}.{suffix}")
        assert stored.read(f"{row.name}.weight_shape").tolist() == [n, k]
        assert (fmt.scheme, fmt.group_size, fmt.numerics) == (
            row.scheme,
            row.group_size,
            row.numerics,
        )
    assert stored.names == expected


def test_everything_else_is_the_sources_bit_for_bit(quantized):
    source, stored = CheckpointReader(quantized.source), CheckpointReader(quantized.output)
    kept = source.names & stored.names
    for name in kept:
        before, after = source.read(name), stored.read(name)
        assert after.dtype == before.dtype
        assert torch.equal(after.view(torch.int16), before.view(torch.int16)), name
    assert {f"{name}.weight" for name in quantized.report.ignored} <= kept
    assert "model.embed_tokens.weight" in kept
    assert ("lm_head.weight" in kept) == (not source.config.tie_word_embeddings)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_the_tensors_that_stay(dtype, tiny_checkpoint, calibration, tmp_path):
    source, output = tiny_checkpoint("qwen2"), tmp_path / "out"
    quantize(str(source), output, dtype=dtype, device="cpu", group_size=64, **calibration)
    before, stored = CheckpointReader(source), CheckpointReader(output)
    wanted = getattr(torch, dtype)
    for name in before.names & stored.names:
        assert torch.equal(stored.read(name), before.read(name, wanted)), name
    for name in stored.names - before.names:
        assert stored.read(name).dtype in (torch.int32, torch.int64, torch.bfloat16)
    assert config_of(output)["dtype"] == dtype


# What other readers make of it.


def test_compressed_tensors_accepts_every_key_of_the_config(quantized):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    ours = config_of(quantized.output)["quantization_config"]
    group = ours["config_groups"]["group_0"]
    weights = QuantizationArgs(**group["weights"])  # forbids keys that it does not know
    inputs = QuantizationArgs(**group["input_activations"])
    with pytest.raises(ValueError, match="unheard_of"):
        QuantizationArgs(**group["weights"], unheard_of=1)
    row = quantized.report.layers[0]
    assert (weights.num_bits, weights.type, weights.symmetric, weights.dynamic) == (
        4,
        "int",
        True,
        False,
    )
    assert (weights.strategy, weights.group_size) == (
        ("channel", None) if row.group_size == -1 else ("group", row.group_size)
    )
    assert (inputs.num_bits, inputs.strategy, inputs.symmetric, inputs.dynamic) == (
        8,
        "token",
        True,
        True,
    )
    assert inputs.type == ("float" if row.scheme == "w4afp8" else "int")
    config = QuantizationConfig.model_validate(ours)
    assert config.format == "pack-quantized"
    assert config.quantization_status == "compressed"
    assert config.ignore == [LM_HEAD, *quantized.report.ignored]
    assert config.config_groups["group_0"].format == "pack-quantized"


def test_compressed_tensors_decompresses_to_codes_times_scales(quantized):
    # For `exact` and `int8`, and for any numerics per channel, that is what the kernel multiplies,
    # rounded to BF16. The `lut` kernel rounds once more, to E4M3, which this format cannot say.
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = config_of(quantized.output)["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    stored = CheckpointReader(quantized.output)
    packed = packed_linears(quantized.output)
    assert set(packed) == {row.name for row in quantized.report.layers}
    for name, weight in packed.items():
        tensors = {
            suffix: stored.read(f"{name}.{suffix}")
            for suffix in ("weight_packed", "weight_scale", "weight_shape")
        }
        theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
        assert theirs.dtype == torch.bfloat16
        plain = codes_times_scales(weight)
        assert torch.equal(theirs, plain.to(torch.bfloat16))
        ours = effective_weight(unpack_int4(weight.words), weight.scales, weight.fmt)
        if weight.fmt.numerics != "lut" or weight.fmt.per_channel:
            assert torch.equal(ours, plain)
        else:
            assert not torch.equal(ours, plain)
            assert relative_error(ours, plain) < 1e-3


# Round-off of E4M3 products is 1.1% of a weight in the mean; INT8 activations differ because
# compressed-tensors divides by 127.5 and we by 127. Without them only flips of single FP8 codes
# are left, where two frameworks' sums differ by an ulp.
AGREEMENT = {"lut": 2e-2, "int8": 2e-3, "exact": 2e-4}


def test_transformers_loads_it_and_agrees(quantized):
    from compressed_tensors.quantization import disable_quantization
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quantized.output, dtype=torch.float32)
    decoder = load_decoder(quantized.output, dtype=torch.float32)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        simulated = model(tokens).logits  # it quantizes activations, in simulation
        model.apply(disable_quantization)
        dense = model(tokens).logits
    numerics = "exact" if decoder.fmt.per_channel else decoder.fmt.numerics
    bound = AGREEMENT["int8" if decoder.fmt.activation == "int8" else numerics]
    assert relative_error(logits_of(decoder, tokens), simulated) < bound
    # The same weights without activation quantization, in the same FP32 arithmetic.
    expected = logits_of(with_dense_weights(decoder), tokens)
    assert expected.std() > 0.5
    assert (dense - expected).abs().max() < 1e-4
    assert (dense - simulated).abs().max() > 1e-2


def test_transformers_tokenizer_of_the_output_is_the_sources(quantized_case, byte_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quantized_case("lut-128").output)
    chat = [{"role": "user", "content": "naïve café, 3 < 4\n"}]
    expected = byte_tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    assert tokenizer(expected)["input_ids"] == byte_tokenizer(expected)["input_ids"]
    assert tokenizer.decode(tokenizer(expected)["input_ids"]) == expected


# What we make of it, and of what others wrote.


def copy_with_config(source: Path, target: Path, edit) -> Path:
    shutil.copytree(source, target)
    config = config_of(target)
    edit(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("case", "numerics"), [("exact-64", "exact"), ("int8-64", "int8"), ("lut-channel", "exact")]
)
def test_without_our_side_file_a_checkpoint_means_codes_times_scales(
    case, numerics, quantized_case, tmp_path
):
    output = quantized_case(case).output
    shutil.copytree(output, tmp_path / "other")
    (tmp_path / "other" / "fourbyeight.json").unlink()
    decoder = load_decoder(tmp_path / "other", dtype=torch.float32)
    assert decoder.fmt.numerics == numerics
    tokens = torch.arange(30).unsqueeze(0)
    expected = logits_of(load_decoder(output, dtype=torch.float32), tokens)
    assert torch.equal(logits_of(decoder, tokens), expected)


@pytest.mark.parametrize("case", ["lut-64", "int8-64"])
def test_scales_off_the_kernels_grid_are_refused_by_name(case, quantized_case, tmp_path):
    output = shutil.copytree(quantized_case(case).output, tmp_path / "edited")
    file = output / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][5, 1] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale.*grid"):
        load_decoder(output)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(quant_method="gptq"), "quant_method 'gptq'"),
        (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (lambda c: c["config_groups"].update(group_1={}), "2 config groups"),
        (lambda c: c["config_groups"]["group_0"].update(format="int-quantized"), "int-quantized"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "num_bits is 8"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "symmetric"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=48), "48"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), "block"),
        (
            lambda c: c["config_groups"]["group_0"].update(input_activations=None),
            "num_bits is None",
        ),
        (
            lambda c: c["config_groups"]["group_0"]["input_activations"].update(strategy="tensor"),
            "strategy is 'tensor'",
        ),
    ],
)
def test_quantizations_that_do_not_run_here_are_refused(edit, message, quantized_case, tmp_path):
    directory = copy_with_config(quantized_case("lut-64").output, tmp_path / "edited", edit)
    with pytest.raises(RequestError, match=message):
        load_decoder(directory)


def test_side_file_of_another_version_is_refused(quantized_case, tmp_path):
    output = shutil.copytree(quantized_case("lut-64").output, tmp_path / "edited")
    side = json.loads((output / "fourbyeight.json").read_text())
    (output / "fourbyeight.json").write_text(json.dumps({**side, "format_version": 99}))
    with pytest.raises(RequestError, match="format_version 99"):
        load_decoder(output)


@pytest.mark.parametrize(
    ("name", "patterns", "ignored"),
    [
        ("lm_head", ["lm_head"], True),
        ("model.lm_head", ["lm_head"], False),
        ("model.layers.1.mlp.up_proj", ["re:.*up_proj"], True),
        ("model.layers.1.mlp.up_proj", ["re:up_proj"], False),
        ("model.layers.10.mlp.up_proj", ["model.layers.1.mlp.up_proj"], False),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"], True),
        ("model.layers.1.mlp.up_proj", [], False),
    ],
)
def test_ignore_entries_are_names_or_regular_expressions(name, patterns, ignored):
    assert is_ignored(name, patterns) is ignored


# Whole or not at all.


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` may swallow it."""


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
@pytest.mark.parametrize("deep", ["out", "new/parents/out"])
def test_failure_in_the_middle_leaves_nothing(
    error, deep, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    calls = []

    def fail_in_the_second_block(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            assert snapshot(tmp_path)  # something is there, hidden
            assert not (tmp_path / deep).exists()
            raise error("now")
        return original(*arguments)

    original = pipeline.advance
    monkeypatch.setattr(pipeline, "advance", fail_in_the_second_block)
    with pytest.raises(error, match="now"):
        quantize(str(tiny_checkpoint("llama")), tmp_path / deep, device="cpu", **calibration)
    assert not [path for path in snapshot(tmp_path) if path.endswith("out") or "partial" in path]
    if deep == "out":
        assert not snapshot(tmp_path)


@pytest.mark.parametrize("step", ["rename", "replace", "fsync"])
def test_failure_while_finishing_leaves_nothing(
    step, tiny_checkpoint, calibration, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "out", device="cpu", **calibration)
    assert not snapshot(tmp_path)


def test_what_a_killed_run_left_does_not_get_into_the_next(
    quantized_case, tiny_checkpoint, calibration, tmp_path
):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "shard-00001.tmp").write_bytes(b"half a shard")
    (left / "model-00007-of-00009.safetensors").write_bytes(b"rubbish")
    quantize(str(tiny_checkpoint("llama")), tmp_path / "out", device="cpu", **calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in quantized_case("lut-128").output.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("what", ["directory", "empty directory", "file", "link", "dangling link"])
def test_output_that_exists_is_refused_and_untouched(what, tiny_checkpoint, calibration, tmp_path):
    output = tmp_path / "out"
    if what == "file":
        output.write_text("precious")
    elif what.endswith("link"):
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / ("elsewhere" if what == "link" else "nowhere"))
    else:
        output.mkdir()
        if what == "directory":
            (output / "config.json").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(RequestError, match="exists"):
        quantize(str(tiny_checkpoint("llama")), output, device="cpu", **calibration)
    assert snapshot(tmp_path) == before
    assert output.is_symlink() == what.endswith("link")


def test_output_below_a_file_is_refused(tiny_checkpoint, calibration, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RequestError, match="cannot be made"):
        quantize(str(tiny_checkpoint("llama")), tmp_path / "file" / "out", **calibration)


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_shards_are_bounded_and_hold_everything(limit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(i + 1, 100, generator=generator) for i in range(9)}
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = {1: 9, 3000: 7, 10**9: 1}[limit]
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    found = {}
    for shard in shards:
        held = load_file(tmp_path / "out" / shard)
        size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        assert size <= limit or len(held) == 1
        assert all(index["weight_map"][name] == shard for name in held)
        found |= held
    assert set(found) == set(index["weight_map"]) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_context_left_without_finish_writes_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", torch.zeros(8))
        writer.add("b", torch.zeros(8))
        assert snapshot(tmp_path)
    assert not snapshot(tmp_path)


# Sources that cannot be read.


def test_sharded_source_reads_as_transformers_reads_it(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    directory = tiny_checkpoint("qwen2")
    assert len(list(directory.glob("*.safetensors"))) > 1
    reader = CheckpointReader(directory)
    state = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
    assert reader.names == set(state)
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.read(name), tensor)


def without_a_shard(directory: Path) -> None:
    next(iter(sorted(directory.glob("*.safetensors")))).unlink()


def with_an_index_that_points_outside(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../model.safetensors"
    index.write_text(json.dumps(content))


def without_the_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def with_pickles_only(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))


def with_a_truncated_shard(directory: Path) -> None:
    path = next(iter(sorted(directory.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-100])


def with_broken_json(directory: Path) -> None:
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_shard, "names 'model-00001-of-00003.safetensors', which is not there"),
        (with_an_index_that_points_outside, "points outside its directory"),
        (without_the_index, "without an index"),
        (with_pickles_only, "pickles.*convert them to safetensors"),
        (with_a_truncated_shard, "not a readable safetensors file"),
        (with_broken_json, "not valid JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_sources_are_refused_before_anything_is_written(
    spoil, message, tiny_checkpoint, calibration, tmp_path
):
    directory = shutil.copytree(tiny_checkpoint("qwen2"), tmp_path / "model")
    spoil(directory)
    with pytest.raises(RequestError, match=message):
        quantize(str(directory), tmp_path / "out", device="cpu", **calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_source_that_is_not_there_or_not_a_directory_is_refused(tmp_path):
    with pytest.raises(RequestError, match="no such directory or file"):
        resolve_model(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="is a file; give its directory"):
        resolve_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "fake.gguf").write_bytes(b"GGML0000")
    with pytest.raises(RequestError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "fake.gguf"))
