"""The calibration pipeline of a block: one site at a time, all calibration tokens through each.

For every site in the order of computation: collect the Hessian of its inputs, choose the codes of
the linears that share them, and compute their outputs from those codes. So each linear sees
activations that have passed through everything quantized before it, as the kernels will compute
them.

Between two sites the inputs wait in a store: as codes and scales, which is what the kernels see of
them, or dense (`inputs.py`). The residual stream waits beside them, one version per block:
`hidden-00003` is what enters block 3.
Memory holds the weights of one block, as stored (in FP32 where they were rotated; parts of a site's
when it is its turn), one Hessian, and a batch.

What stays unquantized is brought to the type that it will be stored in before anything is computed
from it, so that the tokens that pass a finished block again, when a run is resumed, take its
tensors from the output and see the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, LINEARS, SITES, DecoderConfig, block_prefix
from quant.calibration.activations import ActivationStore, Shape
from quant.calibration.block import BlockWork
from quant.calibration.feedback import FEEDBACK_SITES, UnquantizedStream, corrected, stream_name
from quant.calibration.folding import folded_scale
from quant.calibration.hessian import InputHessian
from quant.calibration.inputs import SiteInputs
from quant.calibration.key_scaling import scale_keys, turn_pairs
from quant.calibration.rope import SAMPLED_TOKENS, KeyStatistics
from quant.calibration.rotation import NORM_OF, Rotation, make_rotation
from quant.calibration.site import MAX_ERROR, SiteFailed, part_elements, quantize_site, report_row
from quant.calibration.smoothing import SEARCHED_TOKENS, SiteWork, smooth_site
from quant.checkpoint.reader import CheckpointReader
from quant.decoder import (
    KeyTransform,
    advance,
    begin,
    causal_attention,
    rotary_table,
)
from quant.errors import WorkFailed
from quant.memory import release_free_memory
from quant.passes import CompensatePass, RopePass
from quant.recipe import Recipe
from quant.report import LayerReport, OnProgress, Progress, ignore_progress
from quant.schemes import LayerPlan
from quant_kernels import reference
from quant_kernels.packing import PackedWeight

# Tokens that go through a block together: enough to keep a matmul busy, and so few that their
# widest activations take no more than a small part of a block's weights (in FP32).
TOKENS_AT_ONCE = 8192
BATCH_OF_BLOCK = 1 / 16
BATCH_BYTES = 4 * 2**20
DEFAULT_DAMPING = 0.01
# Of the inputs of a site that is to be smoothed, while they wait.
WAITING = torch.bfloat16


@dataclass(frozen=True)
class QuantizedBlock:
    """What became of a block: packed linears and what stays, by name inside the block; and what is
    done to its keys before they are stored."""

    packed: dict[str, PackedWeight]
    kept: dict[str, Tensor]
    keys: KeyTransform | None = None
    rows: tuple[LayerReport, ...] = ()


@dataclass(frozen=True)
class SiteStatistics:
    """Of a site's inputs x^ over all tokens: H, max|x| [K], and C [N, K] (`feedback.py`) if any."""

    hessian: InputHessian
    amax: Tensor
    cross: Tensor | None


@dataclass
class Seconds:
    """Where the time went: what grows with the tokens, and what does not."""

    tokens: float = 0.0
    weights: float = 0.0


def hidden_name(layer: int) -> str:
    """Of the residual stream that enters a block."""
    return f"hidden-{layer:05d}"


def _stream_before(layer: int, site: str) -> int:
    """The residual stream to which a site's output is added: under the name of which block."""
    return layer if site == "o" else layer + 1


