"""A configuration, which is a dataclass of dataclasses, as values for JSON, and back, checked.

The types of the fields say how: numbers, texts, flags, paths, enumerations of texts, other
dataclasses, tuples of one type (``tuple[Share, ...]``), and each of them or None.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["from_values", "to_values"]

_Config = TypeVar("_Config")


def to_values(config: Any) -> Any:
    """Return a configuration, or a part of one, as values for JSON."""
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
        return {name: to_values(getattr(config, name)) for name in names}
    if isinstance(config, Enum):
        return to_values(config.value)
    if isinstance(config, Path):
        return str(config)
    return [to_values(part) for part in config] if isinstance(config, tuple) else config


def from_values(kind: type[_Config], values: Any) -> _Config:
    """Return the configuration that values describe. A field with a default may be missing.

    Raises:
        ValueError: a field is unknown, missing, or has a value of another type; or the class
            refuses the values.
    """
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or values.keys() - fields.keys():
        raise ValueError(f"{kind.__name__} has other fields")
    try:
        return kind(**{name: _part(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{kind.__name__} has more fields") from error


def _part(hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _part(hint, value)
    if origin is tuple and isinstance(value, list):
        return tuple(_part(arguments[0], part) for part in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_values(hint, value)
    is_text = isinstance(value, str) and "\0" not in value
    if is_text and isinstance(hint, type) and issubclass(hint, Enum | Path):
        return hint(value)
    if hint in (int, str, bool, float) and type(value) is hint:
        return value
    raise ValueError(f"{value!r} is not of the type {hint}")
