"""What calibration keeps of keys, and the transform of least score noise found from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.architectures import DecoderConfig
from quant.calibration.rope import (
    KeySamples,
    KeyStatistics,
    channel_scale,
    optimal_transform,
    optimal_turn,
    pair_scale,
    query_moments,
    score_loss,
    turned,
    turned_moments,
    turned_pairs,
)
from quant.checkpoint.loading import load_decoder
from quant.decoder import KeyTransform, apply_rope, rotary_table
from quant.errors import WorkFailed
from quant_kernels.kv4 import KVFormat, dequantize_kv, quantize_kv


def random_scale(*shape: int, seed: int = 0) -> Tensor:
    """From 1/4 to 4, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).mul(4).sub(2).exp2()


def rotated(cfg: DecoderConfig, x: Tensor, start: int = 0) -> Tensor:
    return apply_rope(x, *rotary_table(cfg, start + torch.arange(x.shape[1]).unsqueeze(0)))


def config_of(tiny_checkpoint: Callable[[str], Path], kind: str) -> DecoderConfig:
    return load_decoder(tiny_checkpoint(kind), dtype=torch.float32).config


def random_qk(cfg: DecoderConfig, length: int = 24) -> tuple[Tensor, Tensor]:
    """Before RoPE. Keys with a channel that stands out and a first token unlike the others."""
    generator = torch.Generator().manual_seed(4)
    q = 2 * torch.randn(3, length, cfg.num_heads, cfg.head_dim, generator=generator)
    k = torch.randn(3, length, cfg.num_kv_heads, cfg.head_dim, generator=generator)
    k = k * random_scale(cfg.num_kv_heads, cfg.head_dim, seed=8)
    k = k + 2 * torch.randn(cfg.num_kv_heads, cfg.head_dim, generator=generator)
    k[:, :, 0, 3] += 9
    k[:, 0] = -k[:, 0]
    return q, k


