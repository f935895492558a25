"""A block while it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.architectures import SITES, DecoderConfig, block_prefix
from quant.calibration.inputs import SiteInputs
from quant.calibration.rotation import NORM_OF
from quant.decoder import (
    KeyTransform,
    Linear,
    advance,
    causal_attention,
    packed_outputs,
    site_outputs,
)
from quant_kernels import reference
from quant_kernels.packing import PackedWeight


@dataclass
class BlockWork:
    """tensors: by name inside the block, what is not packed yet or stays as it is. keys: what is
    done to keys before they are stored."""

    cfg: DecoderConfig
    layer: int
    tensors: dict[str, Tensor]
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    keys: KeyTransform | None = None

    @property
    def prefix(self) -> str:
        return block_prefix(self.layer)

    def linears(
        self, site: str, inputs: SiteInputs, batches: Sequence[Tensor], device: torch.device
    ) -> Callable[[int], list[Tensor]]:
        """A function that computes a site's linears for batch i of inputs: [B, S, N] each, FP32.

        batches [B, S]: of tokens, for the shapes. All weights are expanded at once on the device,
        and live as long as the function.
        """
        names = SITES[site]
        biases = {
            name: self.tensors[f"{name}.bias"].float() if self.cfg.has_bias(name) else None
            for name in names
        }
        if all(name in self.packed for name in names):
            expanded = [(reference.expand(self.packed[name]), biases[name]) for name in names]
            activation = self.packed[names[0]].fmt.activation

            def of_codes(i: int) -> list[Tensor]:
                codes, scale = inputs.quantized(i, activation)
                return packed_outputs(expanded, codes, scale, batches[i].shape, torch.float32)

            return of_codes
        dense = [
            Linear(
                self.packed[name]
                if name in self.packed
                else self.tensors[f"{name}.weight"].to(device, torch.float32),
                biases[name],
            )
            for name in names
        ]
        return lambda i: site_outputs(dense, inputs.dense(i).view(*batches[i].shape, -1))

    def site_function(
        self,
        site: str,
        outputs: Sequence[Tensor],
        names: Sequence[str],
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """What a site computes of its linears' outputs [B, S, N], without biases: f(outputs).

        Attention of q, k, v; silu(gate) * up; and the output itself where it goes to the residual
        stream. names: of the linears, in their order.
        """
        if site not in NORM_OF:
            return outputs[0]
        attend = causal_attention(self.cfg.sliding_windows[self.layer])
        biased = [
            y + self.tensors[f"{name}.bias"].float() if self.cfg.has_bias(name) else y
            for name, y in zip(names, outputs, strict=True)
        ]
        return advance(self.cfg, self.tensors, site, biased[0], biased, rope, attend)[1]
