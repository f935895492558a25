"""RoPE-aware scaling of keys, so that an INT4 KV cache loses less of the attention scores.

From FireQ (arXiv 2505.20839): a pair scale before RoPE and a channel scale after it. Per KV head,
with k_t a key after RoPE, q_i a query of one of the r query heads that read it, and (c, c + D/2)
the channels that RoPE turns together (rotate-half layout only):

    pre-RoPE     k' = n k, q' = q / n       n equal on a pair, so it commutes with the rotation and
                                            folds into k_proj, q_proj or into k_norm, q_norm
    post-RoPE    k' = s (k - u), q' = q / s    s, u free per channel, applied with RoPE

Both leave attention as it is. The first and s change no product q . k. The shift u, which is ours,
changes it to q_i . k_t - q_i . u, and what does not depend on t drops out of the softmax over t.

FireQ takes n = 1 / max|pair| and, on the top-k channels and their partners alone (n = 1 there),
s = 1 / max|k_c|. Divided by its full range, though, a channel that no query looks at gets as fine a
grid as any other. `pair_scale` and `channel_scale` take a power of the maximum, at best its root.

`optimal_transform` minimizes the loss itself. A key is rounded with the step of its token's range
R_t = max_c k'_tc - min_c k'_tc, so a score is wrong by e_it = sum_c q'_ic (rounding of k'_tc) of
variance R_t^2 sum_c (q_ic / s_c)^2, times a constant. To second order, attention then is at the
distance KL(P || P^) = 1/2 sum_t P_it (1 - P_it) E e_it^2 from what it was. Over all queries this is

    J(s, u) = sum_t R_t(s, u)^2 sum_c M_tc / s_c^2,     M_tc = sum_i P_it (1 - P_it) q_ic^2

of which only samples of k and M are needed (`KeyStatistics`). P decides: the first token takes much
of the attention and its key is like no other, so a mean of keys without weights is a bad u.

k_t and M_t depend on positions, and those of the low frequencies hardly turn in the length of a
calibration window: what is the smallest channel there is the largest at other positions. RoPE is
relative, so all queries of key t may be turned with it by any number of positions, and P stays.
Sampled tokens are turned each by a number of its own; only the first token has one place, 0.

A pair may also be turned by any angle before RoPE, q and k alike (`optimal_turn`): that commutes
with RoPE and folds into q_proj and k_proj. Range and M are of the two channels then that are worth
most apart. In 18 heads of six layers of SmolLM2, J falls by 14% on average, and by 3 to 32%.

Perplexity over unquantized with KV4, SmolLM2-135M-Instruct, WikiText-2, 4 windows of 2,048 tokens:
plain +12.3%, pair scale +10.7, FireQ's pair and top-8 channel scales at a root +7.2, channel scale
on all channels +6.3, optimal transform +3.8 (+8.7 without u and without turning sampled tokens).
With 8 windows of calibration instead of 64, +4.4; with turned pairs, +3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.decoder import KeyTransform, apply_rope, rotary_table
from quant.errors import RequestError, WorkFailed

STRENGTH = 0.5
SAMPLED_TOKENS = 4096
SAMPLED_POSITIONS = 4096
# Offsets are (uniform in 0..1)^CROWDING of the room there is: every long context has the positions
# of the short ones too.
CROWDING = 2
QUERIES_AT_ONCE = 512
STEPS, RATE = 60, 0.05
# For the angles: 4096 samples and 100 steps are no better (perplexity 24.96 and 24.94).
TURN_TOKENS, TURN_RATE = 1024, 0.1
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly however many
TINY = 1e-30


def check_rotary_layout(config: Mapping[str, Any]) -> None:
    """RequestError where a config.json says that RoPE does not turn channel c with c + D/2."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for key in ("rope_interleave", "rope_interleaved", "interleaved_rope"):
        if config.get(key) or rope.get(key):
            raise RequestError(
                f"{key} is true: RoPE turns neighbouring channels here, and key scales are for the "
                "rotate-half layout only; run without the rope pass"
            )
    for found in (config, rope):
        for key in ("partial_rotary_factor", "rotary_pct"):
            if found.get(key) is not None and float(found[key]) != 1.0:
                raise RequestError(
                    f"{key} is {found[key]!r}: RoPE turns a part of the channels only, and key "
                    "scales are for heads that are turned whole; run without the rope pass"
                )


@dataclass(frozen=True)
class KeySamples:
    """Keys of sampled tokens, after RoPE, and what rounding them costs: both [T, Hk, D] FP32.

    cross [T, Hk, D/2]: M's mixed moments, q_c q_(c + D/2); needed where pairs are to be turned.
    """

    keys: Tensor
    weights: Tensor  # M
    cross: Tensor | None = None


