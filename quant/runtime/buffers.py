"""Memory of a step's intermediate tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Tensors on a device by name, shape and dtype, each allocated when it is first asked for.

    What asks again for the same gets the same memory: the layers of a step, which run one after the
    other, share theirs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of that name, shape and dtype; it holds anything."""
        key = (name, shape, dtype)
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return held

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())
