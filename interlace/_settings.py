"""Base of the settings of every stage: values checked on creation, replaced by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Self

from interlace._coerce import Checked, field_types, plain
from interlace.errors import ConfigError, unknown_name


def within(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """Declare a number with its default and range; `above` leaves the lower bound itself out."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def _range_text(low: float, high: float, above: bool) -> str:
    if math.isinf(high):
        return f"{'more than' if above else 'at least'} {low:g}, and finite"
    return f"above {low:g} and at most {high:g}" if above else f"within {low:g}..{high:g}"


@dataclass(frozen=True)
class Settings(Checked):
    """Base of the settings of one stage: frozen, types and ranges checked on creation."""

    def __post_init__(self) -> None:
        """Check types, then ranges, then what the class itself demands."""
        super().__post_init__()
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if "low" not in each.metadata or value is None:
                continue
            low, high, above = (each.metadata[key] for key in ("low", "high", "above"))
            fits = low < value <= high if above else low <= value <= high
            if not (fits and math.isfinite(value)):
                raise ConfigError(
                    f"{type(self).__name__}.{each.name} must be {_range_text(low, high, above)}, "
                    f"got {value!r}."
                )
        self._check_together()

    def _check_together(self) -> None:
        """Raise ConfigError where the fields contradict each other."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able values."""
        made: dict[str, Any] = plain(self)
        return made

    def replace(self, **overrides: Any) -> Self:
        """Return a copy with some values changed.

        Raises:
            ConfigError: a name is no setting of this stage, or a value does not fit.
        """
        known = field_types(type(self))
        for name in overrides:
            if name not in known:
                raise ConfigError(unknown_name(f"setting of {type(self).__name__}", name, known))
        return dataclasses.replace(self, **overrides)
