"""Every error the package raises on purpose, and the helper that words unknown names."""

from __future__ import annotations

import difflib
from numbers import Integral
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class InterlaceError(Exception):
    """Base of all errors that say what was given, what was expected and what to do."""


class ConfigError(InterlaceError):
    """A setting, an argument or a recipe is unknown, of the wrong type or out of range."""


class FamilyError(InterlaceError):
    """The model is of a family that is not known and does not pass the generic self-check."""


class PlanError(InterlaceError):
    """No plan exists under the given conditions, or a plan cannot be carried out on a model."""


class ShapeError(InterlaceError):
    """Tensors, tables or layer counts do not fit each other."""


class DataError(InterlaceError):
    """Samples or activations cannot be used: unreadable, empty, not finite."""


class CheckpointError(InterlaceError):
    """A file or folder cannot be read or written: damaged, altered, other schema, disk full."""


class BackendError(InterlaceError):
    """The backend that was asked for cannot serve the call."""


def unknown_name(kind: str, given: object, known: Iterable[object]) -> str:
    """Word the message for a name that is not in a registry.

    Args:
        kind: what is named, such as "rule" or "recipe key".
        given: the name as it was given.
        known: the names that would have been valid.

    Returns:
        "Unknown rule 'tripel'. Did you mean 'triplet'? Known: ...", without the suggestion
        where nothing comes near.
    """
    names = sorted(str(name) for name in known)
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(given).lower(), list(lowered), n=1, cutoff=0.5)
    suggestion = f" Did you mean '{lowered[near[0]]}'?" if near else ""
    listing = ", ".join(names) if names else "none"
    return f"Unknown {kind} '{given}'.{suggestion} Known: {listing}."


def check_numbers(**numbers: object) -> None:
    """Refuse arguments that are no whole number of at least 1.

    Raises:
        ConfigError: names the argument.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
            raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1.")
