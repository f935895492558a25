"""The calibration pipeline: one block at a time from the checkpoint, one site at a time in a block.

For every block, and in it for every site in the order of computation: collect the Hessian of the
site's inputs, choose the codes of the linears that share them, and compute their outputs from those
codes. So each linear sees activations that have passed through everything quantized before it, as
the kernels will compute them. Only one block's weights are in memory, and the activations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quant.architectures import EMBEDDING, SITES, block_prefix
from quant.calibration.compensation import (
    NotPositiveDefinite,
    compensate,
    relative_output_error,
)
from quant.calibration.scales import choose_scales
from quant.checkpoint.compressed_tensors import linear_tensors
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.decoder import Linear, advance, begin, causal_attention, rotary_table, site_outputs
from quant.errors import WorkFailed
from quant.recipe import CompensatePass, Pass
from quant.report import LayerReport, OnProgress, Progress
from quant.schemes import LayerPlan
from quant_kernels import reference
from quant_kernels.formats import WeightFormat, effective_weight, nearest_codes
from quant_kernels.packing import PackedWeight, pack_int4

# Tokens that go through a block together: enough to keep a matmul busy, few enough to stay small.
TOKENS_AT_ONCE = 8192

Plan = Mapping[str, LayerPlan]


def quantize_blocks(
    reader: CheckpointReader,
    plan: Plan,
    step: Pass,
    windows: Tensor,
    writer: CheckpointWriter,
    device: torch.device,
    dtype: torch.dtype | None,
    on_progress: OnProgress,
) -> list[LayerReport]:
    """Quantize every block of the checkpoint onto `writer`; one report row per quantized linear.

    windows [n, S]: the calibration tokens. dtype: of the tensors that stay unquantized; None keeps
    each tensor's own. Raises WorkFailed, naming the layer, where activations or a Hessian are
    unusable.
    """
    cfg = reader.config
    batch = max(1, TOKENS_AT_ONCE // windows.shape[1])
    hidden = _embed(reader, windows.split(batch), device)
    rope = rotary_table(cfg, torch.arange(windows.shape[1], device=device).unsqueeze(0))
    steps = cfg.num_layers * len(SITES)
    rows: list[LayerReport] = []
    for layer in range(cfg.num_layers):
        prefix = block_prefix(layer)
        stored = reader.read_block(layer, cfg.block_shapes())
        block = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
        _check_finite(prefix, block)
        attend = causal_attention(cfg.sliding_windows[layer])
        packed: dict[str, PackedWeight] = {}
        xs = [begin(cfg, block, h) for h in hidden]
        for number, (site, linears) in enumerate(SITES.items()):
            on_progress(Progress("quantize", layer * len(SITES) + number, steps, f"{prefix}{site}"))
            done, site_rows = _quantize_site(prefix, linears, block, xs, plan, step)
            packed |= done
            rows += site_rows
            forward = [
                Linear(packed.get(name, block[f"{name}.weight"]), block.get(f"{name}.bias"))
                for name in linears
            ]
            for i, x in enumerate(xs):
                outputs = site_outputs(forward, x)
                hidden[i], xs[i] = advance(cfg, block, site, hidden[i], outputs, rope, attend)
        _write_block(writer, prefix, stored, packed, dtype)
    on_progress(Progress("quantize", steps, steps))
    return rows


def _check_finite(prefix: str, block: Mapping[str, Tensor]) -> None:
    """A NaN rounds to some code and would vanish from sight."""
    for name, tensor in block.items():
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise WorkFailed(
                f"{prefix}{name} holds {count} NaN or Inf: the source checkpoint is broken"
            )


def _embed(reader: CheckpointReader, parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Token ids [b, S] each -> hidden states [b, S, H] FP32 each."""
    table = reader.read(f"{EMBEDDING}.weight")
    return [table[part].to(device, torch.float32) for part in parts]


