"""What a run would do and what it needs, from the checkpoint's headers; nothing is read or made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quant.architectures import EMBEDDING, FINAL_NORM, LINEARS, LM_HEAD, SITES, block_prefix
from quant.calibration.activations import OFFLOADS, ActivationStore, DiskStore, MemoryStore
from quant.calibration.pipeline import windows_at_once
from quant.calibration.rope import check_rotary_layout
from quant.calibration.site import part_elements
from quant.checkpoint.compressed_tensors import packed_shapes
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.shards import DTYPE_NAMES, DTYPES, header_bytes
from quant.decoder import check_head_dim
from quant.errors import RequestError
from quant.memory import available_bytes
from quant.passes import CompensatePass
from quant.recipe import Recipe
from quant.report import mean_bits_per_weight
from quant.schemes import LayerPlan, plan_layers

# Arrays of the size of a batch's widest activations that are alive together, and of a part of a
# weight in the search for its codes.
BATCH_COPIES = 6
PART_COPIES = 12
# A run takes host memory up to this share of what is left.
HOST_SHARE = 0.7
# Versions of the residual stream on disk: what enters a block, what leaves it, and the one before,
# which is removed when the journal has its successor.
HIDDEN_ON_DISK = 3


@dataclass(frozen=True)
class RunPlan:
    """What a run would do. Sizes in bytes.

    tensors: all of the output in the order of writing, name -> type and shape. block_bytes: a
    block's weights as they are computed with, in FP32. activation_bytes: what the store holds, at
    activation_place ("device", "cpu" or "disk"). working_bytes: a Hessian, and what is alive while
    a site is quantized or computed. disk_bytes: what OUT and the run take there. seconds: what a
    measured block makes one expect; None where none was measured.
    """

    source: str
    model_type: str
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = dataclasses.field(repr=False)
    source_size_bytes: int
    size_bytes: int
    block_bytes: int
    activation_bytes: int
    activation_place: str
    working_bytes: int
    disk_bytes: int
    seconds: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Over the layers to quantize."""
        return mean_bits_per_weight([row for row in self.layers if row.fmt])

    @property
    def memory_bytes(self) -> int:
        """What the run should take at most, beside what the process holds when it begins."""
        held = 0 if self.activation_place == "disk" else self.activation_bytes
        return self.block_bytes // 2 + held + self.working_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "tensors": len(self.tensors),
            "recipe": self.recipe.to_dict(),
            "layers": [
                {
                    "name": row.name,
                    "shape": row.shape,
                    "format": row.fmt.label if row.fmt else None,
                    "bits_per_weight": row.bits_per_weight,
                }
                for row in self.layers
            ],
            "bits_per_weight": self.bits_per_weight,
            "memory_bytes": self.memory_bytes,
        }


