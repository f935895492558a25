"""The commands `quantize eval` and `quantize ablation`: options in, tables and figures out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from quant import tables
from quant.console import (
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    TrustRemoteCode,
    check_json_path,
    err,
    out,
    progress_bars,
    write_json,
)
from quant.errors import RequestError

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK",
        help="Multiple-choice task: a .jsonl file, a directory of them, or lm-eval's names, "
        "comma-separated. Repeatable.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first items of every task.")]


def evaluate(
    model: Model,
    dataset: Annotated[
        str | None,
        typer.Option(help="builtin, a file, or a hub id. (default: builtin, or none with --tasks)"),
    ] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first windows.")] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    json_path: Json = None,
) -> None:
    """Measure MODEL's perplexity, its accuracy on tasks (--tasks), or both; quantized or not.

    Perplexity: non-overlapping windows; every token of a window but the first is predicted; no BOS
    is added.
    """
    from quant.evaluation.perplexity import evaluate_perplexity
    from quant.evaluation.tasks import check_tasks, evaluate_tasks

    check_json_path(json_path)
    names = split_names(tasks)
    common: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    figures: dict[str, Any] = {"command": "eval", "model": model}
    if names:
        check_tasks(names, limit)  # before the perplexity is measured
    elif limit is not None:
        raise RequestError("--limit is of --tasks, and there is none")
    if dataset is not None or not names:
        dataset = dataset or "builtin"
        with progress_bars() as on_progress:
            result = evaluate_perplexity(
                model,
                dataset,
                window=max_seq_length,
                max_windows=max_windows,
                on_progress=on_progress,
                **common,
            )
        out.print(tables.perplexity_table(model, dataset, result))
        figures |= {"dataset": dataset, **dataclasses.asdict(result)}
    if names:
        with progress_bars() as on_progress:
            found = evaluate_tasks(model, names, limit=limit, on_progress=on_progress, **common)
        out.print(tables.tasks_table(model, found))
        measured = figures  # of both
        figures = measured | dataclasses.asdict(found)
        figures["seconds"] += measured.get("seconds", 0)
        figures["peak_memory_bytes"] = max(
            found.peak_memory_bytes, measured.get("peak_memory_bytes", 0)
        )
    write_json(json_path, figures)


def ablation(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Results; made or continued.")
    ],
    rows: Annotated[
        str, typer.Option(metavar="FILE", help="What to compare: a YAML file, or `ablation`.")
    ] = "ablation",
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="For perplexity, instead of the file's. Repeatable."),
    ] = None,
    calibration_dataset: Annotated[
        str | None, typer.Option(help="For calibration, instead of the file's.")
    ] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw ablation.png.")] = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_path: Json = None,
) -> None:
    """Compare ways to quantize MODEL: a row for each, with its perplexities, accuracy and cost.

    Every row runs in a process of its own. The same command goes on where an unfinished one
    stopped: what is in DIR and was made from the same inputs is not made again.
    """
    from quant.evaluation.ablation import run_ablation
    from quant.evaluation.ablation_report import check_plots, write_results
    from quant.evaluation.ablation_spec import load_ablation

    check_json_path(json_path)
    if plot:
        check_plots()
    spec = load_ablation(rows).override(
        datasets=dataset,
        calibration_dataset=calibration_dataset,
        tasks=split_names(tasks) or None,
        limit=limit,
    )
    with progress_bars() as on_progress:
        result = run_ablation(
            model, spec, output, dtype=dtype, device=device, on_progress=on_progress
        )
    written = write_results(result, output, plot=plot)
    out.print(tables.ablation_table(result))
    err.print(f"wrote {', '.join(map(str, written))}", style="dim", soft_wrap=True)
    write_json(json_path, {"command": "ablation", **result.to_dict()})


def split_names(tasks: list[str] | None) -> list[str]:
    """Every value is a file or a directory, or names with commas between them."""
    found: list[str] = []
    for value in tasks or []:
        parts = [value] if Path(value).expanduser().exists() else value.split(",")
        found += [part.strip() for part in parts if part.strip()]
    return found
