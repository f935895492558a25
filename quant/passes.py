"""The passes of a recipe and their options; what each does is told by its file in `calibration/`.

A recipe has at most one of each, in this order, and exactly one of the last two:

    rotate -> smooth -> rope -> round | compensate
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from quant.architectures import SITES
from quant.errors import RequestError

SCALE_SEARCHES = ("absmax", "mse", "hessian")
SMOOTHINGS = ("adaptive", "channel", "search")
KEY_SCALES = ("none", "channels", "optimal")
ROTATE_WHEN = ("always", "better")


@dataclass(frozen=True)
class RotatePass:
    """Offline rotations (QuaRot, as QQQ uses it); see `calibration/rotation.py`.

    residual: of the residual stream; norms are folded, a tied head is untied. heads: of every
    value head. seed: of the random signs. when: "always", or "better": where the model's first
    blocks show that it pays (`calibration/choice.py`).
    """

    residual: bool = True
    heads: bool = True
    seed: int = 0
    when: str = "always"

    def check(self) -> None:
        require(self.residual or self.heads, "rotate: neither residual nor heads is rotated")
        one_of("rotate.when", self.when, ROTATE_WHEN)
        require(self.seed >= 0, f"rotate: seed is {self.seed}; it must not be negative")


@dataclass(frozen=True)
class SmoothPass:
    """Scales between a site's input channels and its weights; see `calibration/smoothing.py`.

    method: "adaptive" (QQQ: one threshold a site), "channel" (FireQ: homogeneous weight columns),
    or "search" (the best of both, of exponents, and of nothing). strength: exponent of "channel".
    """

    method: str = "adaptive"
    sites: tuple[str, ...] = tuple(SITES)
    strength: float = 1.0

    def check(self) -> None:
        one_of("smooth.method", self.method, SMOOTHINGS)
        require(bool(self.sites), "smooth.sites is empty")
        for site in self.sites:
            one_of("smooth.sites", site, tuple(SITES))
        require(
            0 < self.strength <= 1,
            f"smooth.strength is {self.strength}; it must be in (0, 1]",
        )


@dataclass(frozen=True)
class RopePass:
    """Scales of keys for a quantized KV cache (FireQ and beyond); see `calibration/rope.py`.

    Does nothing without a quantized cache. turn: turn every pair of channels before RoPE, folded
    into q and k, to where keys take the least range. pre: exponent of the scale of every pair
    before RoPE, folded too; 0: none. post: of channels after RoPE, applied online: "channels" (by
    their maxima), "optimal" (least error of the attention), or "none". strength and top_k: of
    "channels"; top_k 0 means all.
    """

    turn: bool = False
    pre: float = 0.0
    post: str = "optimal"
    strength: float = 0.5
    top_k: int = 0

    def check(self) -> None:
        one_of("rope.post", self.post, KEY_SCALES)
        require(0 <= self.pre <= 1, f"rope.pre is {self.pre}; it must be in [0, 1]")
        require(0 < self.strength <= 1, f"rope.strength is {self.strength}; it must be in (0, 1]")
        require(
            not self.turn or self.post == "optimal",
            f"rope.turn is for post: optimal; post is {self.post}",
        )
        require(self.top_k >= 0, f"rope.top_k is {self.top_k}; it must not be negative")
        require(self.pre > 0 or self.post != "none", "rope: neither pre nor post scales anything")


@dataclass(frozen=True)
class RoundPass:
    """Round to nearest on the format's true grid (RTN): the baseline."""

    scales: str = "absmax"

    def check(self) -> None:
        one_of("scales", self.scales, SCALE_SEARCHES)


@dataclass(frozen=True)
class CompensatePass:
    """Hessian compensation (GPTQ) on the format's true grid; see `calibration/compensation.py`.

    feedback: share of the residual stream's error that later blocks are asked to repair, and ridge,
    how cautiously (`calibration/feedback.py`); 0: none.
    """

    scales: str = "hessian"
    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    feedback: float = 0.0
    ridge: float = 0.1

    def check(self) -> None:
        one_of("scales", self.scales, SCALE_SEARCHES)
        require(0 < self.damping <= 1, f"damping is {self.damping}; it must be in (0, 1]")
        require(self.block_size > 0, f"block_size is {self.block_size}; it must be positive")
        require(0 <= self.feedback <= 1, f"feedback is {self.feedback}; it must be in [0, 1]")
        require(0 < self.ridge <= 1, f"ridge is {self.ridge}; it must be in (0, 1]")


Rounding = RoundPass | CompensatePass
Pass = RotatePass | SmoothPass | RopePass | RoundPass | CompensatePass
PASSES: dict[str, type[Pass]] = {
    "rotate": RotatePass,
    "smooth": SmoothPass,
    "rope": RopePass,
    "round": RoundPass,
    "compensate": CompensatePass,
}


def pass_name(step: Pass) -> str:
    return next(name for name, cls in PASSES.items() if type(step) is cls)


def check_passes(passes: tuple[Pass, ...]) -> None:
    """RequestError where the passes do not make a recipe."""
    for step in passes:
        step.check()
    names = [pass_name(step) for step in passes]
    roundings = [name for name in names if name in ("round", "compensate")]
    require(
        len(roundings) == 1,
        f"passes: {', '.join(names) or 'none'}: {len(roundings)} of them round the weights; "
        "exactly one must, round or compensate",
    )
    order = sorted(names, key=list(PASSES).index)
    require(names == order, f"passes: {', '.join(names)} must be in the order {', '.join(order)}")
    for name in names:
        require(names.count(name) == 1, f"passes: {name} is given {names.count(name)} times")


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean ...?" where something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    require(
        value in known,
        f"{key} {value!r} is unknown; known: {', '.join(known)}{nearest(value, list(known))}",
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)
