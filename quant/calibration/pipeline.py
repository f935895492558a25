"""The calibration pipeline of a block: one site at a time, all calibration tokens through each.

For every site in the order of computation: collect the Hessian of its inputs, choose the codes of
the linears that share them, and compute their outputs from those codes. So each linear sees
activations that have passed through everything quantized before it, as the kernels will compute
them.

Between two sites the inputs wait in a store: as codes and scales, which is what the kernels see of
them, or dense where a linear of the site stays as it is. The residual stream waits beside them, one
version per block: `hidden-00003` is what enters block 3. Memory holds the weights of one block, as
stored (parts of a site's in FP32 when it is its turn), one Hessian, and a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, LINEARS, SITES, DecoderConfig, block_prefix
from quant.calibration.activations import ActivationStore, Shape
from quant.calibration.hessian import InputHessian
from quant.calibration.site import MAX_ERROR, SiteFailed, part_elements, quantize_site
from quant.checkpoint.reader import CheckpointReader
from quant.decoder import (
    Linear,
    advance,
    begin,
    causal_attention,
    packed_outputs,
    rotary_table,
    site_outputs,
)
from quant.recipe import Pass
from quant.report import LayerReport, OnProgress, Progress, ignore_progress
from quant.schemes import LayerPlan
from quant_kernels import reference
from quant_kernels.packing import PackedWeight

# Tokens that go through a block together: enough to keep a matmul busy, and so few that their
# widest activations take no more than a small part of a block's weights (in FP32).
TOKENS_AT_ONCE = 8192
BATCH_OF_BLOCK = 1 / 16
BATCH_BYTES = 4 * 2**20
INPUTS = "inputs"


@dataclass(frozen=True)
class QuantizedBlock:
    """What became of a block: packed linears and what stays, by name inside the block."""

    packed: dict[str, PackedWeight]
    kept: dict[str, Tensor]
    rows: tuple[LayerReport, ...]


@dataclass
class Seconds:
    """Where the time went: what grows with the tokens, and what does not."""

    tokens: float = 0.0
    weights: float = 0.0


def hidden_name(layer: int) -> str:
    """Of the residual stream that enters a block."""
    return f"hidden-{layer:05d}"


def windows_at_once(cfg: DecoderConfig, length: int) -> int:
    """How many windows of `length` tokens make a batch."""
    widest = max(cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.intermediate_size)
    room = max(BATCH_BYTES, int(4 * cfg.block_elements() * BATCH_OF_BLOCK))
    return max(1, min(TOKENS_AT_ONCE, room // (4 * widest)) // length)


class BlockPipeline:
    """Calibration tokens on their way through the blocks.

    windows [n, S]: token ids. rewindable: keep what entered a block until `leave` says that it is
    finished, so that it can be quantized again.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        plan: Mapping[str, LayerPlan],
        step: Pass,
        windows: Tensor,
        store: ActivationStore,
        device: torch.device,
        *,
        max_error: float = MAX_ERROR,
        rewindable: bool = False,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.plan = dict(plan)
        self.seconds = Seconds()
        self.store = store
        self._reader = reader
        self._cfg = cfg = reader.config
        self._step = step
        self._batches = windows.split(windows_at_once(cfg, windows.shape[1]))
        self.device = device
        self._max_error = max_error
        self._rewindable = rewindable
        self._on_progress = on_progress
        positions = torch.arange(windows.shape[1], device=device).unsqueeze(0)
        self._rope = rotary_table(cfg, positions)

    def embed(self) -> None:
        """Look up the tokens: what enters block 0."""
        name = f"{EMBEDDING}.weight"
        for i, batch in enumerate(self._batches):
            used, place = batch.unique(return_inverse=True)
            # Only the rows that occur: the whole table may be larger than a block.
            rows = torch.cat([self._reader.rows(name, row, row + 1) for row in used.tolist()])
            hidden = rows.to(self.device, torch.float32)[place.to(self.device)]
            self.store.put(hidden_name(0), i, hidden)

    def hidden_shapes(self) -> list[Shape]:
        """Of the residual stream, by batch."""
        hidden = self._cfg.hidden_size
        return [(torch.float32, (*batch.shape, hidden)) for batch in self._batches]

    def leave_alone(self, names: Sequence[str]) -> None:
        """From now on these linears (full names) stay as they are."""
        for name in names:
            self.plan[name] = replace(self.plan[name], fmt=None)

    def quantize(self, layer: int) -> QuantizedBlock:
        """Quantize a block, and let the tokens through it. Raises SiteFailed."""
        started = time.perf_counter()
        prefix = block_prefix(layer)
        block = self._read(layer)
        if layer + 1 < self._cfg.num_layers:
            following = block_prefix(layer + 1)
            self._reader.will_need([following + name for name in self._cfg.block_shapes()])
        elements = part_elements(self._cfg.block_elements())
        packed: dict[str, PackedWeight] = {}
        rows: list[LayerReport] = []
        self.seconds.weights += time.perf_counter() - started
        self._enter(layer, block)
        for site in SITES:
            names = self._planned(layer, site)
            if names:
                hessian = self._hessian(layer, site)
                started = time.perf_counter()
                full = [prefix + name for name in names]
                weights = [block[f"{name}.weight"].to(self.device) for name in names]
                fmt = self.plan[full[0]].fmt
                assert fmt is not None
                found = quantize_site(
                    full,
                    weights,
                    fmt,
                    self._step,
                    hessian,
                    max_error=self._max_error,
                    elements=elements,
                )
                seconds = time.perf_counter() - started
                self.seconds.weights += seconds
                size = sum(weight.numel() for weight in weights)
                for name, row in zip(names, found, strict=True):
                    packed[name] = row.weight
                    plan = self.plan[prefix + name]
                    share = block.pop(f"{name}.weight").numel() / size
                    rows.append(
                        LayerReport(
                            name=plan.name,
                            shape=plan.shape,
                            scheme=fmt.scheme,
                            group_size=fmt.group_size,
                            numerics=fmt.numerics,
                            bits_per_weight=plan.bits_per_weight,
                            error_before=row.error_before,
                            error_after=row.error_after,
                            damping=row.damping,
                            seconds=seconds * share,
                        )
                    )
                del hessian, weights, found
            self._pass(layer, site, block, packed)
        return QuantizedBlock(packed, block, tuple(rows))

    def forward(self, layer: int, packed: Mapping[str, PackedWeight]) -> None:
        """Let the tokens through a block that is quantized already."""
        block = self._read(layer, without=[f"{name}.weight" for name in packed])
        self._enter(layer, block)
        for site in SITES:
            self._pass(layer, site, block, packed)
        self.leave(layer)

    def leave(self, layer: int) -> None:
        """The block is finished: forget what entered it."""
        for i in range(len(self._batches)):
            self.store.forget(hidden_name(layer), i)

    def _read(self, layer: int, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """The block's tensors, as stored; on the device, but for the linears' weights."""
        linears = {f"{name}.weight" for name in LINEARS}
        names = [name for name in self._cfg.block_shapes() if name not in without]
        stored = self._reader.read_block(layer, names)
        return {
            name: tensor if name in linears else tensor.to(self.device)
            for name, tensor in stored.items()
        }

    def _planned(self, layer: int, site: str) -> list[str]:
        """The linears of a site to quantize, by name inside the block."""
        prefix = block_prefix(layer)
        return [name for name in SITES[site] if self.plan[prefix + name].fmt is not None]

    def _tick(self, layer: int, site: str) -> None:
        """Between any two batches a listener may raise to stop the run."""
        steps = self._cfg.num_layers * len(SITES)
        done = layer * len(SITES) + list(SITES).index(site)
        self._on_progress(Progress("quantize", done, steps, f"{block_prefix(layer)}{site}"))

    def _enter(self, layer: int, block: Mapping[str, Tensor]) -> None:
        started = time.perf_counter()
        for i in range(len(self._batches)):
            self._tick(layer, "qkv")
            (hidden,) = self.store.get(hidden_name(layer), i)
            self._keep(layer, "qkv", i, begin(self._cfg, block, hidden))
        self.seconds.tokens += time.perf_counter() - started

    def _keep(self, layer: int, site: str, i: int, x: Tensor) -> None:
        """Store a site's input x [B, S, K] as its linears will see it."""
        planned = self._planned(layer, site)
        if len(planned) < len(SITES[site]):
            self.store.put(INPUTS, i, x)
            return
        fmt = self.plan[block_prefix(layer) + planned[0]].fmt
        assert fmt is not None
        self.store.put(INPUTS, i, *reference.quantize_activation(x.flatten(0, 1), fmt.activation))

    def _hessian(self, layer: int, site: str) -> InputHessian:
        """H = X^T X / T over the inputs as the kernel sees them (quantized)."""
        started = time.perf_counter()
        prefix = block_prefix(layer)
        names = self._planned(layer, site)
        plan = self.plan[prefix + names[0]]
        assert plan.fmt is not None
        hessian = InputHessian(plan.shape[1], self.device)
        broken = 0
        for i in range(len(self._batches)):
            self._tick(layer, site)
            inputs = self.store.get(INPUTS, i)
            if len(inputs) == 1:
                x = inputs[0].flatten(0, 1)
                inputs = reference.quantize_activation(x, plan.fmt.activation)
            # A token with a NaN or Inf anywhere has no finite scale.
            broken += int((~torch.isfinite(inputs[1])).sum())
            hessian.add(reference.dequantize_activation(*inputs))
        if broken:
            raise SiteFailed(
                [prefix + name for name in names],
                f"its inputs hold NaN or Inf in {broken} of {hessian.tokens} calibration tokens",
            )
        hessian.finish()
        self.seconds.tokens += time.perf_counter() - started
        return hessian

    def _pass(
        self,
        layer: int,
        site: str,
        block: Mapping[str, Tensor],
        packed: Mapping[str, PackedWeight],
    ) -> None:
        """Compute a site's outputs, and from them the next site's inputs."""
        started = time.perf_counter()
        cfg, names, order = self._cfg, SITES[site], list(SITES)
        following = order[order.index(site) + 1] if site != order[-1] else None
        attend = causal_attention(cfg.sliding_windows[layer])
        biases = {
            name: block[f"{name}.bias"].float() if cfg.has_bias(name) else None for name in names
        }
        all_packed = all(name in packed for name in names)
        if all_packed:
            expanded = [(reference.expand(packed[name]), biases[name]) for name in names]
        else:
            linears = [
                Linear(
                    packed[name]
                    if name in packed
                    else block[f"{name}.weight"].to(self.device, torch.float32),
                    biases[name],
                )
                for name in names
            ]
        # The sites after which something is added to the residual stream.
        adds = site in ("o", "down")
        before = layer if site == "o" else layer + 1
        for i, batch in enumerate(self._batches):
            self._tick(layer, site)
            inputs = self.store.get(INPUTS, i)
            if all_packed:
                codes, scale = inputs
                outputs = packed_outputs(expanded, codes, scale, batch.shape, torch.float32)
            else:
                outputs = site_outputs(linears, inputs[0])
            hidden = self.store.get(hidden_name(before), i)[0] if adds else outputs[0]
            hidden, x = advance(cfg, block, site, hidden, outputs, self._rope, attend)
            if adds:
                self.store.put(hidden_name(layer + 1), i, hidden)
                if site == "o" and not self._rewindable:
                    self.store.forget(hidden_name(layer), i)
            if following is not None:
                self._keep(layer, following, i, x)
        self.seconds.tokens += time.perf_counter() - started
