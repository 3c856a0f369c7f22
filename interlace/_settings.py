"""Base of the settings of every stage: values checked on creation, replaced by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from interlace._coerce import Checked, field_types, plain
from interlace.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Settings(Checked):
    """Base of the settings of one stage: frozen, types and ranges checked on creation."""

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
