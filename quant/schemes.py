"""Which layers get which format: the plan of a run, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from quant.architectures import LINEARS, LM_HEAD, DecoderConfig, block_prefix
from quant.checkpoint.compressed_tensors import is_ignored
from quant.errors import RequestError
from quant.recipe import Recipe
from quant_kernels.formats import FormatError, WeightFormat, bits_per_weight

# As a user types them, with what they mean.
SCHEMES = {
    "w4afp8": "INT4 weights x FP8 (E4M3) activations, as in FireQ",
    "w4a8": "INT4 weights x INT8 activations, as in QQQ",
}


@dataclass(frozen=True)
class LayerPlan:
    """One linear: its full name, shape (N, K), and format, or None where it stays as it is."""

    name: str
    shape: tuple[int, int]
    fmt: WeightFormat | None

    @property
    def bits_per_weight(self) -> float:
        return bits_per_weight(self.shape[1], self.fmt) if self.fmt else 16.0


def plan_layers(cfg: DecoderConfig, recipe: Recipe) -> dict[str, LayerPlan]:
    """Every linear of every block, by full name, in the order of computation.

    RequestError where a shape does not fit the format, or an ignore entry matches nothing.
    """
    fmt = recipe.weight_format
    plan = {}
    for layer in range(cfg.num_layers):
        for linear in LINEARS:
            name, shape = block_prefix(layer) + linear, cfg.linear_shape(linear)
            ignored = is_ignored(name, list(recipe.ignore))
            if not ignored:
                try:
                    fmt.check(*shape, name)
                except FormatError as error:
                    raise RequestError(str(error)) from error
            plan[name] = LayerPlan(name, shape, None if ignored else fmt)
    for pattern in recipe.ignore:
        if not any(is_ignored(name, [pattern]) for name in (*plan, LM_HEAD)):
            raise RequestError(
                f"ignore: {pattern!r} matches no layer; names look like {next(iter(plan))!r}, "
                "and a regular expression is matched from their start (re:.*down_proj)"
            )
    if all(row.fmt is None for row in plan.values()):
        raise RequestError("ignore leaves no layer to quantize")
    return plan
