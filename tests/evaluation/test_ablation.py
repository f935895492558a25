"""An ablation: what a row is worth, what is not done twice, what is told of it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quant import cli
from quant.calibration.quantize import quantize
from quant.errors import RequestError, WorkFailed
from quant.evaluation import ablation
from quant.evaluation.ablation import AblationResult, Measurement, RowResult, run_ablation
from quant.evaluation.ablation_report import check_plots, markdown, summary, write_results
from quant.evaluation.ablation_spec import Ablation, Corpus, parse_ablation
from quant.evaluation.perplexity import evaluate_perplexity
from quant.recipe import parse_recipe


@pytest.fixture(scope="module")
def evaluation_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(12)
    letters = torch.randint(32, 127, (1000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("eval") / "other.txt"
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def spec(calibration: dict[str, Any], evaluation_text: Path, tmp_path_factory: Any) -> Ablation:
    """Two rows, the first with two seeds, measured on a text and two tasks."""
    items = [{"query": "ab", "choices": ["cd", "ef", "gh"], "gold": i % 3} for i in range(5)]
    partial = [{"ctxs": ["ab", "xy"], "cont": " cd", "gold": i % 2} for i in range(3)]
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("one", items), ("two", partial)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return parse_ablation(
        yaml.safe_dump(
            {
                "calibration": calibration,
                "perplexity": [{"dataset": str(evaluation_text), "max_seq_length": 64}],
                "tasks": [str(folder)],
                "limit": 4,
                "rows": [
                    {"name": "INT8, g32", "scheme": "w4a8", "group_size": 32, "seeds": [0, 2]},
                    {"name": "RTN | g64", "recipe": "rtn", "scheme": "w4a8", "group_size": 64},
                ],
            }
        ),
        "spec",
    )


def in_this_process(command: list[str], log: Any) -> int:
    """What `ablation._wait` does, without the seconds that an interpreter takes to start."""
    # On one thread, as the tests: with more, some processors sum in another order.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(log), redirect_stderr(log):
        patch.setattr(sys, "argv", command[3:])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            torch.set_num_threads(before)
    return 0


@pytest.fixture(scope="module")
def finished(
    spec: Ablation, tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AblationResult, Path]:
    """A finished ablation and its directory; both are only read."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "_wait", in_this_process)
        return run_ablation(str(tiny_checkpoint("llama")), spec, folder, device="cpu"), folder


