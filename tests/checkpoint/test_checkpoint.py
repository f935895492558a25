"""What is on disk: complete, and the same weights to other readers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.architectures import LM_HEAD
from quant.calibration.quantize import quantize
from quant.checkpoint.compressed_tensors import is_ignored, parse_quantization_config
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader
from quant.decoder import Block, Decoder, Linear
from quant.errors import RequestError
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
    options = {"dtype": dtype, "device": "cpu", "group_size": 64, **calibration}
    quantize(str(source), output, "gptq", **options)
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
