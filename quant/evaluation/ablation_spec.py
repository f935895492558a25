"""What an ablation compares: rows, each a way to quantize, and what is measured of each.

A strict YAML file, in the manner of recipes: an unknown key, a wrong type or a value out of range
is a RequestError that names the file, the row, the key and the nearest valid one.

    calibration: {dataset: builtin, num_calibration_samples: 64, max_seq_length: 512}
    seeds: [0, 1, 2]                # draws of the calibration windows; a row may have its own
    perplexity:                     # corpora; max_windows 0 takes all
      - {dataset: builtin, max_seq_length: 2048, max_windows: 10}
    tasks: []                       # as of `quantize eval --tasks`
    limit: 0                        # items a task; 0: all
    rows:
      - {name: rtn, recipe: rtn, scheme: w4a8, group_size: 64}
      - {name: no act-order, group_size: 64, passes: [compensate: {act_order: false}]}

A row has a name, a recipe (a preset or a file; default `gptq`), and any of a recipe's own keys,
which replace the recipe's. The unquantized model is always measured first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant import strict_yaml
from quant.errors import RequestError
from quant.passes import nearest
from quant.recipe import (
    DEFAULT_PRESET,
    Calibration,
    Recipe,
    load_recipe,
    parse_passes,
    presets,
)

UNQUANTIZED = "unquantized"
FOLDER = "eval"  # inside the folder of presets
SECTIONS = ("calibration", "seeds", "perplexity", "tasks", "limit", "rows")
OWN_KEYS = ("name", "recipe", "seeds")


@dataclass(frozen=True)
class Corpus:
    """Text to measure perplexity on; max_windows 0: all of it."""

    dataset: str = "builtin"
    max_seq_length: int = 2048
    max_windows: int = 0

    def check(self) -> None:
        if not self.dataset:
            raise RequestError("dataset is empty")
        if self.max_seq_length < 2:
            raise RequestError(f"max_seq_length is {self.max_seq_length}; it must be at least 2")
        if self.max_windows < 0:
            raise RequestError(f"max_windows is {self.max_windows}; it must not be negative")

    @property
    def label(self) -> str:
        """Its name in tables: a file without its folder, a hub id whole."""
        path = Path(self.dataset)
        return (
            path.stem
            if path.suffix in (".txt", ".jsonl", ".json", ".parquet", ".npy")
            else (self.dataset)
        )


@dataclass(frozen=True)
class Row:
    """A way to quantize: the resolved recipe, of which every seed draws other windows."""

    name: str
    recipe: Recipe
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Ablation:
    """limit: items a task at most; None: all."""

    rows: tuple[Row, ...]
    corpora: tuple[Corpus, ...]
    tasks: tuple[str, ...]
    limit: int | None

    def override(
        self,
        *,
        datasets: Sequence[str] | None = None,
        calibration_dataset: str | None = None,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Ablation:
        """The same rows on other data; None keeps the file's.

        Other corpora are measured with the windows of the file's first.
        """
        rows, corpora = self.rows, self.corpora
        if calibration_dataset is not None:
            rows = tuple(
                dataclasses.replace(row, recipe=row.recipe.override(dataset=calibration_dataset))
                for row in rows
            )
        if datasets:
            first = corpora[0] if corpora else Corpus()
            corpora = tuple(dataclasses.replace(first, dataset=name) for name in datasets)
        if limit is not None and limit < 1:
            raise RequestError(f"the limit is {limit} items; it must be at least 1")
        new = Ablation(
            rows,
            corpora,
            self.tasks if tasks is None else tuple(tasks),
            self.limit if limit is None else limit,
        )
        new.check("options")
        return new

    def check(self, where: str) -> None:
        if not self.corpora and not self.tasks:
            raise RequestError(f"{where}: nothing is measured; give perplexity or tasks")
        _unique([corpus.label for corpus in self.corpora], f"{where}: the corpus")


def load_ablation(name: str) -> Ablation:
    """An ablation from a YAML file, or one that comes with the package by its name."""
    path = Path(name).expanduser()
    folder = next(iter(presets().values())).parent / FOLDER
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if path.suffix not in (".yaml", ".yml") and name in known:
        path = known[name]
    elif not path.is_file():
        raise RequestError(
            f"ablation {name!r} is no file and none of those that come with the package: "
            f"{', '.join(known)}{nearest(name, list(known))}"
        )
    try:
        return parse_ablation(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from error


def parse_ablation(text: str, where: str) -> Ablation:
    """An ablation from YAML text; `where` names it in errors."""
    data = strict_yaml.mapping(strict_yaml.load(text, where), where, "ablation")
    _known_keys(data, SECTIONS, where, "ablation")
    limit = data.get("limit", 0)
    if type(limit) is not int or limit < 0:
        raise RequestError(f"{where}: limit must be a number of items, 0 for all; got {limit!r}")
    calibration = _calibration(data.get("calibration", {}), where)
    seeds = _seeds(data.get("seeds", [0]), f"{where}: seeds")
    rows = tuple(
        _row(item, i, calibration, seeds, where)
        for i, item in enumerate(_list(data.get("rows"), where, "rows"), 1)
    )
    corpora = tuple(
        _corpus(item, where) for item in _list(data.get("perplexity", []), where, "perplexity")
    )
    if not rows:
        raise RequestError(f"{where}: rows is empty; there is nothing to compare")
    _unique([UNQUANTIZED, *(row.name for row in rows)], f"{where}: the row")
    tasks = strict_yaml.strings(data.get("tasks", []), where, "tasks")
    spec = Ablation(rows, corpora, tasks, limit or None)
    spec.check(where)
    return spec


def _calibration(value: Any, where: str) -> Calibration:
    section = strict_yaml.mapping(value, where, "calibration")
    if "seed" in section:
        raise RequestError(f"{where}: calibration.seed is the list `seeds`, beside calibration")
    found: Calibration = strict_yaml.build(Calibration, section, where, "calibration")
    _checked(found.check, f"{where}: calibration")
    return found


def _corpus(value: Any, where: str) -> Corpus:
    section = {"dataset": value} if isinstance(value, str) else value
    section = strict_yaml.mapping(section, where, "perplexity")
    found: Corpus = strict_yaml.build(Corpus, section, where, "perplexity")
    _checked(found.check, f"{where}: perplexity")
    return found


def _row(
    value: Any, number: int, calibration: Calibration, seeds: tuple[int, ...], where: str
) -> Row:
    row = strict_yaml.mapping(value, where, f"row {number}")
    name = row.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{where}: row {number} has no name; a name is a text, got {name!r}")
    here = f"{where}: row {name!r}"
    of_calibration = [f.name for f in dataclasses.fields(Calibration) if f.name != "seed"]
    of_recipe = [f.name for f in dataclasses.fields(Recipe) if f.name != "calibration"]
    _known_keys(row, (*OWN_KEYS, *of_recipe, *of_calibration), here, "the row")
    preset = row.get("recipe", DEFAULT_PRESET)
    if not isinstance(preset, str):
        raise RequestError(f"{here}: recipe is a preset or a file, got {preset!r}")
    changes = {key: item for key, item in row.items() if key not in OWN_KEYS}
    if missing := [key for key, item in changes.items() if item is None]:
        raise RequestError(f"{here}: {missing[0]} has no value")
    for key in ("dataset", "num_calibration_samples", "max_seq_length"):
        changes.setdefault(key, getattr(calibration, key))

    def resolve() -> Recipe:
        if "passes" in changes:
            changes["passes"] = parse_passes(changes["passes"], here)
        return load_recipe(preset).override(**changes)

    return Row(name.strip(), _checked(resolve, here), _seeds(row.get("seeds", seeds), here))


def _checked(action: Callable[[], Any], where: str) -> Any:
    """What the action gives; its RequestErrors say where."""
    try:
        return action()
    except RequestError as error:
        text = str(error).removeprefix("options: ")
        raise RequestError(text if text.startswith(where) else f"{where}: {text}") from None


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    numbers = isinstance(value, list | tuple) and all(type(s) is int and s >= 0 for s in value)
    if not numbers or not value:
        raise RequestError(f"{where}: seeds is a list of numbers from 0, got {value!r}")
    if len(set(value)) < len(value):
        raise RequestError(f"{where}: a seed is given twice in {list(value)}")
    return tuple(value)


def _known_keys(data: dict[Any, Any], known: Sequence[str], where: str, section: str) -> None:
    for key in data:
        if key not in known:
            raise RequestError(
                f"{where}: unknown key {key!r} in {section}; known: {', '.join(known)}"
                f"{nearest(str(key), list(known))}"
            )


def _list(value: Any, where: str, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{where}: {key} must be a list, got {type(value).__name__}")
    return value


def _unique(names: list[str], what: str) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise RequestError(f"{what} {name!r} occurs twice; give every one its own name")
