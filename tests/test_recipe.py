"""Recipes: what is written is what runs, and what is wrong is named with what would be right."""

import dataclasses

import pytest
import yaml

from quant.calibration.quantize import quantize
from quant.checkpoint.loading import load_decoder
from quant.errors import RequestError
from quant.passes import CompensatePass, RoundPass
from quant.recipe import (
    DEFAULT_PRESET,
    Calibration,
    Recipe,
    load_recipe,
    parse_recipe,
    presets,
)
from quant_kernels.formats import WeightFormat

FULL = """
scheme: w4a8
group_size: 64
numerics: int8
kv_cache: kv4
ignore: [model.layers.0.mlp.down_proj, 're:.*k_proj']
calibration: {dataset: text.jsonl, num_calibration_samples: 3, max_seq_length: 77, seed: 5}
passes:
  - compensate: {scales: mse, damping: 0.05, act_order: false, block_size: 32,
                 feedback: 0.3, ridge: 0.7}
"""
PARSED = Recipe(
    scheme="w4a8",
    group_size=64,
    numerics="int8",
    kv_cache="kv4",
    ignore=("model.layers.0.mlp.down_proj", "re:.*k_proj"),
    calibration=Calibration("text.jsonl", 3, 77, 5),
    passes=(CompensatePass("mse", 0.05, False, 32, 0.3, 0.7),),
)


def test_every_key_ends_where_it_belongs():
    assert parse_recipe(FULL, "r.yaml") == PARSED
    # All of them differ from the defaults, so none of them was ignored.
    for cls, found in ((Recipe, PARSED), (Calibration, PARSED.calibration)):
        for f in dataclasses.fields(cls):
            assert getattr(found, f.name) != getattr(cls(), f.name), f.name
    for f in dataclasses.fields(CompensatePass):
        assert getattr(PARSED.passes[0], f.name) != getattr(CompensatePass(), f.name), f.name


def test_missing_keys_take_the_defaults():
    assert parse_recipe("group_size: 64", "r.yaml") == Recipe(group_size=64)
    assert parse_recipe("passes: [compensate]", "r.yaml") == Recipe()
    assert parse_recipe("passes: [round]", "r.yaml").passes == (RoundPass(),)
    assert parse_recipe("passes: [{round: null}]", "r.yaml").passes == (RoundPass(),)
    assert parse_recipe("{}", "r.yaml") == Recipe()


@pytest.mark.parametrize(("scheme", "numerics"), [("w4afp8", "lut"), ("w4a8", "int8")])
def test_numerics_default_to_the_schemes_first(scheme, numerics):
    recipe = parse_recipe(f"scheme: {scheme}", "r.yaml")
    assert recipe.weight_format == WeightFormat(scheme, 128, numerics)


def test_whole_numbers_are_numbers():
    recipe = parse_recipe("passes: [{compensate: {damping: 1}}]", "r.yaml")
    assert recipe.passes == (CompensatePass(damping=1.0),)


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("shceme: w4a8", "shceme", "did you mean 'scheme'"),
        ("groupsize: 64", "groupsize", "did you mean 'group_size'"),
        ("calibration: {num_sample: 8}", "num_sample", "did you mean 'num_calibration_samples'"),
        ("passes: [{compensate: {dampin: 0.1}}]", "dampin", "did you mean 'damping'"),
        ("passes: [{round: {damping: 0.1}}]", "damping", "known: scales"),
        ("passes: [compensat]", "compensat", "did you mean 'compensate'"),
        ("passes: [{rond: {}}]", "rond", "did you mean 'round'"),
        (
            "zzz: 1",
            "zzz",
            "known: scheme, group_size, numerics, kv_cache, ignore, calibration, passes",
        ),
        ("7: 1", "7", "known: scheme"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(text, key, hint):
    with pytest.raises(RequestError, match=rf"unknown.*{key}|{key}.*unknown") as caught:
        parse_recipe(text, "here/r.yaml")
    assert "here/r.yaml" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: 4", "scheme must be str, got int 4"),
        ("scheme: null", "scheme must be str, got nothing"),
        ("group_size: '64'", "group_size must be int, got str '64'"),
        ("group_size: true", "group_size must be int, got bool"),
        ("group_size: 64.0", "group_size must be int, got float"),
        ("ignore: lm_head", "ignore must be a list of strings"),
        ("ignore: [1]", "ignore must be a list of strings"),
        ("calibration: builtin", "calibration must be a mapping, got str"),
        ("calibration: null", "calibration must be a mapping, got nothing"),
        (
            "calibration: {num_calibration_samples: many}",
            "calibration.num_calibration_samples must be int, got str",
        ),
        ("calibration: {dataset: 3}", "calibration.dataset must be str, got int"),
        ("passes: compensate", "passes must be a list, got str"),
        ("passes: [7]", "every entry of passes is one `name: {options}`"),
        ("passes: [{round: {}, compensate: {}}]", "every entry of passes is one"),
        ("passes: [{compensate: [1]}]", "compensate must be a mapping, got list"),
        ("passes: [{compensate: {damping: lots}}]", "damping must be float, got str 'lots'"),
        ("passes: [{compensate: {damping: true}}]", "damping must be float, got bool"),
        ("passes: [{compensate: {act_order: 1}}]", "act_order must be bool, got int 1"),
        ("passes: [{compensate: {block_size: 1.5}}]", "block_size must be int, got float"),
        ("[1, 2]", "recipe must be a mapping, got list"),
        ("", "recipe must be a mapping, got nothing"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_wrong_types_name_the_file_the_key_and_both_types(text, message):
    with pytest.raises(RequestError) as caught:
        parse_recipe(text, "here/r.yaml")
    assert "here/r.yaml" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: w4afp", "scheme 'w4afp' is unknown; known: w4afp8, w4a8; did you mean 'w4afp8'"),
        ("scheme: w4a8\nnumerics: lut", "w4a8 has no numerics 'lut'; it has: int8"),
        ("numerics: exat", "w4afp8 has no numerics 'exat'; it has: lut, exact"),
        ("group_size: 48", "group size 48 is not supported; use 32, 64, 128"),
        ("group_size: 0", "group size 0 is not supported"),
        (
            "calibration: {num_calibration_samples: 0}",
            "num_calibration_samples is 0; it must be positive",
        ),
        ("calibration: {max_seq_length: 1}", "max_seq_length is 1; it must be at least 2"),
        ("calibration: {seed: -1}", "seed is -1; it must not be negative"),
        ("calibration: {dataset: ''}", "dataset is empty"),
        ("passes: []", "none: 0 of them round the weights"),
        ("passes: [round, compensate]", "round, compensate: 2 of them round the weights"),
        ("passes: [{compensate: {damping: 0}}]", "damping is 0.0; it must be in (0, 1]"),
        ("passes: [{compensate: {damping: 1.5}}]", "damping is 1.5; it must be in (0, 1]"),
        ("passes: [{compensate: {damping: .nan}}]", "damping is nan; it must be in (0, 1]"),
        ("passes: [{compensate: {block_size: 0}}]", "block_size is 0; it must be positive"),
        ("passes: [{compensate: {scales: hesian}}]", "did you mean 'hessian'"),
        ("passes: [{round: {scales: max}}]", "known: absmax, mse, hessian"),
    ],
)
def test_bad_values_name_the_file_the_value_and_the_good_ones(text, message):
    with pytest.raises(RequestError) as caught:
        parse_recipe(text, "here/r.yaml")
    assert "here/r.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_a_key_given_twice_is_refused():
    # YAML parsers keep the last one, and a reader sees the first.
    with pytest.raises(RequestError, match="group_size"):
        parse_recipe("group_size: 64\nscheme: w4a8\ngroup_size: 128\n", "r.yaml")


