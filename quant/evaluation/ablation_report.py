"""What an ablation found: a table (Markdown and screen), figures (JSON), and a plot.

Over seeds s of a row, with p_s its perplexity and p_0 the unquantized model's:

    mean = mean over s of p_s,  spread = [min, max] of p_s,  loss = mean / p_0 - 1

Accuracies are means over tasks, their difference to the unquantized model in points.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from quant.errors import RequestError
from quant.evaluation.ablation import AblationResult, Measurement, RowResult

NAME = "ablation"


def check_plots() -> None:
    """RequestError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "the plot needs the package matplotlib: pip install 'fourbyeight[plots]', or give "
            "--no-plot"
        )


def write_results(result: AblationResult, output: str | Path, *, plot: bool = True) -> list[Path]:
    """Write ablation.md, ablation.json and, with plot, ablation.png into DIR; their paths."""
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    table, figures = folder / f"{NAME}.md", folder / f"{NAME}.json"
    table.write_text(markdown(result), encoding="utf-8")
    figures.write_text(json.dumps(summary(result), indent=2) + "\n", encoding="utf-8")
    written = [table, figures]
    if plot and result.corpora:
        written.append(folder / f"{NAME}.png")
        draw(result, written[-1])
    return written


def summary(result: AblationResult) -> dict[str, Any]:
    """`AblationResult.to_dict` and, in every row, means, spreads and losses over its seeds."""
    data = result.to_dict()
    for plain, row in zip(data["rows"], result.rows, strict=True):
        plain["perplexity"] = {
            corpus.label: {
                "mean": mean(perplexities(row, corpus.label)),
                "min": min(perplexities(row, corpus.label)),
                "max": max(perplexities(row, corpus.label)),
                "loss": loss(result, row, corpus.label),
            }
            for corpus in result.corpora
        }
        accuracies = _known(row, lambda m: m.mean_accuracy)
        plain["mean_accuracy"] = mean(accuracies) if accuracies else None
    return data


def perplexities(row: RowResult, corpus: str) -> list[float]:
    return [measurement.perplexities[corpus] for measurement in row.measurements]


def loss(result: AblationResult, row: RowResult, corpus: str) -> float:
    """mean / p_0 - 1."""
    return mean(perplexities(row, corpus)) / perplexities(result.rows[0], corpus)[0] - 1


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def table_cells(result: AblationResult) -> tuple[list[str], list[list[str]]]:
    """The table's header and its rows, as texts."""
    header = ["row", *(corpus.label for corpus in result.corpora)]
    header += ["accuracy"] if result.tasks else []
    header += ["bits", "seconds", "peak memory"]
    return header, [_cells(result, row) for row in result.rows]


def markdown(result: AblationResult) -> str:
    """The table with what was measured above it."""
    header, rows = table_cells(result)
    lines = [f"# {result.model}", ""]
    for corpus in result.corpora:
        windows = f"the first {corpus.max_windows}" if corpus.max_windows else "all"
        lines.append(
            f"- {corpus.label}: perplexity on {windows} windows of {corpus.max_seq_length} tokens "
            f"of `{corpus.dataset}`"
        )
    if result.tasks:
        items = "all items" if result.limit is None else f"the first {result.limit} items"
        tasks = ", ".join(result.rows[0].measurements[0].accuracies)
        lines.append(f"- accuracy: mean over {tasks}; {items} of each")
    lines += ["- means over seeds, [least, most] in brackets; seconds and memory of quantizing", ""]
    lines.append(f"| {' | '.join(header)} |")
    lines.append(f"|{'---|' * len(header)}")
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(result: AblationResult, path: Path) -> None:
    """Loss of perplexity by row, a bar a corpus; the line over it is from the least to the most."""
    from matplotlib.figure import Figure

    rows = result.rows[1:]
    height = 0.8 / len(result.corpora)
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows) * max(1, len(result.corpora) / 2)))
    axes = figure.subplots()
    for i, corpus in enumerate(result.corpora):
        base = perplexities(result.rows[0], corpus.label)[0]
        values = [100 * loss(result, row, corpus.label) for row in rows]
        found = [perplexities(row, corpus.label) for row in rows]
        low = [value - 100 * (min(p) / base - 1) for value, p in zip(values, found, strict=True)]
        high = [100 * (max(p) / base - 1) - value for value, p in zip(values, found, strict=True)]
        # One draw has no spread, which is not a spread of zero: NaN is not drawn.
        spread = [
            [max(0.0, e) if len(p) > 1 else math.nan for e, p in zip(side, found, strict=True)]
            for side in (low, high)
        ]
        places = [
            place + (i - (len(result.corpora) - 1) / 2) * height for place in range(len(rows))
        ]
        axes.barh(places, values, height, xerr=spread, capsize=2, label=corpus.label)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("perplexity above the unquantized model's, %")
    axes.set_title(Path(result.model).name)
    if len(result.corpora) > 1:
        axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _cells(result: AblationResult, row: RowResult) -> list[str]:
    first = row is result.rows[0]
    cells = [row.name]
    for corpus in result.corpora:
        found = perplexities(row, corpus.label)
        cell = f"{mean(found):.3f}"
        if len(found) > 1:
            cell += f" [{min(found):.3f}, {max(found):.3f}]"
        cells.append(cell if first else f"{cell} {loss(result, row, corpus.label):+.1%}")
    if result.tasks:
        accuracy = mean(_known(row, lambda m: m.mean_accuracy))
        base = mean(_known(result.rows[0], lambda m: m.mean_accuracy))
        cells.append(f"{accuracy:.1%}" + ("" if first else f" ({100 * (accuracy - base):+.1f})"))
    cells.append(f"{mean(m.bits_per_weight for m in row.measurements):.2f}")
    seconds = _known(row, lambda m: m.seconds)
    memory = _known(row, lambda m: m.peak_memory_bytes)
    cells.append(f"{mean(seconds):.0f}" if seconds else "")
    cells.append(f"{max(memory) / 1e9:.2f} GB" if memory else "")
    return cells


def _known(row: RowResult, figure: Callable[[Measurement], float | None]) -> list[float]:
    """A figure of every measurement that has it."""
    return [value for m in row.measurements if (value := figure(m)) is not None]
