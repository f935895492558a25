"""A site's inputs of all calibration tokens, while they wait for its linears.

They wait as codes and scales, which is what the kernels see of them; in BF16 where the site is to
be smoothed, since the scales come later; or in FP32 where one of its linears stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.calibration.activations import ActivationStore
from quant_kernels import reference

INPUTS = "inputs"


class SiteInputs:
    """Batches [B, S, K] of one site at a time, each until the next site's takes its place.

    divisor [K]: what those that are read have been smoothed by; None: by nothing.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self.divisor: Tensor | None = None

    def put_quantized(self, i: int, x: Tensor, activation: str) -> None:
        """Keep x [B, S, K] as codes of an activation type, and scales."""
        self._store.put(INPUTS, i, *reference.quantize_activation(x.flatten(0, 1), activation))

    def put(self, i: int, x: Tensor, dtype: torch.dtype) -> None:
        """Keep x [B, S, K] dense."""
        self._store.put(INPUTS, i, x.to(dtype))

    def dense(self, i: int) -> Tensor:
        """A batch kept dense, smoothed, [B, S, K] FP32; one kept as codes dequantized, [T, K]."""
        inputs = self._store.get(INPUTS, i)
        if len(inputs) == 2:
            return reference.dequantize_activation(*inputs)
        x = inputs[0].float()
        return x if self.divisor is None else x / self.divisor

    def quantized(self, i: int, activation: str) -> tuple[Tensor, Tensor]:
        """A batch as packed linears see it: codes [T, K] and scales [T, 1]."""
        inputs = self._store.get(INPUTS, i)
        if len(inputs) == 2:
            return inputs[0], inputs[1]
        return reference.quantize_activation(self.dense(i).flatten(0, 1), activation)
