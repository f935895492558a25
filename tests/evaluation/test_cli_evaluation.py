"""`quantize eval` with tasks and without, and what `quantize ablation` refuses before it works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant.cli_evaluation import split_names
from quant.evaluation.perplexity import evaluate_perplexity
from quant.evaluation.tasks import evaluate_tasks

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, gold in (("one", 0), ("two", 1)):
        rows = [{"query": f"q {i}", "choices": ["ab", "cd"], "gold": gold} for i in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_eval_of_tasks_alone_of_text_alone_and_of_both(
    run: Run, tiny_checkpoint: Any, calibration_text: Path, tasks: Path, tmp_path: Path
) -> None:
    model, file = str(tiny_checkpoint("llama")), tmp_path / "figures.json"
    common = ["--device", "cpu", "--json", file]
    text = ["--dataset", calibration_text, "--max-seq-length", 64, "--max-windows", 3]
    plain = evaluate_perplexity(
        model, str(calibration_text), window=64, max_windows=3, device="cpu"
    )
    accuracies = evaluate_tasks(model, [str(tasks)], limit=2, device="cpu")

    code, out, err = run("eval", model, *text, *common)
    assert code == 0, err
    alone = json.loads(file.read_text())
    assert alone["perplexity"] == plain.perplexity
    assert "tasks" not in alone

    code, out, err = run("eval", model, "--tasks", tasks, "--limit", 2, *common)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert "perplexity" not in found
    assert found["limit"] == 2
    assert found["mean_accuracy"] == accuracies.mean_accuracy
    assert [(row["name"], row["items"], row["accuracy"]) for row in found["tasks"]] == [
        (row.name, 2, row.accuracy) for row in accuracies.tasks
    ]
    for row in accuracies.tasks:
        assert f"{row.accuracy:.1%}" in out
    assert "perplexity" not in out

    code, out, err = run("eval", model, *text, "--tasks", tasks, "--limit", 2, *common)
    assert code == 0, err
    both = json.loads(file.read_text())
    assert set(both) == set(alone) | set(found)
    assert both["perplexity"] == plain.perplexity
    assert both["mean_accuracy"] == accuracies.mean_accuracy
    assert both["seconds"] > max(row["seconds"] for row in both["tasks"])


def refused(run: Run, *args: Any) -> str:
    code, out, err = run(*args)
    assert code == 2, (out, err)
    assert "Traceback" not in err
    return " ".join(err.split())


def test_wrong_evaluations(run: Run, tiny_checkpoint: Any, tasks: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama")
    assert "no such file" in refused(run, "eval", model, "--tasks", tmp_path / "no.jsonl")
    assert "--limit is of --tasks" in refused(run, "eval", model, "--limit", 3)
    assert "limit is 0" in refused(run, "eval", model, "--tasks", tasks, "--limit", 0)
    # Before the perplexity, whose dataset is wrong too.
    options = ["--dataset", tmp_path / "no.txt", "--tasks", tmp_path / "no.jsonl"]
    assert "no.jsonl" in refused(run, "eval", model, *options)


def test_wrong_ablations_write_nothing(run: Run, tiny_checkpoint: Any, tmp_path: Path) -> None:
    request = ["ablation", tiny_checkpoint("llama"), "-o", tmp_path / "out"]
    rows = tmp_path / "mine.yaml"
    for text, part in (
        ("perplexity: [builtin]\nrows: [{name: a, shceme: w4a8}]\n", "did you mean 'scheme'"),
        ("perplexity: [builtin]\nrows: []\n", "rows is empty"),
    ):
        rows.write_text(text)
        err = refused(run, *request, "--rows", rows)
        assert part in err
        assert "mine.yaml" in err
    rows.write_text("tasks: [nowhere/at/all]\nrows: [{name: a}]\n")
    assert "no such file" in refused(run, *request, "--rows", rows)
    assert "no file and none of those" in refused(run, *request, "--rows", "ablat.yaml")
    assert not (tmp_path / "out").exists()


def test_names_are_split_at_commas_and_files_are_not(tmp_path: Path) -> None:
    odd = tmp_path / "a,b.jsonl"
    odd.touch()
    assert split_names(["piqa, arc_easy", str(odd)]) == ["piqa", "arc_easy", str(odd)]
    assert split_names(None) == []