class KeyStatistics:
    """What calibration has seen of one layer's keys.

    pair_max [Hk, D/2]: the largest norm of a pair, the same before and after RoPE. channel_max
    [Hk, D]: the largest |k_c| after RoPE. The first max_tokens tokens are sampled too, so give
    windows of different texts first. window: of the layer's sliding attention.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        window: int | None = None,
        *,
        max_tokens: int = SAMPLED_TOKENS,
        positions: int = SAMPLED_POSITIONS,
    ) -> None:
        self._cfg, self._window = cfg, window
        self._max_tokens = max_tokens
        self._positions = min(positions, cfg.max_position_embeddings)
        self._sampled: list[KeySamples] = []
        self.tokens = 0
        self.pair_max = torch.zeros(cfg.num_kv_heads, cfg.head_dim // 2)
        self.channel_max = torch.zeros(cfg.num_kv_heads, cfg.head_dim)

    def add(self, q: Tensor, k: Tensor) -> None:
        """Windows that begin at position 0: q [B, S, Hq, D], k [B, S, Hk, D], after RoPE."""
        self.tokens += k.shape[0] * k.shape[1]
        size = k.float().abs()
        pairs = torch.hypot(*size.chunk(2, dim=-1)) / self._cfg.rope_factor
        self.pair_max = torch.maximum(self.pair_max.to(k.device), pairs.amax((0, 1)))
        self.channel_max = torch.maximum(self.channel_max.to(k.device), size.amax((0, 1)))
        for one_q, one_k in zip(q, k, strict=True):
            if sum(len(part.keys) for part in self._sampled) < self._max_tokens:
                self._sampled.append(self._sample(one_q.float(), one_k.float()))

    def samples(self) -> KeySamples:
        """The sampled tokens, together."""
        if not self._sampled:
            raise ValueError("no calibration tokens were added")
        parts = [(p.keys, p.weights, p.cross) for p in self._sampled if p.cross is not None]
        together = (torch.cat(found)[: self._max_tokens] for found in zip(*parts, strict=True))
        return KeySamples(*together)

    def _sample(self, q: Tensor, k: Tensor) -> KeySamples:
        """One window, q [S, Hq, D] and k [S, Hk, D], its tokens turned to other positions."""
        moments = query_moments(q, k, self._window)
        done = sum(len(part.keys) for part in self._sampled)
        places = (done + torch.arange(len(k), dtype=torch.float64)) * GOLDEN % 1.0
        room = max(0, self._positions - len(k))
        offsets = (room * places**CROWDING).round().to(k.device)
        cos, sin = rotary_table(self._cfg, offsets.unsqueeze(0))  # [1, S, D]
        cos, sin = cos / self._cfg.rope_factor, sin / self._cfg.rope_factor
        keys = apply_rope(k.unsqueeze(0), cos, sin)[0]
        keys[0] = k[0]
        half = cos.shape[-1] // 2
        xx, yy, xy = turned_moments(
            moments.unbind(), cos[0, :, None, :half], sin[0, :, None, :half]
        )
        return KeySamples(keys, torch.cat((xx, yy), dim=-1).clamp_(min=0), xy)


def query_moments(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """[3, S, Hk, D/2]: sum_i P_it (1 - P_it) (x^2, y^2, x y) over the queries i of all r heads,
    where x and y are the two channels of a pair of q_i. q [S, Hq, D], k [S, Hk, D]: one window."""
    length, heads, dim = k.shape
    grouped = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [Hk, r, S, D]
    x, y = grouped.chunk(2, dim=-1)
    products = torch.cat((x * x, y * y, x * y), dim=-1)
    out = torch.zeros(heads, length, products.shape[-1], device=k.device)
    t = torch.arange(length, device=k.device)
    for start in range(0, length, QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        distance = t[part, None] - t
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        for h in range(heads):
            score = grouped[h, :, part] @ k[:, h].T / math.sqrt(dim)  # [r, s, S]
            p = score.masked_fill_(hidden, -math.inf).softmax(-1)
            out[h] += ((p * (1 - p)).mT @ products[h, :, part]).sum(0)
    return out.unflatten(-1, (3, -1)).permute(2, 1, 0, 3)


def turned_moments(
    moments: Iterable[Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments x^2, y^2 and x y of pairs [..., D/2] that are turned by the angles whose cos and
    sin [..., D/2] are given."""
    xx, yy, xy = moments
    mixed = 2 * cos * sin * xy
    return (
        cos**2 * xx + sin**2 * yy - mixed,
        sin**2 * xx + cos**2 * yy + mixed,
        cos * sin * (xx - yy) + (cos**2 - sin**2) * xy,
    )


