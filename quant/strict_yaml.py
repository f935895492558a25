"""Strict YAML: what is written is what is meant, or a RequestError that names file and key."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import yaml

from quant.errors import RequestError
from quant.passes import nearest


def load(text: str, where: str) -> Any:
    """YAML text as plain data; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RequestError(f"{where} is not valid YAML: {error}") from error


def build(cls: type[Any], values: dict[str, Any], where: str, section: str) -> Any:
    """A dataclass from a mapping whose keys and types must be right."""
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in fields:
            raise RequestError(
                f"{where}: unknown key {key!r} in {section}; known: {', '.join(fields)}"
                + nearest(str(key), fields)
            )
        wanted = hints[key]
        if wanted == tuple[str, ...] and section.startswith("passes."):
            values = {**values, key: strings(value, where, f"{section}.{key}")}
            continue
        if isinstance(wanted, types.GenericAlias) or dataclasses.is_dataclass(wanted):
            continue  # built by the caller, and so already of the right type
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            values = {**values, key: float(value)}
        elif not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            # YAML 1.1 reads 1e-2, without a point, as a string.
            hint = (
                "; write it with a decimal point" if wanted is float and "e" in str(value) else ""
            )
            raise RequestError(
                f"{where}: {section}.{key} must be {wanted.__name__}, "
                f"got {kind_of(value)} {value!r}{hint}"
            )
    return cls(**values)


def mapping(value: Any, where: str, section: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where}: {section} must be a mapping, got {kind_of(value)}")
    return value


def strings(value: Any, where: str, key: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RequestError(f"{where}: {key} must be a list of strings")
    return tuple(value)


def kind_of(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


class _UniqueKeyLoader(yaml.SafeLoader):
    """A key given twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                where = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", where
                )
        return super().construct_mapping(node, deep)
