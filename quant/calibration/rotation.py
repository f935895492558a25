"""Offline rotations: QuaRot's (Ashkboos et al., 2024, section 4) that need nothing at run time.

Residual stream, with Q [H, H] orthogonal and h' = h Q. An RMS norm without its weight g commutes
with Q, so g moves into the linears that follow it:

    W' = W diag(g) Q    q, k, v, gate, up, lm_head      g' = 1
    W' = Q^T W          o, down                         b' = b Q
    E' = E Q            the embedding; a tied head gets a tensor of its own

Value heads, with R [D, D] orthogonal: attention mixes tokens, not channels, so v' = v R per head,

    W_v' = R^T W_v      of every KV head                b_v' = R^T b_v
    W_o' = W_o R        of every query head

A rotation spreads outliers over all channels: an activation has no channel that a scale per token
is wasted on, a weight row no column that its group's scale must cover. Q is a Hadamard matrix with
random signs where H is a power of two. H = m 2^p takes the Kronecker product of a random
orthogonal [m, m] and the Hadamard matrix [2^p, 2^p].
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.architectures import FINAL_NORM, LM_HEAD, SITES, DecoderConfig
from quant.passes import RotatePass

NORM_OF = {"qkv": "input_layernorm.weight", "gate_up": "post_attention_layernorm.weight"}
# Elements of a weight that are rotated together, in FP64.
ELEMENTS_AT_ONCE = 2**20


def orthogonal(size: int, seed: int) -> Tensor:
    """[size, size] FP64, orthogonal; a Hadamard matrix with random signs for a power of two."""
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat(
            (torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1))
        )
    hadamard /= power**0.5
    odd = size // power
    gaussian = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
    mixed = (
        torch.linalg.qr(gaussian).Q.contiguous()
        if odd > 1
        else torch.ones(1, 1, dtype=torch.float64)
    )
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return torch.kron(mixed, hadamard) * signs


@dataclass(frozen=True)
class Rotation:
    """residual [H, H] and head [D, D], FP64 on the device; None where there is none."""

    residual: Tensor | None
    head: Tensor | None

    def rows(self, weight: Tensor, norm: Tensor | None = None) -> Tensor:
        """weight [..., H] that reads the stream (or is in it): W diag(g) Q, FP32."""
        if self.residual is None:
            return weight
        gain = 1.0 if norm is None else norm.double()
        flat = weight.view(-1, weight.shape[-1])
        parts = (flat[rows].double() * gain @ self.residual for rows in _rows(flat))
        return torch.cat([part.float() for part in parts]).view(weight.shape)

    def outer(self, module: str, weight: Tensor, norm: Tensor) -> Tensor:
        """A weight outside the blocks, or some of its rows; norm [H]: the final one's."""
        if self.residual is None:
            return weight
        if module == FINAL_NORM:
            return torch.ones_like(weight)
        return self.rows(weight, norm if module == LM_HEAD else None)

    def block(self, cfg: DecoderConfig, tensors: MutableMapping[str, Tensor]) -> None:
        """Rotate a block's tensors (names inside the block), in place of what was there, FP32."""
        if self.residual is not None:
            for site, norm in NORM_OF.items():
                for name in SITES[site]:
                    weight = tensors[f"{name}.weight"]
                    tensors[f"{name}.weight"] = self.rows(weight, tensors[norm])
                tensors[norm] = torch.ones_like(tensors[norm])
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                _from_left(tensors, name, self.residual)
        if self.head is not None:
            _from_left(tensors, "self_attn.v_proj", self.head)
            weight = tensors["self_attn.o_proj.weight"]
            heads = weight.reshape(-1, cfg.head_dim)
            parts = (heads[rows].double() @ self.head for rows in _rows(heads))
            turned = torch.cat([part.float() for part in parts])
            tensors["self_attn.o_proj.weight"] = turned.view(weight.shape)


def make_rotation(step: RotatePass, cfg: DecoderConfig, device: torch.device) -> Rotation:
    """The matrices of a pass."""
    residual = orthogonal(cfg.hidden_size, step.seed).to(device) if step.residual else None
    head = orthogonal(cfg.head_dim, step.seed + 1).to(device) if step.heads else None
    return Rotation(residual, head)


def _from_left(tensors: MutableMapping[str, Tensor], name: str, turn: Tensor) -> None:
    """W' = turn^T W and b' = turn^T b, for every len(turn) rows of a linear's weight [N, K]."""
    weight = tensors[f"{name}.weight"]
    size, width = len(turn), max(1, ELEMENTS_AT_ONCE // len(weight))
    columns = []
    for part in weight.split(width, dim=1):
        turned = turn.T @ part.reshape(-1, size, part.shape[1]).double()
        columns.append(turned.reshape(part.shape).float())
    tensors[f"{name}.weight"] = torch.cat(columns, dim=1)
    if f"{name}.bias" in tensors:
        bias = tensors[f"{name}.bias"]
        tensors[f"{name}.bias"] = (bias.double().view(-1, size) @ turn).float().view(bias.shape)


def _rows(weight: Tensor) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step)
