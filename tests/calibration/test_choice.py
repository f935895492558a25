"""`rotate: {when: better}`: what is measured is the stream's error, and what is decided is done."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quant.calibration.choice as choice
import quant.calibration.pipeline as pipeline
import quant.calibration.quantize as calibration_run
from quant.architectures import SITES
from quant.calibration.activations import MemoryStore
from quant.calibration.choice import RotationChoice, choose_rotation
from quant.calibration.data import calibration_windows, load_tokens
from quant.calibration.pipeline import BlockPipeline
from quant.calibration.plan import make_plan
from quant.calibration.quantize import plan, quantize
from quant.calibration.rotation import make_rotation
from quant.checkpoint.loading import load_decoder
from quant.checkpoint.reader import CheckpointReader, load_tokenizer
from quant.decoder import block_forward, causal_attention, rotary_table
from quant.errors import RequestError, WorkFailed
from quant.passes import RotatePass
from quant.recipe import Recipe, parse_recipe

CPU = torch.device("cpu")
PASSES = {
    "undecided": "[rotate: {when: better, seed: 3}, compensate: {feedback: 0.5}]",
    "rotated": "[rotate: {seed: 3}, compensate: {feedback: 0.5}]",
    "plain": "[compensate: {feedback: 0.5}]",
}


@pytest.fixture
def run(tiny_checkpoint, calibration, tmp_path):
    """Quantize the tiny Llama with a tied head to tmp_path / out."""

    def start(passes, out, **options):
        recipe = parse_recipe(f"group_size: 64\npasses: {PASSES[passes]}", "r.yaml")
        source = str(tiny_checkpoint("llama-tied"))
        return quantize(source, tmp_path / out, recipe, device="cpu", **{**calibration, **options})

    return start


def recipe_of(passes: str) -> Recipe:
    return parse_recipe(f"group_size: 64\npasses: {PASSES[passes]}", "r.yaml")


def test_a_decided_recipe_is_the_one_that_says_so():
    undecided = recipe_of("undecided")
    assert undecided.undecided
    assert undecided.decided(True) == recipe_of("rotated")
    assert undecided.decided(False) == recipe_of("plain")
    for name in ("rotated", "plain"):
        assert not recipe_of(name).undecided
    with pytest.raises(RequestError, match=r"rotate.when 'beter' is unknown.*'better'"):
        parse_recipe("passes: [rotate: {when: beter}, round]", "r.yaml")


def test_a_rotation_has_to_earn_its_cost():
    assert RotationChoice(plain=1.0, rotated=0.9).rotates
    assert not RotationChoice(plain=1.0, rotated=0.91).rotates
    assert not RotationChoice(plain=math.inf, rotated=math.inf).rotates
    assert RotationChoice(plain=math.inf, rotated=1.0).rotates
    assert "not rotated" in str(RotationChoice(1.0, 2.0))


@pytest.mark.parametrize("feedback", [True, False])
def test_the_stream_error_is_that_of_the_stored_checkpoint(
    feedback, tiny_checkpoint, calibration, tmp_path
):
    """On windows that calibration has not seen, in a model that is rotated."""
    source = tiny_checkpoint("llama-biases")
    passes = f"[rotate, compensate: {{feedback: {0.5 if feedback else 0.0}}}]"
    recipe = parse_recipe(f"group_size: 64\npasses: {passes}", "r.yaml")
    reader = CheckpointReader(source)
    cfg = reader.config
    tokens = load_tokens(calibration["dataset"], load_tokenizer(source), cfg.vocab_size)
    length = calibration["max_seq_length"]
    seen = calibration_windows(tokens, 6, length, seed=0)
    held_out = calibration_windows(tokens, 3, length, seed=1)
    report = quantize(
        str(source),
        tmp_path / "out",
        recipe,
        device="cpu",
        dtype="float32",
        **{**calibration, "num_calibration_samples": 6},
    )
    assert report.rotation == ""
    stored = load_decoder(tmp_path / "out", dtype=torch.float32)
    dense = load_decoder(source, dtype=torch.float32)
    rotation = make_rotation(RotatePass(), cfg, CPU).residual
    rope = rotary_table(cfg, torch.arange(length).unsqueeze(0))
    streams = []
    for model in (dense, stored):
        hidden = model.embedding[held_out].float()
        for block in model.blocks:
            hidden = block_forward(
                cfg, block.norms, block.linears, hidden, rope, causal_attention(None)
            )
        streams.append(hidden.flatten(0, 1).double())
    target, found = streams[0] @ rotation, streams[1]
    lost = (found - target).square().sum(dim=1) / target.square().sum(dim=1)

    plan_of = {row.name: row for row in make_plan(reader, recipe).layers}
    pipelines = [
        BlockPipeline(
            reader,
            plan_of,
            recipe,
            part,
            MemoryStore(CPU, host=True),
            CPU,
            dtype=torch.float32,
            observed=True,
        )
        for part in (seen, held_out)
    ]
    with torch.inference_mode():
        for each in pipelines:
            each.embed()
        for layer in range(cfg.num_layers):
            pipelines[1].forward(layer, pipelines[0].quantize(layer))
            pipelines[0].leave(layer)
        measured = pipelines[1].stream_error(cfg.num_layers)
    assert 1e-3 < float(lost.mean()) < 0.5
    assert measured == pytest.approx(float(lost.mean()), rel=0.03)


@pytest.mark.parametrize(("worth_it", "decision"), [(1e9, "rotated"), (0.0, "plain")])
def test_what_is_decided_is_what_is_written(worth_it, decision, run, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "WORTH_IT", worth_it)
    report = run("undecided", "out")
    assert report.rotation.startswith("not rotated:" if decision == "plain" else "rotated:")
    assert run(decision, "expected").rotation == ""
    out, expected = load_decoder(tmp_path / "out"), load_decoder(tmp_path / "expected")
    tokens = torch.arange(32).view(1, 32)
    positions = torch.arange(32).unsqueeze(0)
    found, wanted = (m.logits(m.hidden_states(tokens, positions)) for m in (out, expected))
    assert torch.equal(found, wanted)
    assert out.config.tie_word_embeddings == (decision == "plain")
    assert report.recipe["passes"] == recipe_of(decision).to_dict()["passes"]
    side = json.loads((tmp_path / "out" / "fourbyeight.json").read_text())
    assert side["recipe"]["passes"] == report.recipe["passes"]
    assert not list(tmp_path.glob(".*partial"))


def test_the_better_of_two_is_taken(tiny_checkpoint, calibration, tmp_path, monkeypatch):
    """The errors come from both recipes, in their order, from windows of their own."""
    source = tiny_checkpoint("llama")
    reader = CheckpointReader(source)
    tokens = load_tokens(calibration["dataset"], load_tokenizer(source), reader.config.vocab_size)
    windows = calibration_windows(tokens, 7, calibration["max_seq_length"], seed=0)
    made: list[tuple[bool, int, bytes]] = []

    class Spy(BlockPipeline):
        def __init__(self, reader, plan, recipe, windows, *rest, **options):
            made.append((recipe.rotate is not None, len(windows), windows.numpy().tobytes()))
            super().__init__(reader, plan, recipe, windows, *rest, **options)

    monkeypatch.setattr(choice, "BlockPipeline", Spy)
    planned = make_plan(reader, recipe_of("undecided"))
    events = []
    with torch.inference_mode():
        found = choose_rotation(reader, planned, windows, CPU, None, tmp_path, events.append)
    assert [(rotated, count) for rotated, count, _ in made] == [
        (False, 4),
        (False, 3),
        (True, 4),
        (True, 3),
    ]
    for first in (0, 2):
        rows = {
            part[i : i + 8 * windows.shape[1]]
            for _, _, part in made[first : first + 2]
            for i in range(0, len(part), 8 * windows.shape[1])
        }
        assert rows == {window.numpy().tobytes() for window in windows}
    assert 0 < found.plain < 0.5
    assert 0 < found.rotated < 0.5
    assert found.plain != found.rotated
    assert list(tmp_path.iterdir()) == []
    done = [event.done for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1].total == 2 * 2 * len(SITES)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_windows_are_enough(count, run):
    assert run("undecided", f"out{count}", num_calibration_samples=count).rotation


def test_on_disk_nothing_stays_behind(run, tmp_path):
    report = run("undecided", "disk", activation_offload="disk")
    assert report.rotation == run("undecided", "memory").rotation
    for file in (tmp_path / "memory").iterdir():
        assert (tmp_path / "disk" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("worth_it", [1e9, 0.0])
def test_a_resumed_run_does_not_decide_again(worth_it, run, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "WORTH_IT", worth_it)
    monkeypatch.setattr(pipeline, "TOKENS_AT_ONCE", 1)
    run("undecided", "whole")

    class Stop(Exception):
        pass

    def stop_in_block_1(progress):
        if progress.stage == "quantize" and progress.done > len(SITES):
            raise Stop

    with pytest.raises(Stop):
        run("undecided", "out", on_progress=stop_in_block_1)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(calibration_run, "choose_rotation", refuse)
    report = run("undecided", "out", resume=True)
    assert report.resumed_blocks == 1
    assert report.rotation == f"{'rotated' if worth_it else 'not rotated'}, as the run was begun"
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_stopped_while_it_decides_nothing_is_left(run, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.stage == choice.STAGE and progress.done == 9:
            raise Stop

    with pytest.raises(Stop):
        run("undecided", "out", on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_leaves_room_for_the_rotation(tiny_checkpoint, calibration, tmp_path):
    """A tied head may become a tensor."""
    source = str(tiny_checkpoint("llama-tied"))
    sizes = {
        name: plan(source, tmp_path / "out", recipe_of(name), device="cpu", **calibration)
        for name in PASSES
    }
    assert sizes["undecided"].size_bytes == sizes["rotated"].size_bytes
    assert sizes["undecided"].size_bytes > sizes["plain"].size_bytes


def test_a_block_that_cannot_be_rotated_is_said_to_be(tiny_checkpoint, calibration, tmp_path):
    """A norm's weight times a linear's overflows; the channel between them is always zero."""
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint("llama"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 5] = 0.0
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][5] = 0.0
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][5] = 0.0
    tensors["model.layers.1.post_attention_layernorm.weight"][5] = 1e25
    tensors["model.layers.1.mlp.up_proj.weight"][0, 5] = 1e15
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    options = {**calibration, "device": "cpu"}
    with pytest.raises(WorkFailed, match=r"layers\.1\.mlp\.up_proj.* cannot be rotated"):
        quantize(str(source), tmp_path / "out", recipe_of("rotated"), **options)
    report = quantize(str(source), tmp_path / "whole", recipe_of("undecided"), **options)
    assert report.rotation.startswith(
        "not rotated: the first blocks lose all of the stream with it, "
    )