def pair_scale(pair_max: Tensor, strength: float = STRENGTH) -> Tensor:
    """n [Hk, D/2] = pair_max^-strength, with geometric mean 1 per head. [1, D/2] for QK-norm,
    whose weights all heads share (`shared_pairs`)."""
    return _inverse_power(pair_max, strength)


def shared_pairs(pair_max: Tensor) -> Tensor:
    """[Hk, D/2] -> [1, D/2]: each pair's maximum, by the share it has in its own head."""
    level = pair_max.clamp(min=TINY).log().mean(-1, keepdim=True).exp()
    return (pair_max / level).amax(0, keepdim=True)


def channel_scale(
    channel_max: Tensor, strength: float = STRENGTH, top_k: int | None = None
) -> Tensor:
    """s [Hk, D] = channel_max^-strength on the top_k largest channels of each head and the channels
    that RoPE turns with them, 1 elsewhere. None: on all channels. The reference level, s = 1, is
    the geometric mean of the others' maxima, or of all where there are no others."""
    heads, dim = channel_max.shape
    chosen = torch.ones(heads, dim, dtype=torch.bool, device=channel_max.device)
    if top_k is not None and top_k < dim:
        worst = torch.zeros_like(chosen).scatter_(1, channel_max.topk(top_k).indices, True)
        chosen = worst | worst.roll(dim // 2, dims=1)
    s = _inverse_power(channel_max, strength)
    rest = torch.where(chosen.all(-1, keepdim=True), chosen, ~chosen)
    level = (s.log() * rest).sum(-1, keepdim=True) / rest.sum(-1, keepdim=True)
    return torch.where(chosen, s / level.exp(), torch.ones_like(s))


def without_scaled_pairs(n: Tensor, s: Tensor) -> Tensor:
    """n [Hk or 1, D/2] with 1 on every pair that s [Hk, D] scales after RoPE (in any head that
    shares n): s was chosen from keys without n."""
    scaled = (s != 1).unflatten(-1, (2, -1)).any(1)  # [Hk, D/2]
    if len(n) < len(scaled):
        scaled = scaled.any(0, keepdim=True)
    return torch.where(scaled, torch.ones_like(n), n)


def fold_pair_scale(
    block: Mapping[str, Tensor], cfg: DecoderConfig, n: Tensor
) -> dict[str, Tensor]:
    """The tensors of a block that change when keys are multiplied by n before RoPE.

    block: by name inside the block. n [Hk, D/2]; [1, D/2] for an architecture with QK-norm. The
    rows (and biases) of k_proj are multiplied by n, those of all query heads of a KV head divided;
    with QK-norm the weights of k_norm and q_norm. In the tensors' dtypes.
    """
    heads = 1 if cfg.qk_norm else cfg.num_kv_heads
    if n.shape != (heads, cfg.head_dim // 2):
        raise ValueError(f"n is {list(n.shape)}; expected {[heads, cfg.head_dim // 2]}")
    both = torch.cat((n, n), dim=-1)  # [heads, D]
    if cfg.qk_norm:
        suffixes, kind, ratio = ["weight"], "norm", 1
    else:
        suffixes = ["weight", "bias"] if cfg.qkv_bias else ["weight"]
        kind, ratio = "proj", cfg.num_heads // cfg.num_kv_heads
    factors = {"k": both.flatten(), "q": 1 / both.repeat_interleave(ratio, dim=0).flatten()}
    folded = {}
    for letter, factor in factors.items():
        for suffix in suffixes:
            name = f"self_attn.{letter}_{kind}.{suffix}"
            tensor = block[name]
            rows = factor.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
            folded[name] = (tensor.float() * rows).to(tensor.dtype)
    return folded


def fold_turn(block: Mapping[str, Tensor], cfg: DecoderConfig, angles: Tensor) -> dict[str, Tensor]:
    """The tensors of a block that change when pairs are turned by angles [Hk, D/2] before RoPE.

    In FP32: the rows (and biases) of k_proj, and of q_proj for all query heads of a KV head. RoPE
    turns the same pairs, so it does not matter which comes first, and q . k stays. ValueError for
    an architecture with QK-norm, whose weights come between.
    """
    if cfg.qk_norm:
        raise ValueError("QK-norm: pairs cannot be turned before the norms' weights")
    folded = {}
    for letter in ("q", "k"):
        for suffix in ["weight", "bias"] if cfg.qkv_bias else ["weight"]:
            name = f"self_attn.{letter}_proj.{suffix}"
            tensor = block[name].float()
            heads = tensor.view(cfg.num_kv_heads, -1, cfg.head_dim, tensor[0].numel())
            cos, sin = (x.to(tensor.device)[:, None, None] for x in (angles.cos(), angles.sin()))
            rows = turned_pairs(heads.mT, cos, sin).mT  # [Hk, r, D, K]
            folded[name] = rows.reshape(tensor.shape)
    return folded


def optimal_transform(
    samples: KeySamples, *, symmetric: bool = False, steps: int = STEPS
) -> KeyTransform:
    """s and u [Hk, D] of least J, by gradient descent on log s and u (Adam); s has geometric mean 1
    per head. Starts at u = the mean of k weighted by M, s = max|k - u|^-1/2. symmetric: of the
    cache's format (`KVFormat`)."""
    log_s, shift, _ = _descend(samples, symmetric, steps, RATE, turn=False)
    log_s = log_s - log_s.mean(-1, keepdim=True)
    return KeyTransform(log_s.exp(), shift)


def optimal_turn(samples: KeySamples, *, symmetric: bool = False, steps: int = STEPS) -> Tensor:
    """The angles [Hk, D/2] to turn pairs by, for the least J that s and u can then reach: as
    `optimal_transform`, and with the angles, from none. Of a part of the samples, which is enough.
    """
    every = max(1, len(samples.keys) // TURN_TOKENS)
    assert samples.cross is not None
    part = KeySamples(*(x[::every] for x in (samples.keys, samples.weights, samples.cross)))
    return _descend(part, symmetric, steps, TURN_RATE, turn=True)[2]


def turned(samples: KeySamples, angles: Tensor) -> KeySamples:
    """With every pair of keys, and of the queries that look at them, turned by angles [Hk, D/2]."""
    assert samples.cross is not None
    cos, sin = angles.cos(), angles.sin()
    xx, yy, xy = turned_moments((*samples.weights.chunk(2, dim=-1), samples.cross), cos, sin)
    return KeySamples(turned_pairs(samples.keys, cos, sin), torch.cat((xx, yy), dim=-1), xy)


def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] with channels c and c + D/2 turned by the angles of cos and sin [..., D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1)


def _descend(
    samples: KeySamples, symmetric: bool, steps: int, rate: float, *, turn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log s and u [Hk, D], and the angles [Hk, D/2], of least J; the latter zero without turn."""
    keys, weights, cross = samples.keys, samples.weights, samples.cross
    if not bool(torch.isfinite(keys).all() and torch.isfinite(weights).all()):
        raise WorkFailed("keys or attention scores of the calibration text hold NaN or Inf")
    weights = weights + 1e-6 * weights.mean((0, 2), keepdim=True) + TINY
    level = weights.mean((0, 2), keepdim=True)
    weights = weights / level
    cross = cross / level if turn and cross is not None else torch.zeros_like(weights[..., ::2])
    centre = (keys * weights).sum(0) / weights.sum(0)
    spread = keys.std(0, correction=0)
    start = _inverse_power((keys - centre).abs().amax(0), STRENGTH).log()
    with torch.inference_mode(False), torch.enable_grad():
        keys, weights, cross, centre, spread, start = (
            x.clone() for x in (keys, weights, cross, centre, spread, start)
        )
        log_s = start.clone().requires_grad_()
        moved = torch.zeros_like(centre, requires_grad=True)  # u - centre, in spreads
        angles = torch.zeros_like(cross[0], requires_grad=turn)
        adam = torch.optim.Adam([log_s, moved, *([angles] if turn else [])], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        none = torch.zeros_like(centre)
        for _ in range(steps):
            adam.zero_grad()
            part = KeySamples(keys - (centre + moved * spread), weights, cross)
            if turn:
                part = turned(part, angles)
            loss = score_loss(part, log_s.exp(), none, symmetric)
            (loss + TINY).log().sum().backward()
            adam.step()
            schedule.step()
    return log_s.detach(), centre + moved.detach() * spread, angles.detach()


def score_loss(samples: KeySamples, s: Tensor, u: Tensor, symmetric: bool = False) -> Tensor:
    """J(s, u) per head, [Hk], over the number of sampled tokens; s and u [Hk, D]. The range of a
    symmetric row is twice its largest |k'|."""
    low, high = ((samples.keys - u) * s).aminmax(dim=-1)  # [T, Hk]
    span = 2 * torch.maximum(high, -low) if symmetric else high - low
    noise = (samples.weights / s.square()).sum(-1)
    return (span.square() * noise).mean(0)


def _inverse_power(largest: Tensor, strength: float) -> Tensor:
    """largest^-strength with geometric mean 1 per row; what never occurs counts as rare, not 0."""
    if not bool(torch.isfinite(largest).all()):
        raise WorkFailed("keys of the calibration text hold NaN or Inf")
    floor = (largest.amax(-1, keepdim=True) * 1e-4).clamp(min=TINY)
    log = -strength * torch.maximum(largest, floor).log()
    return (log - log.mean(-1, keepdim=True)).exp()
