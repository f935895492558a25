"""Error feedback across blocks: what is added to the residual stream also repairs it.

Each linear reproduces its own output W x^ on the inputs x^ that it gets, so that what all linears
before it lost stays in the residual stream h^. The stream of the unquantized model, h, is computed
beside it. Where a site adds to the stream ("o", "down"), the weight is first moved towards what
would be missing, by ridge regression on the inputs that the kernel sees:

    W' = argmin_V E|h - h^ - V x^|^2 + ridge tr((V - W) D (V - W)^T),       D = mean(diag H) I
       = W + (C - W H) (H + ridge D)^-1,            C = E[(h - h^) x^T],    H = E[x^ x^T]

Here h is the stream after the site, h^ before it. Tokens count by their error relative to the
stream, weighed by 1 / rms(h), because every block reads the stream through a norm; a token with
massive activations would else be all that counts. GPTQ variants that correct the inputs' errors
(GPTAQ, Li et al., 2025) do it for every linear and its own output; only the stream's is what later
blocks see. Only the part `strength` of the step is taken: calibration tokens are few, and the
predicted part of the error is smaller on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from quant.architectures import SITES, DecoderConfig
from quant.calibration.activations import ActivationStore
from quant.calibration.hessian import InputHessian
from quant.decoder import advance, begin, causal_attention
from quant_kernels import reference

# The sites whose outputs are added to the residual stream.
FEEDBACK_SITES = ("o", "down")


def corrected(
    weight: Tensor, cross: Tensor, hessian: InputHessian, strength: float, ridge: float
) -> Tensor:
    """W + strength (C - W H) (H + ridge D)^-1 for weight [N, K], cross C [N, K]: [N, K] FP32.

    Factorizes the Hessian, in place.
    """
    w = weight.float()
    missing = cross - hessian.times(w)
    hessian.factorize(ridge, act_order=False)
    return w + strength * hessian.solve(missing)


def stream_name(layer: int, site: str = "") -> str:
    """Of what the store keeps: the stream that enters a block, or that after one of its sites."""
    if site == "down":
        layer, site = layer + 1, ""
    return f"unquantized-{layer:05d}{site and '-' + site}"


class UnquantizedStream:
    """The residual stream of the unquantized model, block by block, in a store.

    Linears multiply in BF16, norms and sums are FP32, as everywhere.
    """

    def __init__(
        self, cfg: DecoderConfig, store: ActivationStore, batches: int, rope: tuple[Tensor, Tensor]
    ) -> None:
        self._cfg = cfg
        self._store = store
        self._batches = batches
        self._rope = rope

    def begin(self, i: int, hidden: Tensor) -> None:
        """A batch as it enters block 0, [B, S, H] FP32."""
        self._store.put(stream_name(0), i, hidden)

    def after(self, layer: int, site: str, i: int) -> Tensor:
        """A batch of the stream after a site of FEEDBACK_SITES: [B, S, H] FP32."""
        return self._store.get(stream_name(layer, site), i)[0].float()

    def token_weights(self, layer: int, site: str, i: int) -> Tensor:
        """1 / rms of the stream after a site, for a batch's tokens: [T, 1]."""
        stream = self.after(layer, site, i).flatten(0, 1)
        return torch.rsqrt(stream.square().mean(dim=1, keepdim=True) + self._cfg.rms_norm_eps)

    def error(self, layer: int, streams: Iterable[Tensor]) -> float:
        """|h - h^|^2 / |h|^2 of the stream that enters a block, the mean over the tokens of all
        batches h^ [B, S, H]."""
        lost, tokens = 0.0, 0
        for i, hidden in enumerate(streams):
            target = self._store.get(stream_name(layer), i)[0].flatten(0, 1)
            energy = target.square().sum(dim=1) + self._cfg.rms_norm_eps
            error = (target - hidden.flatten(0, 1)).square().sum(dim=1) / energy
            lost += float(error.double().sum())
            tokens += len(error)
        return lost / tokens

    def advance(self, layer: int, block: Mapping[str, Tensor]) -> None:
        """Let all batches through a block that is not quantized yet; block by name inside it."""
        cfg = self._cfg
        attend = causal_attention(cfg.sliding_windows[layer])
        linears = {
            name: (
                block[f"{name}.weight"].to(self._rope[0].device, torch.bfloat16),
                block[f"{name}.bias"].to(torch.bfloat16) if cfg.has_bias(name) else None,
            )
            for names in SITES.values()
            for name in names
        }
        for i in range(self._batches):
            hidden = self._store.get(stream_name(layer), i)[0]
            x = begin(cfg, block, hidden)
            for site, names in SITES.items():
                outputs = _outputs([linears[name] for name in names], x)
                hidden, x = advance(cfg, block, site, hidden, outputs, self._rope, attend)
                if site in FEEDBACK_SITES:
                    # What passes on stays FP32; the rest is a target, and BF16 is enough.
                    kept = hidden if site == "down" else hidden.to(torch.bfloat16)
                    self._store.put(stream_name(layer, site), i, kept)

    def leave(self, layer: int) -> None:
        """A block is finished: forget what entered it and what was inside."""
        for i in range(self._batches):
            self._store.forget(stream_name(layer), i)
            self._store.forget(stream_name(layer, "o"), i)


def _outputs(linears: Sequence[tuple[Tensor, Tensor | None]], x: Tensor) -> list[Tensor]:
    x = x.to(torch.bfloat16)
    return [reference.dense_linear(x, weight, bias).float() for weight, bias in linears]
