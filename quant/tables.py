"""What the commands print: results as rich tables. Sizes in decimal units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from quant.evaluation.ablation_report import table_cells
from quant.passes import pass_name
from quant.report import RunReport

if TYPE_CHECKING:
    from quant.calibration.quantize import RunPlan
    from quant.checkpoint.inspection import Inspection
    from quant.demo import DemoResult
    from quant.doctor import Diagnosis
    from quant.evaluation.ablation import AblationResult
    from quant.evaluation.perplexity import Perplexity
    from quant.evaluation.tasks import TaskResults

# The layers that lost most are what a reader looks for first.
WORST_LAYERS = 5
PLACES = {"device": "on the device", "cpu": "in host memory", "disk": "on disk"}


def size(count: float) -> str:
    """Bytes for people: 113.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def key_value(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for key, value in rows:
        table.add_row(key, Text(value))
    return table


def run_table(report: RunReport) -> Table:
    first = report.layers[0]
    group = "per channel" if first.group_size < 0 else f"group {first.group_size}"
    before = sum(row.error_before for row in report.layers) / len(report.layers)
    after = sum(row.error_after for row in report.layers) / len(report.layers)
    worst = sorted(report.layers, key=lambda row: row.error_after, reverse=True)[:WORST_LAYERS]
    raised = [row for row in report.layers if row.damping and row.damping > asked_damping(report)]
    rows = [
        ("scheme", f"{first.scheme} ({first.numerics}), {group}"),
        ("layers", f"{len(report.layers)} quantized, {len(report.ignored)} left alone"),
        ("size on disk", f"{size(report.source_size_bytes)} -> {size(report.size_bytes)}"),
        ("bits per weight", f"{report.bits_per_weight:.3f} in the quantized layers"),
        ("output error", f"{after:.3%} mean over layers (round to nearest: {before:.3%})"),
        ("worst layers", "\n".join(f"{row.name}  {row.error_after:.3%}" for row in worst)),
        ("seconds", f"{report.seconds:.1f}"),
        ("peak memory", memory_line(report)),
    ]
    if report.recipe["kv_cache"] != "none":
        rows.insert(1, ("KV cache", report.recipe["kv_cache"]))
    if report.resumed_blocks:
        rows.insert(2, ("resumed", f"{report.resumed_blocks} blocks were done before"))
    if report.rotation:
        rows.insert(2, ("rotation", report.rotation))
    for item in report.skipped:
        names = ", ".join(item.names)
        rows.insert(2, ("NOT QUANTIZED", f"{names}: {item.reason}"))
    if raised:
        names = "\n".join(f"{row.name}  {row.damping:g}" for row in raised)
        rows.insert(6, ("more damping", names))
    return key_value(f"wrote {report.output}", rows)


def memory_line(report: RunReport) -> str:
    """The peak beside what it should stay under: 1.5 x what has to be there."""
    inside = report.activation_bytes if report.activation_place == "cpu" else 0
    place = PLACES[report.activation_place]
    line = (
        f"{size(report.peak_memory_bytes)}; 1.5 x ({size(report.block_bytes)} a block + "
        f"{size(inside)} of {size(report.activation_bytes)} activations, {place}) + "
        f"{size(report.start_memory_bytes)} at the start = {size(report.memory_limit_bytes)}"
    )
    if report.peak_device_bytes is not None:
        line += f"\n{size(report.peak_device_bytes)} on the device"
    return line


def asked_damping(report: RunReport) -> float:
    """The damping of the recipe, which a stubborn Hessian may have raised."""
    options = [options for step in report.recipe["passes"] for options in step.values()]
    return float(next((found["damping"] for found in options if "damping" in found), 0.0))


def plan_table(plan: RunPlan) -> Table:
    fmt = plan.recipe.weight_format
    calibration = plan.recipe.calibration
    group = "per channel" if fmt.per_channel else f"group {fmt.group_size}"
    kept = sum(row.fmt is None for row in plan.layers)
    tokens = calibration.num_calibration_samples * calibration.max_seq_length
    passes = ", ".join(pass_name(step) for step in plan.recipe.passes)
    if plan.recipe.undecided:
        passes = passes.replace("rotate", "rotate (where it pays, as measured by the run)")
    rows = [
        ("source", f"{plan.source} ({plan.model_type})"),
        ("scheme", f"{fmt.scheme} ({fmt.numerics}), {group}"),
        ("KV cache", plan.recipe.kv_cache),
        ("passes", passes),
        ("layers", f"{len(plan.layers) - kept} to quantize, {kept} left alone"),
        (
            "calibration",
            f"{calibration.num_calibration_samples} x {calibration.max_seq_length} = "
            f"{tokens:,} tokens of {calibration.dataset}",
        ),
        ("size on disk", f"{size(plan.source_size_bytes)} -> about {size(plan.size_bytes)}"),
        ("bits per weight", f"{plan.bits_per_weight:.3f} in the quantized layers"),
        (
            "memory",
            f"about {size(plan.memory_bytes)} beside the program: {size(plan.block_bytes)} a block "
            f"in FP32, {size(plan.activation_bytes)} activations ({PLACES[plan.activation_place]})",
        ),
        ("disk", f"{size(plan.disk_bytes)} while it runs"),
    ]
    if plan.seconds is not None:
        rows.append(("time", f"about {duration(plan.seconds)}, from one measured block"))
    return key_value("dry run: nothing is written", rows)


def perplexity_table(model: str, dataset: str, result: Perplexity) -> Table:
    rows = [
        ("perplexity", f"{result.perplexity:.3f}"),
        ("dataset", dataset),
        ("tokens", f"{result.tokens:,} predicted, {result.windows} windows of {result.window}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("peak memory", size(result.peak_memory_bytes)),
    ]
    return key_value(model, rows)


def tasks_table(model: str, results: TaskResults) -> Table:
    table = Table(
        title=Text(model),
        caption=f"{results.seconds:.1f} s, peak memory {size(results.peak_memory_bytes)}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("task", "accuracy", "per character", "items", "seconds"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for row in results.tasks:
        error = "" if row.standard_error is None else f" ± {row.standard_error:.1%}"
        norm = "" if row.accuracy_norm is None else f"{row.accuracy_norm:.1%}"
        accuracy = f"{row.accuracy:.1%}{error}"
        table.add_row(row.name, accuracy, norm, f"{row.items:,}", f"{row.seconds:.1f}")
    if len(results.tasks) > 1:
        table.add_section()
        table.add_row("mean", f"{results.mean_accuracy:.1%}")
    return table


def ablation_table(result: AblationResult) -> Table:
    header, rows = table_cells(result)
    table = Table(title=Text(result.model), title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def inspection_table(found: Inspection) -> Table:
    scheme = f"{found.scheme} ({found.numerics})" if found.scheme else "not quantized"
    if found.kv_cache:
        scheme += f", KV cache {found.kv_cache}"
    table = Table(
        title=Text(f"{found.directory}: {found.model_type}, {scheme}"),
        caption=f"{size(found.size_bytes)} on disk, {found.bits_per_weight:.3f} bits per weight "
        "in the blocks' linears",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("layer", "shape", "weights", "inputs", "bits", "error"):
        right = column in ("shape", "bits", "error")
        # A narrow screen folds words; figures stay whole.
        table.add_column(
            column, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in found.layers:
        error = "" if row.error is None else f"{row.error:.3%}"
        shape = f"{row.shape[0]} x {row.shape[1]}"
        bits = f"{row.bits_per_weight:.3f}"
        name = row.name.removeprefix("model.layers.")
        table.add_row(name, shape, row.format, row.activations, bits, error)
    return table


def diagnosis_tables(found: Diagnosis) -> Iterator[Table]:
    yield key_value("versions", list(found.versions.items()))
    for title, checks in (("libraries and devices", found.libraries), ("schemes", found.schemes)):
        table = Table(title=title, title_justify="left")
        for column in ("what", "works", "detail"):
            table.add_column(column)
        for check in checks:
            works = Text("yes", "green") if check.ok else Text("no", "yellow")
            table.add_row(check.name, works, Text(check.detail))
        yield table
    reasons = sorted({f"{row.backend}: {row.missing}" for row in found.ops if row.missing})
    table = Table(title="kernels", title_justify="left", caption="\n".join(reasons) or None)
    for column in ("op", "device", "backend", "works here", "how"):
        table.add_column(column)
    for row in found.ops:
        works = Text("no", "yellow") if row.missing else Text("yes", "green")
        table.add_row(row.op, row.device, row.backend, works, Text(row.how))
    yield table


def demo_tables(result: DemoResult) -> Iterator[Table | Text]:
    before, after = result.before, result.after
    texts = Table(title="greedy continuations", title_justify="left", show_lines=True)
    texts.add_column("prompt", ratio=1)
    texts.add_column("BF16", ratio=2)
    scheme = f"{result.quantization.layers[0].scheme}"
    texts.add_column(scheme, ratio=2)
    for prompt, old, new in zip(result.prompts, before.texts, after.texts, strict=True):
        texts.add_row(Text(prompt), Text(old.strip()), Text(new.strip()))
    yield texts
    table = Table(title=Text(result.model), title_justify="left")
    for column in ("", "BF16", scheme):
        table.add_column(column, justify="left" if not column else "right")
    ratio = after.perplexity / before.perplexity - 1
    rows = [
        ("perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f} ({ratio:+.1%})"),
        ("size on disk", size(before.size_bytes), size(after.size_bytes)),
        ("bits per weight", f"{before.bits_per_weight:.2f}", f"{after.bits_per_weight:.2f}"),
        ("seconds to quantize", "", f"{result.quantization.seconds:.1f}"),
        ("peak memory to quantize", "", size(result.quantization.peak_memory_bytes)),
        ("seconds to measure", f"{before.seconds:.1f}", f"{after.seconds:.1f}"),
        ("peak memory to measure", size(before.peak_memory_bytes), size(after.peak_memory_bytes)),
    ]
    for row in rows:
        table.add_row(*row)
    yield table
    yield Text(
        f"Perplexity over {before.tokens:,} tokens of text that ships with Python; bits per weight "
        "in the quantized layers. Go on with:\n"
    )
    yield Text(f"quantize generate {result.output} --chat --prompt Hello", no_wrap=True)