def test_rows_are_what_quantizing_and_measuring_by_hand_gives(
    finished: Any, spec: Ablation, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    result, folder = finished
    model = str(tiny_checkpoint("llama"))
    assert [row.name for row in result.rows] == ["unquantized", "INT8, g32", "RTN | g64"]
    corpus = spec.corpora[0]
    plain, int8, rtn = (row.measurements for row in result.rows)
    by_hand = evaluate_perplexity(model, corpus.dataset, window=64, device="cpu").perplexity
    assert plain[0].perplexities == {"other": by_hand}
    assert (plain[0].seed, plain[0].seconds, plain[0].bits_per_weight) == (None, None, 16.0)
    assert [m.seed for m in int8] == [0, 2]
    assert [m.seed for m in rtn] == [0]
    for i, (row, seed) in enumerate([(spec.rows[0], 0), (spec.rows[0], 2), (spec.rows[1], 0)]):
        recipe = row.recipe.override(seed=seed)
        report = quantize(model, tmp_path / str(i), recipe, device="cpu")
        found = evaluate_perplexity(str(tmp_path / str(i)), corpus.dataset, window=64, device="cpu")
        measured = [*int8, *rtn][i]
        assert measured.perplexities == {"other": found.perplexity}
        assert measured.bits_per_weight == report.bits_per_weight
        assert measured.seconds is not None
        assert measured.seconds > 0
        assert measured.peak_memory_bytes is not None
        assert measured.peak_memory_bytes > 0
    assert int8[0].perplexities != int8[1].perplexities  # the seed was heard
    for m in (*plain, *int8, *rtn):
        assert list(m.accuracies) == ["one", "two"]
        assert m.mean_accuracy == pytest.approx(sum(m.accuracies.values()) / 2)
    assert not list(folder.rglob("*.safetensors"))  # checkpoints are not kept
    assert len(list(folder.glob("work/*/run.json"))) == 3


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that are run, while they are."""
    seen: list[str] = []

    def wait(command: list[str], log: Any) -> int:
        seen.append(command[4])
        return in_this_process(command, log)

    monkeypatch.setattr(ablation, "_wait", wait)
    return seen


@pytest.fixture
def copy(finished: Any, tmp_path: Path) -> Path:
    """The finished ablation's directory, to change."""
    shutil.copytree(finished[1], tmp_path / "again")
    return tmp_path / "again"


def test_a_finished_row_is_not_run_again(
    finished: Any, spec: Ablation, tiny_checkpoint: Any, copy: Path, steps: list[str]
) -> None:
    again = run_ablation(str(tiny_checkpoint("llama")), spec, copy, device="cpu")
    assert steps == []
    assert again == finished[0]


def test_only_what_is_missing_is_run(
    finished: Any, spec: Ablation, tiny_checkpoint: Any, copy: Path, steps: list[str]
) -> None:
    (cell,) = copy.glob("work/rtn-g64-seed0-*")
    (figures,) = cell.glob("tasks-*.json")
    figures.unlink()  # and its checkpoint is gone
    again = run_ablation(str(tiny_checkpoint("llama")), spec, copy, device="cpu")
    assert steps == ["run", "eval"]
    same, rows = finished[0].rows, again.rows
    assert rows[:2] == same[:2]
    assert rows[2].measurements[0].accuracies == same[2].measurements[0].accuracies


def test_other_inputs_are_run_anew(
    tiny_checkpoint: Any, evaluation_text: Path, copy: Path, steps: list[str]
) -> None:
    """What decides about a result is in its name: the model, the recipe, both texts, the tasks."""
    model = copy.parent / "model"
    shutil.copytree(tiny_checkpoint("llama"), model)
    section = {"num_calibration_samples": 2, "max_seq_length": 32}
    data = {
        "perplexity": [{"dataset": str(copy.parent / "e.txt"), "max_seq_length": 64}],
        "calibration": {"dataset": str(copy.parent / "c.txt"), **section},
        "rows": [{"name": "one", "recipe": "rtn", "group_size": 32}],
    }
    one = parse_ablation(yaml.safe_dump(data), "one")
    for name in ("e.txt", "c.txt"):
        shutil.copy(evaluation_text, copy.parent / name)

    def run() -> list[str]:
        steps.clear()
        run_ablation(str(model), one, copy, device="cpu")
        return list(steps)

    assert run() == ["eval", "run", "eval"]
    assert run() == []
    (copy.parent / "c.txt").write_text(evaluation_text.read_text()[::-1])
    assert run() == ["run", "eval"]
    (copy.parent / "e.txt").write_text(evaluation_text.read_text()[::-1])
    assert run() == ["eval", "run", "eval"]
    (model / "model.safetensors").touch()
    assert run() == ["eval", "run", "eval"]
    one = one.override(calibration_dataset=str(evaluation_text))
    assert run() == ["run", "eval"]
    data["rows"] = [{"name": "one", "recipe": "rtn", "group_size": 64}]
    one = parse_ablation(yaml.safe_dump(data), "one")  # the same name, another recipe
    assert run() == ["run", "eval"]


def test_a_step_that_fails_names_its_row(
    spec: Ablation,
    tiny_checkpoint: Any,
    copy: Path,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = str(tiny_checkpoint("llama"))
    bad = spec.override(calibration_dataset=str(copy / "no.txt"))
    with pytest.raises(RequestError) as caught:
        run_ablation(model, bad, copy, device="cpu")
    for part in ("row 'INT8, g32, seed 0'", "`quantize run`", "no such file"):
        assert part in str(caught.value)

    def killed(command: list[str], log: Any) -> int:
        log.write("Traceback\nMemoryError: all of it\n")
        return -9

    monkeypatch.setattr(ablation, "_wait", killed)
    with pytest.raises(WorkFailed, match="MemoryError: all of it"):
        run_ablation(model, bad, copy, device="cpu")
    (copy.parent / "file").touch()
    with pytest.raises(RequestError, match="is a file"):
        run_ablation(model, spec, copy.parent / "file", device="cpu")
    with pytest.raises(RequestError, match="dtype 'int3' is unknown"):
        run_ablation(model, spec, copy, dtype="int3")


def test_every_step_is_a_process_of_its_own(
    tiny_checkpoint: Any, evaluation_text: Path, calibration: dict[str, Any], tmp_path: Path
) -> None:
    """The command, whole: a step's peak memory is its own, and its recipe is kept."""
    data = {
        "calibration": calibration,
        "perplexity": [{"dataset": str(evaluation_text), "max_seq_length": 64, "max_windows": 2}],
        "rows": [{"name": "one", "recipe": "rtn", "group_size": 32}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    request = ["ablation", str(tiny_checkpoint("llama")), "-o", str(tmp_path / "out")]
    request += ["--rows", str(tmp_path / "mine.yaml"), "--device", "cpu", "--no-plot"]
    ballast = torch.ones(200_000_000)  # 0.8 GB that no step may count as its own
    with (tmp_path / "log.txt").open("w+") as log:
        code = in_this_process(["", "", "", "quant", *request], log)
        log.seek(0)
        assert code == 0, log.read()
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())
    (measured,) = found["rows"][1]["measurements"]
    assert 0 < measured["peak_memory_bytes"] < ballast.nbytes
    (cell,) = (tmp_path / "out" / "work").glob("one-seed0-*")
    recipe = parse_recipe((cell / "recipe.yaml").read_text(), "recipe.yaml")
    assert recipe.to_dict() == found["rows"][1]["recipe"]


def made_up() -> AblationResult:
    def measured(seed: int | None, p: float, q: float, a: float, s: float | None) -> Measurement:
        memory = None if s is None else int(s * 1e9)
        bits = 16.0 if s is None else 4.25
        return Measurement(seed, {"c": p, "d": q}, {"t": a}, a, s, memory, bits)

    return AblationResult(
        model="some/model",
        corpora=(Corpus("c.txt", 64, 3), Corpus("d")),
        tasks=("t",),
        limit=None,
        rows=(
            RowResult("unquantized", None, (measured(None, 20.0, 8.0, 0.5, None),)),
            RowResult("a | b", {}, (measured(0, 22.0, 9, 0.45, 3), measured(1, 25.0, 9, 0.41, 5))),
        ),
    )


def test_the_table_by_hand() -> None:
    text = markdown(made_up())
    assert "| row | c | d | accuracy | bits | seconds | peak memory |" in text
    assert "| unquantized | 20.000 | 8.000 | 50.0% | 16.00 |  |  |" in text
    assert (
        "| a / b | 23.500 [22.000, 25.000] +17.5% | 9.000 [9.000, 9.000] +12.5% | 43.0% (-7.0) "
        "| 4.25 | 4 | 5.00 GB |"
    ) in text
    assert "the first 3 windows of 64 tokens of `c.txt`" in text
    assert "all windows of 2048 tokens of `d`" in text


def test_the_figures_by_hand() -> None:
    row = summary(made_up())["rows"][1]
    assert row["perplexity"]["c"] == {
        "mean": 23.5,
        "min": 22.0,
        "max": 25.0,
        "loss": pytest.approx(0.175),
    }
    assert row["mean_accuracy"] == pytest.approx(0.43)


def test_what_is_written(finished: Any, tmp_path: Path) -> None:
    result, _ = finished
    written = write_results(result, tmp_path / "deep" / "out")
    assert [path.name for path in written] == ["ablation.md", "ablation.json", "ablation.png"]
    assert written[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(json.loads(written[1].read_text())["rows"]) == 3
    assert "| RTN / g64 |" in written[0].read_text()
    assert len(write_results(result, tmp_path / "plain", plot=False)) == 2
    assert not (tmp_path / "plain" / "ablation.png").exists()


def test_the_plot_shows_the_loss_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    from quant.evaluation.ablation_report import draw

    drawn: list[tuple[Any, ...]] = []
    barh = Axes.barh

    def note(self: Any, places: Any, values: Any, *rest: Any, **options: Any) -> Any:
        drawn.append((values, options["xerr"], self))
        return barh(self, places, values, *rest, **options)

    monkeypatch.setattr(Axes, "barh", note)
    draw(made_up(), Path("/dev/null"))
    (c, c_spread, axes), (d, d_spread, _) = drawn
    assert c == pytest.approx([17.5])
    assert c_spread == [pytest.approx([7.5]), pytest.approx([7.5])]
    assert d == pytest.approx([12.5])
    assert d_spread == [[0.0], [0.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a | b"]
    drawn.clear()
    result = made_up()
    one = dataclasses.replace(result.rows[1], measurements=result.rows[1].measurements[:1])
    draw(dataclasses.replace(result, rows=(result.rows[0], one)), Path("/dev/null"))
    assert all(math.isnan(error[0]) for _, spread, _ in drawn for error in spread)


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        RequestError, match=r"pip install 'fourbyeight\[plots\]', or give --no-plot"
    ):
        check_plots()
