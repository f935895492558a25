"""The file of an ablation: what it says is what is compared, and what is wrong in it is named."""

from __future__ import annotations

import pytest

from quant.errors import RequestError
from quant.evaluation.ablation_spec import Corpus, load_ablation, parse_ablation
from quant.passes import RoundPass
from quant.recipe import Calibration

FULL = """
calibration: {dataset: mine.txt, num_calibration_samples: 3, max_seq_length: 40}
seeds: [0, 4]
perplexity:
  - {dataset: text.txt, max_seq_length: 64, max_windows: 2}
  - org/name:test
tasks: [piqa, folder]
limit: 9
rows:
  - {name: a, recipe: rtn, scheme: w4a8, group_size: 64}
  - {name: b, group_size: 32, num_calibration_samples: 5, seeds: [7], passes: [round]}
"""


def test_every_key_ends_where_it_belongs() -> None:
    spec = parse_ablation(FULL, "a.yaml")
    assert spec.corpora == (Corpus("text.txt", 64, 2), Corpus("org/name:test"))
    assert (spec.tasks, spec.limit) == (("piqa", "folder"), 9)
    a, b = spec.rows
    assert (a.name, a.seeds, b.name, b.seeds) == ("a", (0, 4), "b", (7,))
    assert (a.recipe.scheme, a.recipe.group_size) == ("w4a8", 64)
    assert a.recipe.passes == (RoundPass(),)  # the preset's
    assert a.recipe.calibration == Calibration("mine.txt", 3, 40, 0)
    assert b.recipe.calibration == Calibration("mine.txt", 5, 40, 0)
    assert b.recipe.passes == (RoundPass(),)  # its own
    assert (b.recipe.scheme, b.recipe.group_size) == ("w4afp8", 32)


def test_the_packages_own_is_found_by_name_and_is_no_preset_of_a_recipe() -> None:
    spec = load_ablation("ablation")
    assert len(spec.rows) > 4
    assert spec.corpora
    assert not spec.tasks  # so that it needs no network
    with pytest.raises(RequestError, match="did you mean 'ablation'"):
        load_ablation("ablatoin")


ROW = "perplexity: [builtin]\nrows:\n  - {name: one, %s}\n"
ROWS = "perplexity: [builtin]\nrows: [{name: one}]\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (ROW % "group_sizes: 64", ["row 'one'", "group_sizes", "did you mean 'group_size'"]),
        (ROW % "recipe: gptqq", ["row 'one'", "gptqq", "did you mean 'gptq'"]),
        (ROW % "scheme: w4afp", ["row 'one'", "w4afp", "did you mean 'w4afp8'"]),
        (ROW % "group_size: 48", ["row 'one'", "48", "32, 64, 128"]),
        (ROW % "group_size: large", ["row 'one'", "group_size must be int", "'large'"]),
        (ROW % "group_size: null", ["row 'one'", "group_size has no value"]),
        (ROW % "passes: [compensat]", ["row 'one'", "did you mean 'compensate'"]),
        (ROW % "passes: [compensate: {dampin: 1}]", ["row 'one'", "did you mean 'damping'"]),
        (ROW % "seeds: [-1]", ["row 'one'", "seeds", "-1"]),
        (ROW % "seeds: []", ["row 'one'", "seeds"]),
        (ROW % "seeds: [1, 1]", ["row 'one'", "twice"]),
        (ROW % "seed: 1", ["row 'one'", "'seed'", "did you mean 'seeds'"]),
        (ROW % "recipe: 3", ["row 'one'", "recipe"]),
        (ROW % "max_seq_length: 1", ["row 'one'", "max_seq_length is 1"]),
        ("rows: [{scheme: w4a8}]\nperplexity: [builtin]\n", ["row 1 has no name"]),
        ("rows: [{name: a}, {name: a}]\nperplexity: [builtin]\n", ["the row 'a' occurs twice"]),
        ("rows: [{name: unquantized}]\nperplexity: [builtin]\n", ["'unquantized' occurs twice"]),
        ("rows: []\nperplexity: [builtin]\n", ["rows is empty"]),
        ("perplexity: [builtin]\n", ["rows must be a list"]),
        ("rows: [{name: a}]\n", ["nothing is measured"]),
        (ROWS + "perplexty: []\n", ["perplexty", "did you mean 'perplexity'"]),
        (ROWS + "limit: many\n", ["limit must be a number", "'many'"]),
        (ROWS + "limit: -1\n", ["limit must be a number", "-1"]),
        (ROWS + "tasks: piqa\n", ["tasks must be a list"]),
        (ROWS + "calibration: {seed: 1}\n", ["calibration.seed", "`seeds`"]),
        (ROWS + "calibration: {max_seq_length: 0}\n", ["calibration", "max_seq_length is 0"]),
        (ROWS + "rows: []\n", ["'rows' is given twice"]),
        ("rows: [{name: a}]\nperplexity: [{window: 2}]\n", ["window", "perplexity"]),
        ("rows: [{name: a}]\nperplexity: [{max_seq_length: 1}]\n", ["at least 2"]),
        ("rows: [{name: a}]\nperplexity: [{max_windows: -1}]\n", ["max_windows is -1"]),
        ("rows: [{name: a}]\nperplexity: [x/t.txt, y/t.txt]\n", ["corpus 't' occurs twice"]),
        ("rows: [", ["not valid YAML"]),
    ],
)
def test_what_is_wrong_is_named(text: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_ablation(text, "here/a.yaml")
    for part in ["here/a.yaml", *parts]:
        assert part in str(caught.value)


def test_options_replace_the_files_data() -> None:
    spec = parse_ablation(FULL, "a.yaml")
    assert spec.override() == spec
    new = spec.override(
        datasets=["x.txt", "y.txt"], calibration_dataset="c.txt", tasks=["t"], limit=3
    )
    assert new.corpora == (Corpus("x.txt", 64, 2), Corpus("y.txt", 64, 2))
    assert {row.recipe.calibration.dataset for row in new.rows} == {"c.txt"}
    assert [row.recipe.group_size for row in new.rows] == [64, 32]
    assert (new.tasks, new.limit) == (("t",), 3)
    with pytest.raises(RequestError, match="limit is 0"):
        spec.override(limit=0)
    with pytest.raises(RequestError, match="'x' occurs twice"):
        spec.override(datasets=["a/x.txt", "b/x.txt"])
