"""What `gpu.py` checks, compiles and times, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import attention, checks, gate_up, gemm, trials
from benchmarks.roofline import COPY_BYTES, PEAK_SIZE, measure_peaks
from benchmarks.shapes import CONTEXTS, MODELS, TOKENS, ModelShape
from benchmarks.worker import COMPILE_S, Item

BACKENDS = gemm.BACKENDS
# Seconds of an item until it counts as hanging. Triton's and Humming's compile.
LIMITS = {"triton": COMPILE_S, "cutlass": 20.0, "baseline": 20.0, "humming": 60.0, "torch": 60.0}
FFN_TOKENS = 16 * 1024


@dataclass(frozen=True)
class Tier:
    """Shapes of one importance."""

    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What is timed: the first tier must be there, each adds to those before it."""

    models: tuple[ModelShape, ...]
    attention_models: tuple[ModelShape, ...]
    tiers: tuple[Tier, ...]
    peak_sizes: tuple[int, int]


PLAN = Plan(
    MODELS,
    (MODELS[0], MODELS[3], MODELS[1]),  # the one that is missing has the first one's heads
    (
        Tier((1, 16, 64, 4096), (16384,), (1, 16)),
        Tier((2048, FFN_TOKENS), (4096, 32768), attention.BATCHES),
        Tier(TOKENS, CONTEXTS, attention.BATCHES),
    ),
    (PEAK_SIZE, COPY_BYTES),
)
TINY = ModelShape("tiny", 128, 128, 2, 1, 64)
SMALL_PLAN = Plan((TINY,), (TINY,), (Tier((3,), (70,), (2,)),), (64, 2**16))


def check_items(small: bool, device: torch.device, backends: Sequence[str]) -> list[Item]:
    """All trials, groups by turns."""
    found = []
    for trial in trials.by_turns([make(small) for make in trials.GROUPS.values()]):
        for backend in attention.backends(trial.op, device):
            if backend in trial.backends and backend in backends:
                key, run = name_of(trial.key, backend), partial(checks.run, trial, device, backend)
                found.append(Item(key, run, LIMITS[backend], f"{trial.op} ({backend})"))
    return found


def name_of(key: str, backend: str) -> str:
    """A trial's key, its op marked with the backend where it is not Triton's."""
    op, _, label = key.partition(":")
    return key if backend == "triton" else f"{op} ({backend}):{label}"


def compile_items(small: bool, device: torch.device, backends: Sequence[str]) -> list[Item]:
    """One launch of the kernels that `measure_items` times of those who compile."""
    plan = SMALL_PLAN if small else PLAN
    found = []
    for tier in plan.tiers[:2]:
        for shape in gemm.shapes(plan.models):
            for m in tier.tokens:
                for who in _ours(device, backends):
                    if who.backend == "triton" or _is_humming_timed(who, shape, m, plan):
                        run = partial(gemm.compile_once, shape, m, who, device)
                        found.append(Item(f"{_sizes(shape, m)} {who.label}", run))
    if "triton" not in backends:
        return found
    found += [
        Item(f"{shape.n} x {shape.k}, {m} codes", partial(gate_up.compile_once, shape, m, device))
        for tier in plan.tiers[:2]
        for shape in gemm.shapes(plan.models)
        for m in tier.tokens
        if gate_up.is_one(shape)
    ]
    context = plan.tiers[-1].contexts[0]
    for model in plan.attention_models:
        make = partial(attention.prefill_calls, model, context, device)
        found.append(Item(f"{model.name} prefill", partial(_first, make)))
        for batch in plan.tiers[-1].batches:
            make = partial(attention.decode_calls, model, batch, context, device)
            found.append(Item(f"{model.name} decode {batch}", partial(_first, make)))
    return found