def make_plan(
    reader: CheckpointReader,
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    activation_offload: str = "auto",
    rewindable: bool = False,
) -> RunPlan:
    """Plan a run. Raises RequestError where the checkpoint or a shape does not fit the recipe.

    dtype: of what stays unquantized; None: as stored. rewindable: see `BlockPipeline`.
    """
    reader.check_dense()
    cfg = reader.config
    if recipe.rope is not None:
        check_rotary_layout(reader.raw_config)
    if recipe.kv_format is not None:
        check_head_dim(cfg)
    layers = plan_layers(cfg, recipe)
    untie = recipe.rotate is not None and recipe.rotate.residual and cfg.tie_word_embeddings
    tensors = _output_tensors(reader, layers, dtype)
    if untie:
        tensors[f"{LM_HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
    calibration = recipe.calibration
    length = calibration.max_seq_length
    tokens = calibration.num_calibration_samples * length
    widest = max(cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.intermediate_size)
    elements = cfg.block_elements()
    batch = 4 * windows_at_once(cfg, length) * length * widest
    largest_site = max(
        sum(cfg.linear_shape(name)[0] * cfg.linear_shape(name)[1] for name in names)
        for names in SITES.values()
    )
    quantizing = 4 * widest**2 + PART_COPIES * 4 * part_elements(elements)
    computing = 4 * largest_site + BATCH_COPIES * batch
    hidden = 4 * tokens * cfg.hidden_size
    inputs = tokens * max(
        _input_bytes(layers, block_prefix(i), recipe) for i in range(cfg.num_layers)
    )
    rounding = recipe.rounding
    feeds_back = isinstance(rounding, CompensatePass) and rounding.feedback > 0
    # With feedback also two of the unquantized stream, and its BF16 one inside a block.
    inside = hidden // 2 if feeds_back else 0
    held = hidden * (2 if rewindable else 1) + inputs + (2 * hidden + inside if feeds_back else 0)
    size = header_bytes(tensors) + sum(
        torch.Size(shape).numel() * DTYPES[kind].itemsize for kind, shape in tensors.values()
    )
    plan = RunPlan(
        source=str(reader.directory),
        model_type=cfg.model_type,
        recipe=recipe,
        layers=tuple(layers.values()),
        tensors=tensors,
        source_size_bytes=reader.size_bytes(),
        size_bytes=size,
        block_bytes=4 * elements,
        activation_bytes=held,
        activation_place="cpu",
        working_bytes=max(quantizing, computing),
        disk_bytes=size,
    )
    place = _place(plan, activation_offload, device or torch.device("cpu"))
    streams = 2 if feeds_back else 1
    spilled = streams * (HIDDEN_ON_DISK * hidden + inside) + inputs if place == "disk" else 0
    return dataclasses.replace(plan, activation_place=place, disk_bytes=size + spilled)


def open_store(plan: RunPlan, device: torch.device, directory: Path) -> ActivationStore:
    """Where the plan puts the activations; directory: for those on disk."""
    if plan.activation_place == "disk":
        return DiskStore(directory, device)
    return MemoryStore(device, host=plan.activation_place == "cpu")


def _place(plan: RunPlan, offload: str, device: torch.device) -> str:
    """ "device", "cpu" or "disk" for what a user typed."""
    if offload not in OFFLOADS:
        raise RequestError(
            f"activation offload {offload!r} is unknown; known: {', '.join(OFFLOADS)}"
        )
    if offload != "auto":
        return "device" if offload == "none" else offload
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if plan.memory_bytes <= HOST_SHARE * free:
            return "device"
        # The device keeps the block and the Hessian, the host what waits.
        needed = plan.activation_bytes + plan.block_bytes // 2
    else:
        needed = plan.memory_bytes
    return "cpu" if needed <= HOST_SHARE * available_bytes() else "disk"


def _input_bytes(layers: dict[str, LayerPlan], prefix: str, recipe: Recipe) -> int:
    """Bytes a token of the widest inputs of a block's sites, as the store keeps them."""
    widest = 0
    smoothed = recipe.smooth.sites if recipe.smooth is not None else ()
    for site, names in SITES.items():
        plans = [layers[prefix + name] for name in names]
        columns = plans[0].shape[1]
        all_packed = all(plan.fmt is not None for plan in plans)
        if site in smoothed and any(plan.fmt is not None for plan in plans):
            size = 2 * columns
        else:
            size = columns + 4 if all_packed else 4 * columns
        widest = max(widest, size)
    return widest


def _output_tensors(
    reader: CheckpointReader, layers: dict[str, LayerPlan], dtype: torch.dtype | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    cfg = reader.config

    def kept(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        return (reader.dtype(name) if dtype is None else DTYPE_NAMES[dtype]), shape

    outer = cfg.outer_shapes()
    embedding, *others = (f"{module}.weight" for module in (EMBEDDING, FINAL_NORM, LM_HEAD))
    tensors = {embedding: kept(embedding, outer[embedding])}
    weights = {f"{linear}.weight": linear for linear in LINEARS}
    for layer in range(cfg.num_layers):
        prefix = block_prefix(layer)
        packed: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in cfg.block_shapes().items():
            plan = layers[prefix + weights[name]] if name in weights else None
            if plan is None or plan.fmt is None:
                tensors[prefix + name] = kept(prefix + name, shape)
                continue
            words, scales = packed_shapes(plan.name, plan.shape, plan.fmt).items()
            packed |= {
                words[0]: ("I32", words[1]),
                scales[0]: ("BF16", scales[1]),
                f"{plan.name}.weight_shape": ("I64", (2,)),
            }
        tensors |= packed
    return tensors | {name: kept(name, outer[name]) for name in others if name in outer}
