"""What the kernels should reach, and whether they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_plan import FFN_TOKENS

DECODE_WEIGHT_BYTES = 30e6


@dataclass(frozen=True)
class Goal:
    """A figure of a row, `column`, that every row of a kind should reach."""

    name: str
    table: str
    column: str
    least: float
    covers: Callable[[dict[str, Any]], bool]


def _decodes(row: dict[str, Any]) -> bool:
    return bool(row["m"] <= 16 and row["n"] * row["k"] / 2 >= DECODE_WEIGHT_BYTES)


def _is_ffn(row: dict[str, Any]) -> bool:
    wanted = ("Llama-2-7B gate_up", "Llama-2-7B down", "Llama-3-8B gate_up", "Llama-3-8B down")
    return row["m"] == FFN_TOKENS and any(name in wanted for name in row["names"])


GOALS = (
    Goal("M <= 16, 30 MB of codes and more: x bf16", "gemm", "x_bf16", 3.0, _decodes),
    Goal("M <= 16, 30 MB and more: of the copy bandwidth", "gemm", "bandwidth", 0.75, _decodes),
    Goal("M = 64: x bf16", "gemm", "x_bf16", 2.5, lambda row: row["m"] == 64),
    Goal("M = 64: x FP8", "gemm", "x_fp8", 1.4, lambda row: row["m"] == 64),
    Goal("M >= 2048: x bf16", "gemm", "x_bf16", 1.6, lambda row: row["m"] >= 2048),
    Goal("M >= 2048: x FP8", "gemm", "x_fp8", 0.8, lambda row: row["m"] >= 2048),
    Goal("FFN of 7B and 8B at 16 x 1024 tokens: x bf16", "gemm", "x_bf16", 1.6, _is_ffn),
    Goal("gate and up with codes: x two ops", "gate_up", "x_apart", 1.0, lambda row: True),
    Goal(
        "decode attention at 16k, batch 16: x SDPA",
        "attention",
        "x_bf16",
        3.0,
        lambda row: row["op"] == "decode" and row["context"] == 16384 and row["batch"] == 16,
    ),
    Goal(
        "decode attention at 16k, batch 16: of the copy bandwidth",
        "attention",
        "bandwidth",
        0.65,
        lambda row: row["op"] == "decode" and row["context"] == 16384 and row["batch"] == 16,
    ),
    Goal(
        "prefill attention, 4k to 32k: x SDPA",
        "attention",
        "x_bf16",
        1.25,
        lambda row: row["op"] == "prefill" and 4096 <= row["context"] <= 32768,
    ),
)


def goals(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each goal beside what was measured, per backend and weight format."""
    found = []
    for goal in GOALS:
        rows = [row for row in tables[goal.table] if row.get(goal.column) and goal.covers(row)]
        for label in sorted({label_of(row) for row in rows}) or [""]:
            ratios = sorted(row[goal.column] for row in rows if label_of(row) == label)
            found.append(
                {
                    "goal": f"{goal.name} {label}".strip(),
                    "wanted": goal.least,
                    "shapes": len(ratios),
                    "reached": sum(ratio >= goal.least for ratio in ratios),
                    "least": ratios[0] if ratios else None,
                    "mean": geometric_mean(ratios),
                    "most": ratios[-1] if ratios else None,
                }
            )
    return found


def label_of(row: dict[str, Any]) -> str:
    """Whose row it is."""
    return f"{row.get('backend', '')} {row.get('format', '')}".strip()


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