@pytest.mark.parametrize("kind", ["llama", "llama-yarn-rope"])
def test_statistics_are_the_largest_over_all_batches(kind, tiny_checkpoint):
    cfg = config_of(tiny_checkpoint, kind)
    q, k = random_qk(cfg)
    after = rotated(cfg, k)
    found = KeyStatistics(cfg)
    for i in (2, 0, 1):
        found.add(rotated(cfg, q[i : i + 1]), after[i : i + 1])
    assert found.tokens == 72
    pairs = (k[..., : cfg.head_dim // 2] ** 2 + k[..., cfg.head_dim // 2 :] ** 2).sqrt()
    torch.testing.assert_close(found.pair_max, pairs.amax((0, 1)))  # before RoPE, whatever YaRN
    assert torch.equal(found.channel_max, after.abs().amax((0, 1)))


def test_sampled_keys_are_those_of_other_positions(tiny_checkpoint):
    cfg = config_of(tiny_checkpoint, "llama-yarn-rope")
    cfg = dataclasses.replace(cfg, max_position_embeddings=200)
    q, k = random_qk(cfg)
    statistics = KeyStatistics(cfg, positions=150, max_tokens=60)
    statistics.add(rotated(cfg, q), rotated(cfg, k))
    keys = statistics.samples().keys
    assert keys.shape == (60, cfg.num_kv_heads, cfg.head_dim)
    offsets = []
    for i in range(60):
        window, t = divmod(i, 24)
        fits = [
            offset
            for offset in range(127)  # 150 positions, less a window
            if (rotated(cfg, k[window : window + 1], offset)[0, t] - keys[i]).abs().max() < 1e-3
        ]
        assert len(fits) == 1
        offsets.append(fits[0])
    assert offsets[0] == offsets[24] == offsets[48] == 0  # nothing is before the first token
    assert min(offsets) == 0
    assert max(offsets) > 110
    assert sorted(offsets)[30] < 126 / 2  # more of the positions that every context has


def squares(moments: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """M [S, Hk, D] of moments [3, S, Hk, D/2] turned by angles [S, D/2]."""
    return torch.cat(turned_moments(moments, cos.unsqueeze(1), sin.unsqueeze(1))[:2], dim=-1)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("offset", [0, 37])
def test_weights_are_the_sum_over_queries_that_see_a_key(window, offset, tiny_checkpoint):
    cfg = config_of(tiny_checkpoint, "llama")
    q, k = (rotated(cfg, x)[0] for x in random_qk(cfg))
    turn = rotary_table(cfg, torch.tensor([[offset]]))
    elsewhere = apply_rope(q.unsqueeze(0), *turn)[0].double()
    wanted = torch.zeros(k.shape, dtype=torch.float64)
    for h in range(cfg.num_heads):
        g = h // (cfg.num_heads // cfg.num_kv_heads)
        for i in range(len(q)):
            first = 0 if window is None else max(0, i - window + 1)
            score = k[first : i + 1, g].double() @ q[i, h].double() / math.sqrt(cfg.head_dim)
            p = score.softmax(0)
            wanted[first : i + 1, g] += (p * (1 - p))[:, None] * elsewhere[i, h] ** 2
    half = cfg.head_dim // 2
    cos, sin = (x[0, :, :half].expand(len(k), half) for x in turn)
    found = squares(query_moments(q, k, window), cos, sin)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_sampled_weights_are_turned_with_the_keys(tiny_checkpoint):
    cfg = dataclasses.replace(config_of(tiny_checkpoint, "llama"), max_position_embeddings=200)
    q, k = (rotated(cfg, x) for x in random_qk(cfg))
    statistics = KeyStatistics(cfg, positions=150, max_tokens=24)
    statistics.add(q[:1], k[:1])
    samples = statistics.samples()
    angle = rotary_table(cfg, torch.arange(127).unsqueeze(0))  # of every offset there is
    for t in (1, 5, 17):
        errors = (
            apply_rope(k[:1, t : t + 1].expand(1, 127, -1, -1), *angle) - samples.keys[t]
        ).abs()
        offset = int(errors.amax((0, 2, 3)).argmin())
        half = cfg.head_dim // 2
        cos, sin = (x[0, offset, :half].expand(24, half) for x in angle)
        wanted = squares(query_moments(q[0], k[0], None), cos, sin)[t]
        torch.testing.assert_close(samples.weights[t], wanted, rtol=1e-3, atol=1e-3)


def score_noise(q: Tensor, k: Tensor, keys: KeyTransform) -> float:
    """What rounding keys really does: KL between attention before and after, over all queries."""
    ratio = q.shape[2] // k.shape[2]
    moved = (k - keys.shift) * keys.scale
    divided = q / keys.scale.repeat_interleave(ratio, 0)
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)

    def attention(x: Tensor) -> Tensor:
        x = x.repeat_interleave(ratio, 2)
        score = divided.transpose(1, 2) @ x.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1])
        return score.masked_fill(hidden, -1e9).log_softmax(-1)

    exact, rounded = attention(moved), attention(dequantize_kv(quantize_kv(moved, KVFormat())))
    return float((exact.exp() * (exact - rounded)).sum(-1).mean())


def test_the_optimal_transform_wins_where_the_root_of_the_maximum_does_not(tiny_checkpoint):
    cfg = dataclasses.replace(config_of(tiny_checkpoint, "llama"), max_position_embeddings=24)
    q, k = random_qk(cfg)
    q = q * random_scale(cfg.num_heads, cfg.head_dim, seed=3)  # some channels hardly matter
    q, k = 0.5 * rotated(cfg, q), rotated(cfg, k)
    statistics = KeyStatistics(cfg)
    statistics.add(q, k)
    none = KeyTransform(*(f(cfg.num_kv_heads, cfg.head_dim) for f in (torch.ones, torch.zeros)))
    root = KeyTransform(channel_scale(statistics.channel_max), none.shift)
    best = optimal_transform(statistics.samples())
    samples = statistics.samples()
    losses = [score_loss(samples, x.scale, x.shift).sum() for x in (none, root, best)]
    noise = [score_noise(q, k, x) for x in (none, root, best)]
    assert losses[2] < 0.5 * losses[1] < 0.5 * losses[0]
    assert noise[2] < 0.6 * noise[1]
    assert noise[1] < noise[0]
    # The loss foresees the noise: to second order and but for one constant, the same number.
    ratios = [n / float(loss) for n, loss in zip(noise, losses, strict=True)]
    assert max(ratios) < 1.5 * min(ratios)


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_step_beside_the_optimum_is_much_better(symmetric, tiny_checkpoint):
    cfg = config_of(tiny_checkpoint, "llama")
    q, k = random_qk(cfg)
    statistics = KeyStatistics(cfg)
    statistics.add(rotated(cfg, q), rotated(cfg, k))
    samples = statistics.samples()
    best = optimal_transform(samples, symmetric=symmetric, steps=300)
    reached = score_loss(samples, best.scale, best.shift, symmetric)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        step = 0.05 * torch.randn(2, *best.scale.shape, generator=generator)
        scale, shift = best.scale * step[0].exp(), best.shift + step[1]
        assert bool((score_loss(samples, scale, shift, symmetric) > 0.99 * reached).all())
    torch.testing.assert_close(best.scale.log().mean(-1), torch.zeros(2), rtol=0, atol=1e-5)
    other = optimal_transform(samples, symmetric=not symmetric, steps=300)
    worse = score_loss(samples, other.scale, other.shift, symmetric)
    assert bool((worse > 1.02 * reached).all())  # the two formats want different transforms