def windows_at_once(cfg: DecoderConfig, length: int) -> int:
    """How many windows of `length` tokens make a batch."""
    widest = max(cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.intermediate_size)
    room = max(BATCH_BYTES, int(4 * cfg.block_elements() * BATCH_OF_BLOCK))
    return max(1, min(TOKENS_AT_ONCE, room // (4 * widest)) // length)


class BlockPipeline:
    """Calibration tokens on their way through the blocks.

    windows [n, S]: token ids. dtype: of what stays unquantized; None: as stored. rewindable: keep
    what entered a block until `leave` says that it is finished, so that it can be quantized again.
    observed: let the unquantized stream run beside, for `stream_error`, also where no weight is
    corrected by it.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        plan: Mapping[str, LayerPlan],
        recipe: Recipe,
        windows: Tensor,
        store: ActivationStore,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        max_error: float = MAX_ERROR,
        rewindable: bool = False,
        observed: bool = False,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.plan = dict(plan)
        self.seconds = Seconds()
        self.store = store
        self._reader = reader
        self._cfg = cfg = reader.config
        self._rounding = recipe.rounding
        self._smoothing = recipe.smooth
        self._key_scaling = recipe.rope
        self._kv = recipe.kv_format
        self._symmetric_cache = self._kv is not None and self._kv.symmetric
        self.rotation = Rotation(None, None)
        if recipe.rotate is not None:
            self.rotation = make_rotation(recipe.rotate, cfg, device)
        self._dtype = dtype
        self._batches = windows.split(windows_at_once(cfg, windows.shape[1]))
        self._inputs = SiteInputs(store)
        self.device = device
        self._max_error = max_error
        self._rewindable = rewindable
        self._on_progress = on_progress
        positions = torch.arange(windows.shape[1], device=device).unsqueeze(0)
        self._rope = rotary_table(cfg, positions)
        self._feedback = (
            self._rounding.feedback if isinstance(self._rounding, CompensatePass) else 0.0
        )
        self._unquantized: UnquantizedStream | None = None
        if self._feedback or observed:
            self._unquantized = UnquantizedStream(cfg, store, len(self._batches), self._rope)

    def embed(self) -> None:
        """Look up the tokens: what enters block 0."""
        name = f"{EMBEDDING}.weight"
        for i, batch in enumerate(self._batches):
            used, place = batch.unique(return_inverse=True)
            # Only the rows that occur: the whole table may be larger than a block.
            rows = torch.cat([self._reader.rows(name, row, row + 1) for row in used.tolist()])
            rows = self.rotation.rows(rows.to(self.device)).to(self._dtype or rows.dtype)
            hidden = rows.float()[place.to(self.device)]
            self.store.put(hidden_name(0), i, hidden)
            if self._unquantized is not None:
                self._unquantized.begin(i, hidden)

    def streams(self, layer: int) -> list[str]:
        """What the store keeps of the tokens that enter a block, by name."""
        names = [hidden_name(layer)]
        return names if self._unquantized is None else [*names, stream_name(layer)]

    def stream_shapes(self) -> list[Shape]:
        """Of each of the streams, by batch."""
        hidden = self._cfg.hidden_size
        return [(torch.float32, (*batch.shape, hidden)) for batch in self._batches]

    def stream_error(self, layer: int) -> float:
        """What the residual stream has lost on its way to a block: |h - h^|^2 / |h|^2, the mean
        over all tokens. Only where the unquantized one runs beside."""
        assert self._unquantized is not None
        streams = (self.store.get(hidden_name(layer), i)[0] for i in range(len(self._batches)))
        return self._unquantized.error(layer, streams)

    def leave_alone(self, names: Sequence[str]) -> None:
        """From now on these linears (full names) stay as they are."""
        for name in names:
            self.plan[name] = replace(self.plan[name], fmt=None)

    def quantize(self, layer: int) -> QuantizedBlock:
        """Quantize a block, and let the tokens through it.

        Raises SiteFailed, and WorkFailed where a block cannot be rotated, or its keys scaled.
        """
        started = time.perf_counter()
        work = BlockWork(self._cfg, layer, self._read(layer))
        if layer + 1 < self._cfg.num_layers:
            following = block_prefix(layer + 1)
            self._reader.will_need([following + name for name in self._cfg.block_shapes()])
        elements = part_elements(self._cfg.block_elements())
        rows: list[LayerReport] = []
        self.seconds.weights += time.perf_counter() - started
        self._advance_unquantized(layer, work.tensors)
        self._enter(layer, work.tensors)
        for site in SITES:
            if site == "qkv" and self._turns_pairs:
                self._turn_pairs(work)
            if self._planned(layer, site):
                rows += self._quantize_site(work, site, elements)
            if site == "qkv" and self._key_scaling is not None:
                self._scale_keys(work, self._key_scaling)
            self._pass(work, site)
        return QuantizedBlock(work.packed, work.tensors, work.keys, tuple(rows))

    def _quantize_site(self, work: BlockWork, site: str, elements: int) -> list[LayerReport]:
        """Quantize a site: its linears move from the block's tensors to its packed ones."""
        prefix, names = work.prefix, self._planned(work.layer, site)
        fmt = self.plan[prefix + names[0]].fmt
        assert fmt is not None
        seen = self._hessian(work.layer, site)
        hessian = seen.hessian
        started = time.perf_counter()
        chosen = ""
        if self._smooths(site):
            assert self._smoothing is not None
            rounding = self._rounding
            damping = rounding.damping if isinstance(rounding, CompensatePass) else DEFAULT_DAMPING
            site_work = SiteWork(
                block=work,
                site=site,
                planned=names,
                fmt=fmt,
                inputs=self._inputs,
                hessian=hessian,
                amax=seen.amax,
                sampled=self._sampled(SEARCHED_TOKENS),
                token_weights=lambda i: self._token_weights(work.layer, site, i),
            )
            chosen = smooth_site(site_work, self._smoothing, damping, self._rope)
        full = [prefix + name for name in names]
        weights = [work.tensors[f"{name}.weight"].to(self.device) for name in names]
        release_free_memory()  # of the batches: here a block's memory is at its peak
        if seen.cross is not None:
            weights = [self._corrected(weights[0], seen.cross, hessian)]
        found = quantize_site(
            full,
            weights,
            fmt,
            self._rounding,
            hessian,
            max_error=self._max_error,
            elements=elements,
        )
        seconds = time.perf_counter() - started
        self.seconds.weights += seconds
        size = sum(weight.numel() for weight in weights)
        rows = []
        for name, row in zip(names, found, strict=True):
            work.packed[name] = row.weight
            plan = self.plan[prefix + name]
            share = work.tensors.pop(f"{name}.weight").numel() / size
            rows.append(report_row(plan, row, chosen, seconds * share))
        return rows

    def _sampled(self, tokens: int) -> list[int]:
        """Batches of about so many tokens together, evenly spaced from the first one on."""
        count = max(1, min(tokens // self._batches[0].numel(), len(self._batches)))
        return [i * len(self._batches) // count for i in range(count)]

    def _token_weights(self, layer: int, site: str, i: int) -> Tensor:
        """What a batch's tokens weigh in a site's Hessian, [T, 1]."""
        if self._feeds_back(site):
            assert self._unquantized is not None
            return self._unquantized.token_weights(layer, site, i)
        return torch.ones(self._batches[i].numel(), 1, device=self.device)

    def _corrected(self, weight: Tensor, cross: Tensor, hessian: InputHessian) -> Tensor:
        """A weight moved towards what the residual stream misses."""
        step = self._rounding
        assert isinstance(step, CompensatePass)
        if self._inputs.divisor is not None:
            cross = cross / self._inputs.divisor
        return corrected(weight, cross, hessian, step.feedback, step.ridge)

    def _advance_unquantized(self, layer: int, block: Mapping[str, Tensor]) -> None:
        if self._unquantized is not None:
            started = time.perf_counter()
            self._unquantized.advance(layer, block)
            self.seconds.tokens += time.perf_counter() - started

    def _feeds_back(self, site: str) -> bool:
        return self._feedback > 0 and site in FEEDBACK_SITES

    def _smooths(self, site: str) -> bool:
        return self._smoothing is not None and site in self._smoothing.sites

    def forward(self, layer: int, finished: QuantizedBlock) -> None:
        """Let the tokens through a block that is finished."""
        if self._unquantized is not None:
            self._advance_unquantized(layer, self._read(layer))
        block = {name: tensor.to(self.device) for name, tensor in finished.kept.items()}
        divisors: dict[str, Tensor | None] = dict.fromkeys(SITES)
        for site in (site for site in NORM_OF if self._smooths(site)):
            # As the run did that finished it: the norm as it was, and its outputs divided.
            norm = self._norm(layer, NORM_OF[site])
            divisors[site] = folded_scale(norm, block[NORM_OF[site]])
            block[NORM_OF[site]] = norm
        self._enter(layer, block)
        work = BlockWork(self._cfg, layer, block, dict(finished.packed), finished.keys)
        for site in SITES:
            self._inputs.divisor = divisors[site]
            self._pass(work, site)
        self.leave(layer)

    def leave(self, layer: int) -> None:
        """The block is finished: forget what entered it."""
        for i in range(len(self._batches)):
            self.store.forget(hidden_name(layer), i)
        if self._unquantized is not None:
            self._unquantized.leave(layer)

    def _read(self, layer: int) -> dict[str, Tensor]:
        """The block's tensors, rotated; on the device, but for the linears' weights as stored."""
        stored = self._reader.read_block(layer, list(self._cfg.block_shapes()))
        types = {name: self._dtype or tensor.dtype for name, tensor in stored.items()}
        rotates = self.rotation.residual is not None or self.rotation.head is not None
        if rotates:
            stored = {name: tensor.to(self.device) for name, tensor in stored.items()}
            self.rotation.block(self._cfg, stored)
            for name, tensor in stored.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise WorkFailed(
                        f"{block_prefix(layer)}{name} cannot be rotated: with the norm before it "
                        "folded into it, it overflows; use a recipe without rotate"
                    )
        planned = {f"{name}.weight" for site in SITES for name in self._planned(layer, site)}
        linears = {f"{name}.weight" for name in LINEARS}
        block = {}
        for name, tensor in stored.items():
            kept = tensor if name in planned else tensor.to(types[name])
            block[name] = kept if name in linears else kept.to(self.device)
        return block

    def _norm(self, layer: int, name: str) -> Tensor:
        """A norm's weight as it is before anything is folded into it, but a rotation."""
        stored = self._reader.read(block_prefix(layer) + name).to(self.device)
        if self.rotation.residual is not None:
            stored = torch.ones_like(stored)
        return stored.to(self._dtype or stored.dtype)

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
        self._inputs.divisor = None
        for i in range(len(self._batches)):
            self._tick(layer, "qkv")
            (hidden,) = self.store.get(hidden_name(layer), i)
            self._keep(layer, "qkv", i, begin(self._cfg, block, hidden))
        self.seconds.tokens += time.perf_counter() - started

    def _keep(self, layer: int, site: str, i: int, x: Tensor) -> None:
        """Store a site's input x [B, S, K] as its linears will see it, or as it is."""
        planned = self._planned(layer, site)
        if planned and self._smooths(site):
            self._inputs.put(i, x, WAITING)
        elif len(planned) < len(SITES[site]):
            self._inputs.put(i, x, torch.float32)
        else:
            fmt = self.plan[block_prefix(layer) + planned[0]].fmt
            assert fmt is not None
            self._inputs.put_quantized(i, x, fmt.activation)

    def _hessian(self, layer: int, site: str) -> SiteStatistics:
        """Of a site's inputs as the kernel sees them; not quantized yet where they are smoothed."""
        started = time.perf_counter()
        prefix = block_prefix(layer)
        names = self._planned(layer, site)
        plan = self.plan[prefix + names[0]]
        assert plan.fmt is not None
        hessian = InputHessian(plan.shape[1], self.device)
        amax = torch.zeros(plan.shape[1], device=self.device)
        cross = None
        if self._feeds_back(site):
            cross = torch.zeros(plan.shape, device=self.device)
        broken = 0
        for i in range(len(self._batches)):
            self._tick(layer, site)
            if self._smooths(site):
                x = self._inputs.dense(i).flatten(0, 1)
                amax = torch.maximum(amax, x.abs().amax(dim=0))
                broken += int((~torch.isfinite(x).all(dim=1)).sum())
            else:
                codes, scale = self._inputs.quantized(i, plan.fmt.activation)
                # A token with a NaN or Inf anywhere has no finite scale.
                broken += int((~torch.isfinite(scale)).sum())
                x = reference.dequantize_activation(codes, scale)
            if cross is not None:
                assert self._unquantized is not None
                token_weights = self._token_weights(layer, site, i)
                before = self.store.get(hidden_name(_stream_before(layer, site)), i)[0]
                missing = self._unquantized.after(layer, site, i) - before
                x = x * token_weights
                cross.addmm_((missing.flatten(0, 1) * token_weights).T, x)
            hessian.add(x)
        if broken:
            raise SiteFailed(
                [prefix + name for name in names],
                f"its inputs hold NaN or Inf in {broken} of {hessian.tokens} calibration tokens",
            )
        hessian.finish()
        if cross is not None:
            cross /= hessian.tokens
        self.seconds.tokens += time.perf_counter() - started
        return SiteStatistics(hessian, amax, cross)

    def _pass(self, work: BlockWork, site: str) -> None:
        """Compute a site's outputs, and from them the next site's inputs."""
        started = time.perf_counter()
        cfg, order = self._cfg, list(SITES)
        layer, block = work.layer, work.tensors
        following = order[order.index(site) + 1] if site != order[-1] else None
        attend = causal_attention(
            cfg.sliding_windows[layer], self._kv, work.keys if self._kv else None
        )
        outputs_of = work.linears(site, self._inputs, self._batches, self.device)
        # The sites after which something is added to the residual stream.
        adds = site in FEEDBACK_SITES
        before = _stream_before(layer, site)
        for i in range(len(self._batches)):
            self._tick(layer, site)
            outputs = outputs_of(i)
            hidden = self.store.get(hidden_name(before), i)[0] if adds else outputs[0]
            hidden, x = advance(cfg, block, site, hidden, outputs, self._rope, attend)
            if adds:
                self.store.put(hidden_name(layer + 1), i, hidden)
                if site == "o" and not self._rewindable:
                    self.store.forget(hidden_name(layer), i)
            if following is not None:
                self._keep(layer, following, i, x)
        self._inputs.divisor = None  # from here on the next site's inputs are read
        self.seconds.tokens += time.perf_counter() - started

    @property
    def _turns_pairs(self) -> bool:
        """Not where weights come between q_proj and RoPE, or k_proj and RoPE."""
        return self._key_scaling is not None and self._key_scaling.turn and not self._cfg.qk_norm

    def _turn_pairs(self, work: BlockWork) -> None:
        planned = self._planned(work.layer, "qkv")
        turn_pairs(work, self._seen_of_keys(work), planned, symmetric=self._symmetric_cache)

    def _scale_keys(self, work: BlockWork, step: RopePass) -> None:
        """Choose what is done to the keys, from some of the tokens; pairs are folded."""
        seen = self._seen_of_keys(work)
        work.keys = scale_keys(work, step, seen, symmetric=self._symmetric_cache)

    def _seen_of_keys(self, work: BlockWork) -> KeyStatistics:
        """Statistics of the keys, from some of the tokens, with the weights as they are now."""
        started = time.perf_counter()
        cfg, site = self._cfg, "qkv"
        seen = KeyStatistics(cfg, cfg.sliding_windows[work.layer])

        def observe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.add(q, k)
            return q

        outputs_of = work.linears(site, self._inputs, self._batches, self.device)
        for i in self._sampled(SAMPLED_TOKENS):
            self._tick(work.layer, site)
            outputs = outputs_of(i)
            advance(cfg, work.tensors, site, outputs[0], outputs, self._rope, observe)
        self.seconds.tokens += time.perf_counter() - started
        return seen