def measure_items(small: bool, device: torch.device, backends: Sequence[str]) -> list[Item]:
    """The device's ceilings, then tiers of shapes, GEMMs and attention by turns.

    An item is one time of one contestant, so that a kernel that hangs takes no other's with it;
    `about` is the rest of its row (`gemm.joined` and its like).
    """
    plan = SMALL_PLAN if small else PLAN
    ceilings = partial(measure_peaks, device, *plan.peak_sizes)
    found = {"peaks": Item("peaks", lambda: asdict(ceilings()), LIMITS["torch"])}
    for tier in plan.tiers:
        items: list[Item] = []
        for shape in gemm.shapes(plan.models):
            items += _gemm_items(shape, tier.tokens, plan, device, backends)
            items += _gate_up_items(shape, tier.tokens, device, backends)
        for model in plan.attention_models:
            for context in tier.contexts:
                pairs = [("prefill", 1), *(("decode", batch) for batch in tier.batches)]
                for op, batch in pairs:
                    items += _attention_items(op, model, batch, context, device, backends)
        for item in items:
            found.setdefault(item.key, item)
    return list(found.values())


def _gemm_items(
    shape: gemm.Shape,
    tokens: Sequence[int],
    plan: Plan,
    device: torch.device,
    backends: Sequence[str],
) -> list[Item]:
    found = []
    for who in (*gemm.TORCH, *_ours(device, backends)):
        backend = "torch" if who.fmt is None else who.backend
        for m in tokens:
            if who.backend == "humming" and not _is_humming_timed(who, shape, m, plan):
                continue
            run = partial(gemm.measure_gemm, shape, m, who, device)
            about = gemm.about(shape, m, who)
            key = f"gemm: {_sizes(shape, m)} {who.label}"
            found.append(Item(key, run, LIMITS[backend], _subject(who), about))
    for m in tokens if "triton" in backends else ():
        for kind in ("fp8", "int8"):
            about = {"backend": "quantize", "m": m, "k": shape.k, "kind": kind}
            run = partial(gemm.measure_quantize, m, shape.k, kind, device)
            found.append(Item(f"gemm: quantize [{m}, {shape.k}] {kind}", run, about=about))
    return found


def _gate_up_items(
    shape: gemm.Shape, tokens: Sequence[int], device: torch.device, backends: Sequence[str]
) -> list[Item]:
    found = []
    for who in _ours(device, backends) if gate_up.is_one(shape) else ():
        for m in tokens if who.backend not in ("baseline", "humming") else ():
            for apart in (False, True) if "triton" in backends else (False,):
                run = partial(gate_up.measure_gate_up, shape, m, who, apart, device)
                key = f"gate_up: {_sizes(shape, m)} {who.label}{' apart' * apart}"
                limit = LIMITS["triton" if apart else who.backend]  # Triton's op is the second
                about = gate_up.about(shape, m, who, apart)
                found.append(Item(key, run, limit, _subject(who), about))
    return found


def _attention_items(
    op: str,
    model: ModelShape,
    batch: int,
    context: int,
    device: torch.device,
    backends: Sequence[str],
) -> list[Item]:
    found = []
    for who in attention.contestants(op, device):
        backend = "torch" if who == attention.SDPA else who.partition(",")[0]
        if backend == "torch" or backend in backends:
            shape = (op, model, batch, context, who)
            key = f"attention: {op} {model.name} {batch} x {context} {who}"
            run = partial(attention.measure_attention, *shape, device)
            subject = "" if backend == "torch" else f"{op}_attention ({who})"
            about = attention.about(*shape)
            found.append(Item(key, run, LIMITS[backend], subject, about))
    return found


def _ours(device: torch.device, backends: Sequence[str]) -> list[gemm.Contestant]:
    """Contestants of these backends, what compiles last."""
    found = [who for who in gemm.contestants(device) if who.backend in backends]
    return sorted(found, key=lambda who: who.backend == "triton")


def _is_humming_timed(who: gemm.Contestant, shape: gemm.Shape, m: int, plan: Plan) -> bool:
    """Humming compiles for every shape and M: only the first model's, and the first tier's."""
    mine = shape.names[0].startswith(plan.models[0].name) and m in plan.tiers[0].tokens
    return who.backend == "humming" and mine


def _subject(who: gemm.Contestant) -> str:
    return f"gemm_{who.fmt.scheme} ({who.backend})" if who.fmt else ""


def _sizes(shape: gemm.Shape, m: int) -> str:
    return f"{shape.names[0]} [{m}, {shape.k}] x [{shape.n}, {shape.k}]"


def _first(make: Callable[[], Sequence[Callable[[], Any]]]) -> None:
    make()[0]()
