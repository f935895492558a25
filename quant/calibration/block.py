"""A block while it is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quant.architectures import DecoderConfig, block_prefix
from quant.calibration.rotation import NORM_OF
from quant.decoder import KeyTransform, advance, causal_attention
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