def _quantize_site(
    prefix: str,
    linears: Sequence[str],
    block: Mapping[str, Tensor],
    xs: Sequence[Tensor],
    plan: Plan,
    step: Pass,
) -> tuple[dict[str, PackedWeight], list[LayerReport]]:
    """Quantize the linears of one site together: they share the inputs, so also the Hessian."""
    names = [name for name in linears if plan[prefix + name].fmt is not None]
    if not names:
        return {}, []
    started = time.perf_counter()
    fmt = plan[prefix + names[0]].fmt
    assert fmt is not None
    site = f"{prefix}{names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
    hessian = _hessian(xs, fmt, site)
    weight = torch.cat([block[f"{name}.weight"] for name in names])
    codes, scales, damping = _choose_codes(weight, fmt, hessian, step, site)
    seconds = time.perf_counter() - started
    packed, rows = {}, []
    sizes = [len(block[f"{name}.weight"]) for name in names]
    parts = zip(names, weight.split(sizes), codes.split(sizes), scales.split(sizes), strict=True)
    for name, w, q, s in parts:
        packed[name] = PackedWeight(pack_int4(q), s.contiguous(), fmt)
        absmax = choose_scales(w, fmt, "absmax")
        nearest = effective_weight(nearest_codes(w, absmax, fmt), absmax, fmt)
        layer_plan = plan[prefix + name]
        rows.append(
            LayerReport(
                name=layer_plan.name,
                shape=layer_plan.shape,
                scheme=fmt.scheme,
                group_size=fmt.group_size,
                numerics=fmt.numerics,
                bits_per_weight=layer_plan.bits_per_weight,
                error_before=relative_output_error(w, nearest, hessian),
                error_after=relative_output_error(w, effective_weight(q, s, fmt), hessian),
                damping=damping,
                seconds=seconds * len(w) / len(weight),
            )
        )
    return packed, rows


def _choose_codes(
    weight: Tensor, fmt: WeightFormat, hessian: Tensor, step: Pass, site: str
) -> tuple[Tensor, Tensor, float | None]:
    """weight [N, K] -> codes [N, K] int8, scales [N, G] BF16, and the damping that was used."""
    scales = choose_scales(weight, fmt, step.scales, hessian.diagonal())
    if not isinstance(step, CompensatePass):
        return nearest_codes(weight, scales, fmt), scales, None
    try:
        result = compensate(
            weight,
            scales,
            fmt,
            hessian,
            damping=step.damping,
            act_order=step.act_order,
            block_size=step.block_size,
        )
    except NotPositiveDefinite as error:
        raise WorkFailed(
            f"{site}: the Hessian of its inputs cannot be inverted ({error}); use more calibration "
            "samples, a larger damping, or ignore the layer"
        ) from error
    return result.codes, scales, result.damping


def _hessian(xs: Sequence[Tensor], fmt: WeightFormat, site: str) -> Tensor:
    """H = X^T X / T [K, K] FP32, over the inputs as the kernel sees them (quantized)."""
    columns = xs[0].shape[-1]
    hessian = torch.zeros(columns, columns, device=xs[0].device)
    tokens = 0
    for batch in xs:
        x = batch.flatten(0, 1)
        x = reference.dequantize_activation(*reference.quantize_activation(x, fmt.activation))
        # Products of inputs rounded to BF16: the sum is the exact Hessian of those inputs.
        with reference.bf16_products():
            hessian.addmm_(x.T, x)
        tokens += len(x)
    hessian /= tokens
    if not bool(torch.isfinite(hessian).all()):
        raise WorkFailed(f"{site}: its inputs hold NaN or Inf on the calibration tokens")
    return hessian


def _write_block(
    writer: CheckpointWriter,
    prefix: str,
    stored: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    dtype: torch.dtype | None,
) -> None:
    replaced = {f"{name}.weight" for name in packed}
    for name, tensor in stored.items():
        if name not in replaced:
            writer.add(prefix + name, tensor if dtype is None else tensor.to(dtype))
    for name, weight in packed.items():
        for suffix, tensor in linear_tensors(weight).items():
            writer.add(f"{prefix}{name}.{suffix}", tensor)