def round_trip(recipe: Recipe) -> Recipe:
    return parse_recipe(yaml.safe_dump(recipe.to_dict()), "round trip")


def test_dict_of_a_recipe_parses_to_the_same_recipe():
    for recipe in (PARSED, Recipe(numerics="lut"), Recipe(numerics="exact", passes=(RoundPass(),))):
        assert round_trip(recipe) == recipe
    unspecified = Recipe()
    assert round_trip(unspecified).weight_format == unspecified.weight_format


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert load_recipe(str(presets()[name])) == recipe
    again = round_trip(recipe)
    assert dataclasses.replace(again, numerics=recipe.numerics) == recipe
    assert again.weight_format == recipe.weight_format


def test_default_preset_is_a_preset_and_the_commands_default():
    from typer.main import get_command

    from quant.cli import app

    assert DEFAULT_PRESET in presets()
    (option,) = (p for p in get_command(app).commands["run"].params if p.name == "recipe")
    assert option.default == DEFAULT_PRESET
    assert load_recipe("gptq") == Recipe()


@pytest.mark.parametrize("name", presets())
def test_presets_run(name, tiny_checkpoint, calibration, tmp_path):
    recipe = load_recipe(name)
    source = str(tiny_checkpoint("llama"))
    report = quantize(source, tmp_path / "out", name, device="cpu", **calibration)
    assert load_decoder(tmp_path / "out").fmt == recipe.weight_format
    assert len(report.layers) == 14
    for row in report.layers:
        assert row.error_after <= row.error_before
        assert (row.damping is None) == isinstance(recipe.rounding, RoundPass)


def test_recipe_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text(FULL)
    assert load_recipe(str(path)) == PARSED
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.yaml") == PARSED
    # A folder of a preset's name does not hide the preset.
    (tmp_path / DEFAULT_PRESET).mkdir()
    assert load_recipe(DEFAULT_PRESET).smooth is not None


@pytest.mark.parametrize(
    ("name", "hint"), [("gptqq", "did you mean 'gptq'"), ("no/such.yaml", "presets: ")]
)
def test_recipe_that_is_not_there_is_refused_with_the_presets(name, hint):
    with pytest.raises(RequestError, match=name) as caught:
        load_recipe(name)
    assert hint in str(caught.value)
    assert all(preset in str(caught.value) for preset in presets())


def test_overrides_replace_and_none_keeps():
    new = PARSED.override(
        group_size=-1, seed=0, dataset="builtin", num_calibration_samples=None, ignore=None
    )
    assert new == dataclasses.replace(
        PARSED, group_size=-1, calibration=Calibration("builtin", 3, 77, 0)
    )
    assert PARSED.override() == PARSED
    assert PARSED.override(ignore=()).ignore == ()


def test_overriding_the_scheme_resets_the_numerics():
    exact = Recipe(numerics="exact")
    assert exact.override(scheme="w4a8").weight_format == WeightFormat("w4a8", 128, "int8")
    assert exact.override(scheme="w4afp8").weight_format.numerics == "exact"
    back = PARSED.override(scheme="w4afp8", numerics="exact")
    assert back.weight_format == WeightFormat("w4afp8", 64, "exact")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 100}, "group size 100"),
        ({"num_calibration_samples": 0}, "num_calibration_samples is 0"),
        ({"scheme": "w4a4"}, "'w4a4' is unknown"),
        ({"numerics": "lut"}, "w4a8 has no numerics 'lut'"),
    ],
)
def test_overrides_are_checked(changes, message):
    with pytest.raises(RequestError, match=message):
        PARSED.override(**changes)
