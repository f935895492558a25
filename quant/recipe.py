"""What to do: a recipe is a scheme, calibration data, and an ordered list of passes.

A recipe is strict YAML: an unknown key, a wrong type or a value out of range is a RequestError that
names the file, the key and the nearest valid one. Presets are the files of `recipes/`.

    scheme: w4afp8              # w4afp8 | w4a8
    group_size: 128             # 32 | 64 | 128 | -1 (per output channel)
    numerics: lut               # w4afp8: lut | exact; w4a8: int8
    kv_cache: none              # none | kv4 | kv4-symmetric
    ignore: []                  # more modules to leave alone: names, or re:<regex>
    calibration: {dataset: builtin, num_calibration_samples: 128, max_seq_length: 512, seed: 0}
    passes:
      - compensate: {scales: hessian, damping: 0.01, act_order: true, block_size: 128}
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quant import strict_yaml
from quant.errors import RequestError
from quant.passes import (
    PASSES,
    CompensatePass,
    Pass,
    RopePass,
    RotatePass,
    Rounding,
    SmoothPass,
    check_passes,
    nearest,
    one_of,
    pass_name,
    require,
)
from quant_kernels.formats import NUMERICS, FormatError, WeightFormat
from quant_kernels.kv4 import KVFormat

DEFAULT_PRESET = "best"
KV_CACHES = {"none": None, "kv4": KVFormat(), "kv4-symmetric": KVFormat(symmetric=True)}


@dataclass(frozen=True)
class Calibration:
    """Which tokens the passes see: so many windows of max_seq_length tokens each."""

    dataset: str = "builtin"
    num_calibration_samples: int = 128
    max_seq_length: int = 512
    seed: int = 0

    def check(self) -> None:
        require(bool(self.dataset), "dataset is empty")
        require(
            self.num_calibration_samples > 0,
            f"num_calibration_samples is {self.num_calibration_samples}; it must be positive",
        )
        require(
            self.max_seq_length > 1,
            f"max_seq_length is {self.max_seq_length}; it must be at least 2",
        )
        require(self.seed >= 0, f"seed is {self.seed}; it must not be negative")


@dataclass(frozen=True)
class Recipe:
    scheme: str = "w4afp8"
    group_size: int = 128
    numerics: str = ""  # empty: the scheme's first
    kv_cache: str = "none"
    ignore: tuple[str, ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    passes: tuple[Pass, ...] = (CompensatePass(),)

    def check(self) -> None:
        one_of("scheme", self.scheme, tuple(NUMERICS))
        one_of("kv_cache", self.kv_cache, tuple(KV_CACHES))
        self.calibration.check()
        check_passes(self.passes)
        for pattern in self.ignore:
            _check_pattern(pattern)
        try:
            _ = self.weight_format
        except FormatError as error:
            raise RequestError(str(error)) from error

    @property
    def rounding(self) -> Rounding:
        """The pass that chooses the codes."""
        return next(step for step in self.passes if isinstance(step, Rounding))

    @property
    def rotate(self) -> RotatePass | None:
        return next((step for step in self.passes if isinstance(step, RotatePass)), None)

    @property
    def undecided(self) -> bool:
        """Whether the model is to show if it is rotated; until then the recipe counts as one that
        rotates, which takes the larger output."""
        return self.rotate is not None and self.rotate.when == "better"

    def decided(self, rotated: bool) -> Recipe:
        """An undecided recipe with the rotation, or without."""
        kept: list[Pass] = []
        for step in self.passes:
            if not isinstance(step, RotatePass):
                kept.append(step)
            elif rotated:
                kept.append(dataclasses.replace(step, when="always"))
        return dataclasses.replace(self, passes=tuple(kept))

    @property
    def smooth(self) -> SmoothPass | None:
        return next((step for step in self.passes if isinstance(step, SmoothPass)), None)

    @property
    def rope(self) -> RopePass | None:
        """None also where there is no quantized KV cache for it to work on."""
        if self.kv_format is None:
            return None
        return next((step for step in self.passes if isinstance(step, RopePass)), None)

    @property
    def kv_format(self) -> KVFormat | None:
        """How keys and values are stored; None: as computed."""
        return KV_CACHES[self.kv_cache]

    @property
    def weight_format(self) -> WeightFormat:
        numerics = self.numerics or NUMERICS[self.scheme][0]
        return WeightFormat(self.scheme, self.group_size, numerics)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data: `load_recipe` of its YAML gives the same recipe."""
        return {
            "scheme": self.scheme,
            "group_size": self.group_size,
            "numerics": self.weight_format.numerics,
            "kv_cache": self.kv_cache,
            "ignore": list(self.ignore),
            "calibration": dataclasses.asdict(self.calibration),
            "passes": [{pass_name(step): _options(step)} for step in self.passes],
        }

    def override(self, **changes: Any) -> Recipe:
        """The recipe with some values replaced; None keeps what is there.

        Keys are Recipe's and Calibration's fields. Changing the scheme resets the numerics.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        names = [f.name for f in dataclasses.fields(Calibration)]
        calibration = {key: value for key, value in given.items() if key in names}
        own = {key: value for key, value in given.items() if key not in names}
        known = [*names, *(f.name for f in dataclasses.fields(self))]
        for key in own:
            if key not in known:
                raise RequestError(
                    f"unknown option {key!r}; known: {', '.join(known)}{nearest(key, known)}"
                )
        if "ignore" in own:
            own["ignore"] = strict_yaml.strings(own["ignore"], "options", "ignore")
        if own.get("scheme", self.scheme) != self.scheme and "numerics" not in own:
            own["numerics"] = ""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        section = {**dataclasses.asdict(self.calibration), **calibration}
        kept["calibration"] = strict_yaml.build(Calibration, section, "options", "calibration")
        new: Recipe = strict_yaml.build(Recipe, {**kept, **own}, "options", "recipe")
        new.check()
        return new


def presets() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    here = Path(__file__).resolve().parent
    for folder in (here / "recipes", here.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise RequestError("the recipes folder of the package is missing; reinstall fourbyeight")


def load_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or a preset by its name."""
    path = Path(name).expanduser()
    known = presets()
    if path.suffix not in (".yaml", ".yml") and name in known:
        path = known[name]
    elif not path.is_file():
        raise RequestError(
            f"recipe {name!r} is no file and no preset; presets: {', '.join(known)}"
            + nearest(name, list(known))
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    data = strict_yaml.load(text, where)
    data = strict_yaml.mapping(data, where, "recipe")
    values = dict(data)
    if "calibration" in values:
        section = strict_yaml.mapping(values["calibration"], where, "calibration")
        values["calibration"] = strict_yaml.build(Calibration, section, where, "calibration")
    if "passes" in values:
        values["passes"] = parse_passes(values["passes"], where)
    if "ignore" in values:
        values["ignore"] = strict_yaml.strings(values["ignore"], where, "ignore")
    recipe = strict_yaml.build(Recipe, values, where, "recipe")
    try:
        recipe.check()
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    return recipe


def parse_passes(value: Any, where: str) -> tuple[Pass, ...]:
    if not isinstance(value, list):
        raise RequestError(f"{where}: passes must be a list, got {strict_yaml.kind_of(value)}")
    found = []
    for item in value:
        options = {item: None} if isinstance(item, str) else item
        if not isinstance(options, dict) or len(options) != 1:
            raise RequestError(f"{where}: every entry of passes is one `name: {{options}}`")
        name, section = next(iter(options.items()))
        if name not in PASSES:
            raise RequestError(
                f"{where}: pass {name!r} is unknown; known: {', '.join(PASSES)}"
                + nearest(str(name), list(PASSES))
            )
        section = strict_yaml.mapping({} if section is None else section, where, str(name))
        found.append(strict_yaml.build(PASSES[name], section, where, f"passes.{name}"))
    return tuple(found)


def _options(step: Pass) -> dict[str, Any]:
    """A pass's options as plain data."""
    options = dataclasses.asdict(step)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise RequestError(f"ignore: {pattern!r} is no regular expression: {error}") from error
