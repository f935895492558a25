"""Gate and up, and codes of silu(gate) * up for the next linear: in one op, and in two.

One op: `ops.gemm` with silu_mul, codes and scale. Two: the same without codes, and then
`quantize_activation`, by Triton, which reads the output twice or holds a token of it in one block.
Backend `triton` makes the same launches of either; what `cutlass` saves is that second reading and
the wait between two launches. Weights rotate as in `gemm.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemm import FORMATS, Contestant, Shape, number, random_weight, weights
from benchmarks.timing import measure
from quant_kernels import ops, reference

HEADER = """\
| linear | N x K | M | format | backend | us | spread | two ops us | x two ops |
|---|---|---|---|---|---|---|---|---|
"""


def is_one(shape: Shape) -> bool:
    """Whether some model has a gate and up of this shape."""
    return any(name.endswith(" gate_up") for name in shape.names)


def about(shape: Shape, m: int, who: Contestant, apart: bool) -> dict[str, Any]:
    """What a row says before it has a time; apart: of the two ops."""
    name = next((name for name in shape.names if name.endswith(" gate_up")), shape.names[0])
    fmt = who.fmt.label if who.fmt else ""
    row = {"names": (name,), "n": shape.n, "k": shape.k, "m": m, "format": fmt}
    return row | {"backend": who.backend, "apart": apart}


def measure_gate_up(
    shape: Shape, m: int, who: Contestant, apart: bool, device: torch.device
) -> dict[str, Any]:
    """The time of one op, or of two."""
    assert who.fmt is not None
    x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
    tokens = reference.quantize_activation(x, who.fmt.activation)
    held = weights(shape.n, shape.k, who, device)
    return asdict(measure(_calls(who.backend, tokens, held, apart), device))


def joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a format and backend: the one op, the two, and their ratio."""

    def key(part: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(part[name] for name in ("n", "k", "m", "format", "backend"))

    two = {key(part): part for part in parts if part["apart"]}
    rows = []
    for row in (dict(part) for part in parts if not part["apart"]):
        found = two.get(key(row), {})
        row |= {f"apart_{name}": found.get(name) for name in ("us", "spread", "how", "error")}
        both = row.get("us") and row["apart_us"]
        row["x_apart"] = row["apart_us"] / row["us"] if both else None
        rows.append(row)
    return rows


def compile_once(shape: Shape, m: int, device: torch.device) -> None:
    """Run the kernels that `measure_gate_up` will time: Triton keeps what it compiled on disk."""
    x = torch.randn(m, shape.k, dtype=torch.bfloat16, device=device)
    for fmt in FORMATS:
        tokens = reference.quantize_activation(x, fmt.activation)
        weight = random_weight(shape.n, shape.k, fmt, device)
        _calls("triton", tokens, [weight], apart=False)[0]()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = HEADER.splitlines()
    for row in rows:
        head = [row["names"][0], f"{row['n']} x {row['k']}", str(row["m"])]
        head += [row["format"], row["backend"]]
        if "error" in row:
            lines.append("| " + " | ".join([*head, row["error"]]) + " |" * 4)
            continue
        cells = [number(row["us"], 1), f"{row['spread']:.0%}"]
        cells += [number(row["apart_us"], 1), number(row["x_apart"], 2)]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _calls(
    backend: str, tokens: tuple[Tensor, Tensor], held: Sequence[Any], apart: bool
) -> list[Callable[[], object]]:
    (m, k), device = tokens[0].shape, tokens[0].device
    n = held[0].shape[0]
    size = ops.workspace_bytes(device, gemms=[(n, k)], max_tokens=m, backend=backend)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    out = torch.empty(m, n // 2, dtype=torch.bfloat16, device=device)
    codes = torch.empty(m, n // 2, dtype=tokens[0].dtype, device=device)
    scale = torch.empty(m, 1, device=device)
    options: dict[str, Any] = {"silu_mul": True, "workspace": workspace, "backend": backend}

    def together(weight: Any) -> None:
        ops.gemm(*tokens, weight, out, codes=codes, scale=scale, **options)

    def one_by_one(weight: Any) -> None:
        ops.gemm(*tokens, weight, out, **options)
        ops.quantize_activation(out, codes, scale, backend="triton")

    return [functools.partial(one_by_one if apart else together, weight) for weight in held]
