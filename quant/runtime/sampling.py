"""From logits l [V] to a token, in vLLM's terms and order: penalty, temperature, limits, draw.

    repetition penalty r, for every token i of the prompt and the output so far (CTRL, Keskar et al.
    2019, section 4.1, with the usual change that a negative logit is multiplied):
            l_i := l_i / r where l_i > 0,  l_i r elsewhere
    w_i = exp((l_i - max l) / temperature)             so that the likeliest token has w = 1
    min-p:  keep i with w_i >= min_p
    top-k:  of those, keep the k of largest w
    top-p:  of those, by falling w, keep i while (sum of w before i) < top_p * (sum of w)
    draw:   u uniform in [0, 1); the first i, by token id, with w_0 + .. + w_i > u * (sum of w)

Of equal w the lower token id counts as the larger. Computed in FP64 with one u per token, from a
generator on the CPU that belongs to the request: a sequence's tokens depend on its own logits and
seed, not on the device or on what else is in the batch. Log-probabilities are those of the model,
log softmax(l) before anything above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import RequestError, WorkFailed


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when they end; names and defaults as in vLLM.

    temperature: 0 is greedy. top_k: 0 or -1 is off. seed: None draws a fresh one. max_tokens: of
    output. repetition_penalty: 1 is off, more makes repeating less likely. logprobs: of how many of
    the likeliest tokens the log-probability is reported, beside the chosen one's; None: of none.
    stop: strings that end the text and are cut off it. stop_token_ids: tokens that end it,
    as the model's end-of-sequence tokens do unless ignore_eos.

    Raises RequestError naming the field, its value and what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, _in_range(self.temperature, 0, math.inf), ">= 0")
        _check("top_k", self.top_k, _is_int(self.top_k, -1), "a whole number >= -1; 0, -1: off")
        above_zero = _in_range(self.top_p, 0, 1) and self.top_p > 0
        _check("top_p", self.top_p, above_zero, "> 0 and <= 1")
        _check("min_p", self.min_p, _in_range(self.min_p, 0, 1), ">= 0 and <= 1")
        seed_fits = self.seed is None or (_is_int(self.seed, 0) and self.seed < 2**63)
        _check("seed", self.seed, seed_fits, "None, or a whole number >= 0 and < 2^63")
        _check("max_tokens", self.max_tokens, _is_int(self.max_tokens, 1), "a whole number >= 1")
        penalty = _in_range(self.repetition_penalty, 0, math.inf) and self.repetition_penalty > 0
        _check("repetition_penalty", self.repetition_penalty, penalty, "> 0; 1: off")
        reported = self.logprobs is None or _is_int(self.logprobs, 0)
        _check("logprobs", self.logprobs, reported, "None, or a whole number >= 0")
        strings = [self.stop] if isinstance(self.stop, str) else self.stop
        _check(
            "stop",
            self.stop,
            _all(strings, lambda s: isinstance(s, str) and s),
            "None, a string or strings, not empty",
        )
        ids = self.stop_token_ids
        _check("stop_token_ids", ids, _all(ids, lambda i: _is_int(i, 0)), "None or ids >= 0")
        _check("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "True or False")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def generator(self) -> torch.Generator:
        """The source of one request's random numbers: the seed's, or a fresh one."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and its rank among all: 1 is the likeliest."""

    logprob: float
    rank: int


def penalized(
    logits: Tensor, params: Sequence[SamplingParams], token_ids: Sequence[Sequence[int]]
) -> Tensor:
    """logits [B, V] with the repetition penalties; token_ids: a row's prompt and output."""
    rows = [row for row, one in enumerate(params) if one.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        seen = torch.tensor(sorted(set(token_ids[row])), device=logits.device)
        old, penalty = logits[row, seen], params[row].repetition_penalty
        logits[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def token_logprobs(logits: Tensor, token: int, count: int) -> dict[int, Logprob]:
    """logits [V] -> the chosen token's log-probability, and those of the `count` likeliest."""
    logprobs = logits.double().log_softmax(-1)
    ids = logprobs.sort(descending=True, stable=True).indices
    top = ids[:count].tolist()
    ranks = {int(i): rank for rank, i in enumerate(top, 1)}
    ranks.setdefault(token, int((ids == token).nonzero()) + 1)
    return {i: Logprob(float(logprobs[i]), rank) for i, rank in ranks.items()}


def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> Tensor:
    """logits [B, V] of any float dtype, one set of params and generator a row -> tokens [B] int64.

    Greedy rows take no random number. Raises WorkFailed where logits are not numbers.
    """
    top, tokens = logits.max(dim=-1)
    if not bool(top.isfinite().all()):
        raise WorkFailed("the logits are not finite: the model is broken, or its dtype too narrow")
    drawn = [row for row, one in enumerate(params) if one.temperature > 0]
    if drawn:
        weights = token_weights(logits[drawn], [params[row] for row in drawn])
        uniforms = [torch.rand((), generator=generators[r], dtype=torch.float64) for r in drawn]
        tokens[drawn] = draw(weights, torch.stack(uniforms).to(logits.device))
    return tokens


def token_weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """logits [B, V], temperature > 0 in every row -> w [B, V] FP64, 0 where a token is excluded."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    logits = logits.double()
    temperature = column([one.temperature for one in params])
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp()
    weights = weights.where(weights >= column([one.min_p for one in params]), 0.0)
    limited = [row for row, one in enumerate(params) if one.top_k > 0 or one.top_p < 1]
    if limited:
        top_k = column([params[r].top_k if params[r].top_k > 0 else math.inf for r in limited])
        top_p = column([params[r].top_p if params[r].top_p < 1 else math.inf for r in limited])
        weights[limited] = _keep_largest(weights[limited], top_k, top_p)
    return weights


def _keep_largest(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """weights [B, V]; top_k and top_p [B, 1], infinite where off -> weights, 0 where excluded."""
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    ordered = ordered.where(rank < top_k, 0.0)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.where(before < top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
    return torch.zeros_like(weights).scatter_(1, ids, kept)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """weights [B, V] FP64, uniforms [B] FP64 in [0, 1) -> tokens [B] int64."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # u * total may round up to total, which no token exceeds.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms.unsqueeze(1) * total, below)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _check(name: str, value: object, allowed: bool, rule: str) -> None:
    if not allowed:
        raise RequestError(f"{name} is {value!r}; allowed: {rule}")


def _in_range(value: Any, low: float, high: float) -> bool:
    """A finite number, low <= value <= high."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _is_int(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _all(values: Any, allowed: Any) -> bool:
    return values is None or (isinstance(values, (list, tuple)) and all(map(allowed, values)))
