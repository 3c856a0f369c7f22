"""Values checked and brought into the types that a dataclass declares, in both directions of JSON.

Records and settings are built from Python values, JSON and TOML alike. All three pass through
`coerce`, so that a record made in memory equals the one read back from its file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from interlace.errors import ConfigError, unknown_name

# JSON has no word for these, so they travel as strings.
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# The end of what 64 bits hold.
_TOO_LARGE = 2**63


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def field_types(kind: Any) -> dict[str, Any]:
    """Return the resolved types of a dataclass's fields by name, in order of declaration."""
    return _field_types(kind)


def type_name(kind: Any) -> str:
    """Return a type in the words of its annotation, such as `tuple[int, ...]`."""
    if typing.get_origin(kind) is not None or isinstance(kind, types.UnionType):
        return str(kind).replace("typing.", "").replace("NoneType", "None")
    return getattr(kind, "__name__", str(kind))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _refuse(where: str, kind: Any, value: Any) -> ConfigError:
    return ConfigError(
        f"{where}: expected {type_name(kind)}, got {_shown(value)} ({type(value).__name__})."
    )


def _scalar(kind: Any, value: Any, where: str) -> Any:
    # A bool is a number to Python, but never meant as one here.
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        if kind is bool:
            return bool(value)
    elif kind is int and isinstance(value, numbers.Integral):
        return operator.index(value)
    elif kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError as error:
            raise _refuse(where, kind, value) from error
    elif kind is float and isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    elif kind is str and isinstance(value, str | Path):
        return str(value)
    raise _refuse(where, kind, value)


def _key(kind: Any, key: Any, where: str) -> Any:
    if kind is int and isinstance(key, str) and key.lstrip("-").isdecimal():
        return int(key)
    return coerce(kind, key, f"{where}, key {key!r}")


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise ConfigError(
        f"{where}: {type(value).__name__} has no JSON form. "
        "Give numbers, strings, lists and dicts only."
    )


def _sequence(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple) and not hasattr(value, "tolist"):
        raise _refuse(where, kind, value)
    items = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list | tuple):
        raise _refuse(where, kind, value)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        made = [coerce(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items)]
        return made if origin is list else tuple(made)
    if len(items) != len(arguments):
        raise ConfigError(f"{where}: expected {len(arguments)} values, got {len(items)}.")
    pairs = zip(arguments, items, strict=True)
    return tuple(coerce(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(pairs))


def _union(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    if len(options) == 1:
        return coerce(options[0], value, where)
    for option in options:
        try:
            return coerce(option, value, where)
        except ConfigError:
            continue
    raise _refuse(where, kind, value)


def coerce(kind: Any, value: Any, where: str) -> Any:
    """Bring a value into a declared type, or say where and why that is impossible.

    Args:
        kind: a type as written in an annotation: scalars, `tuple`, `list`, `dict`, unions,
            `Literal`, dataclasses, `Any` (whatever JSON can hold).
        value: the value; lists become tuples, NumPy numbers become Python's, whole numbers
            become floats where a float is declared, text becomes an int only as a dict key.
        where: what is being read, for the message.

    Returns:
        The value in the declared type.

    Raises:
        ConfigError: the value does not fit, or a dataclass has unknown or missing keys.
    """
    if kind is Any:
        return _plain(value, where)
    origin = typing.get_origin(kind)
    if origin is Union or isinstance(kind, types.UnionType):
        return _union(kind, value, where)
    if origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
        raise ConfigError(f"{where}: {unknown_name('value', value, typing.get_args(kind))}")
    if origin in (tuple, list):
        return _sequence(kind, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _refuse(where, kind, value)
        key_kind, item_kind = typing.get_args(kind)
        return {
            _key(key_kind, key, where): coerce(item_kind, item, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else build(kind, value, where)
    return _scalar(kind, value, where)


def build(kind: type, value: Any, where: str, key_word: str = "key") -> Any:
    """Make a dataclass from a mapping of its fields.

    Args:
        kind: the dataclass.
        value: field names to values.
        where: what is being read, for the message.
        key_word: what a field is called in messages, such as "recipe key".

    Raises:
        ConfigError: not a mapping, a key that is no field (the nearest field is named), a
            field without default that is missing, or a value that does not fit.
    """
    if not isinstance(value, Mapping):
        raise _refuse(where, kind, value)
    known = field_types(kind)
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_name(key_word, key, known)}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing {key_word} {', '.join(missing)}.")
    return kind(**{key: coerce(known[key], item, f"{where}.{key}") for key, item in value.items()})


def plain(value: Any) -> Any:
    """Return the JSON form of a value that `coerce` made: dicts with text keys, lists, scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """Declare a number with its default and range; `above` leaves the lower bound itself out."""
    metadata = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=metadata)


def _check_range(value: Any, where: str, low: float, high: float, above: bool) -> None:
    # whole numbers go into 64 bits below, and those beyond a float have no `isfinite`
    whole = isinstance(value, int)
    usable = value < _TOO_LARGE if whole else math.isfinite(value)
    if (low < value if above else low <= value) and value <= high and usable:
        return
    if math.isinf(high):
        end = f"below {_TOO_LARGE}" if whole else "finite"
        words = f"{'more than' if above else 'at least'} {low:g}, and {end}"
    else:
        end = str(high) if isinstance(high, int) else f"{high:g}"
        words = f"above {low:g} and at most {end}" if above else f"within {low:g}..{end}"
    raise ConfigError(f"{where} must be {words}, got {_shown(value)}.")


class Checked:
    """Base of frozen dataclasses whose fields are coerced to their declared types on creation."""

    def __post_init__(self) -> None:
        """Coerce every field and check its range, then run the class's own consistency check."""
        kind: Any = type(self)
        types_of = field_types(kind)
        for field in dataclasses.fields(kind):
            where = f"{kind.__name__}.{field.name}"
            value = coerce(types_of[field.name], getattr(self, field.name), where)
            object.__setattr__(self, field.name, value)
            if field.metadata and value is not None:
                _check_range(value, where, **field.metadata)
        self._check()

    def _check(self) -> None:
        """Raise an error in words where the fields contradict each other."""