def test_degenerate_samples_give_a_usable_transform():
    for keys, weights in (
        (torch.zeros(5, 2, 8), torch.ones(5, 2, 8)),
        (torch.randn(5, 2, 8), torch.zeros(5, 2, 8)),
        (torch.randn(1, 2, 8), torch.ones(1, 2, 8)),
    ):
        found = optimal_transform(KeySamples(keys, weights))
        assert bool(torch.isfinite(found.scale).all() and torch.isfinite(found.shift).all())
        assert bool((found.scale > 0).all())


def test_samples_that_are_not_finite_are_refused(tiny_checkpoint):
    keys = torch.randn(5, 2, 8)
    keys[3, 1, 2] = torch.nan
    with pytest.raises(WorkFailed, match="NaN or Inf"):
        optimal_transform(KeySamples(keys, torch.ones(5, 2, 8)))
    with pytest.raises(WorkFailed, match="NaN or Inf"):
        pair_scale(keys[3])


def test_the_optimum_is_found_in_inference_mode():
    keys = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0))
    samples = KeySamples(keys, keys.flip(0).square())
    expected = optimal_transform(samples)
    with torch.inference_mode():
        found = optimal_transform(KeySamples(keys.clone(), keys.flip(0).square()))
    assert torch.equal(found.scale, expected.scale)


def test_turned_samples_are_those_of_turned_queries_and_keys(tiny_checkpoint):
    cfg = dataclasses.replace(config_of(tiny_checkpoint, "llama"), max_position_embeddings=24)
    q, k = (rotated(cfg, x) for x in random_qk(cfg))
    angles = torch.rand(cfg.num_kv_heads, cfg.head_dim // 2) * 6
    cos, sin = angles.cos(), angles.sin()
    ratio = cfg.num_heads // cfg.num_kv_heads
    each = [x.repeat_interleave(ratio, 0) for x in (cos, sin)]
    before, after = KeyStatistics(cfg), KeyStatistics(cfg)
    before.add(q, k)
    after.add(turned_pairs(q, *each), turned_pairs(k, cos, sin))
    found, wanted = turned(before.samples(), angles), after.samples()
    torch.testing.assert_close(found.keys, wanted.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.cross, wanted.cross, rtol=1e-3, atol=1e-3)


def test_pairs_are_turned_to_where_their_channels_differ():
    """Keys vary along one direction of every pair, queries look along the other: of both channels
    apart, one can have a coarse grid; turned by an eighth, both would need a fine one."""
    generator = torch.Generator().manual_seed(6)
    heads, half, tokens = 2, 4, 400
    keys = torch.randn(tokens, heads, 2 * half, generator=generator)
    keys[..., :half] *= 8
    squares_of = torch.ones(tokens, heads, 2 * half)
    squares_of[..., :half] = 1 / 64
    apart = KeySamples(keys, squares_of, torch.zeros(tokens, heads, half))
    mixed = turned(apart, torch.full((heads, half), torch.pi / 4))
    angles = optimal_turn(mixed, steps=200)
    best = [
        score_loss(samples, transform.scale, transform.shift)
        for samples in (apart, mixed, turned(mixed, angles))
        for transform in [optimal_transform(samples, steps=200)]
    ]
    assert bool((best[1] > 3 * best[0]).all())
    assert bool((best[2] < 1.1 * best[0]).all())
    # Back by an eighth, or on by one, which swaps the channels.
    quarter = torch.remainder(angles + torch.pi / 4, torch.pi / 2)
    assert bool((torch.minimum(quarter, torch.pi / 2 - quarter) < 0.1).all())
    with torch.inference_mode():
        assert torch.equal(optimal_turn(mixed, steps=200), angles)
