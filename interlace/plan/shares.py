"""What every plan of a share of something needs: the share checked, and the sizes of the tower."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from interlace.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from interlace.records import Scores, TowerShape

__all__ = ["ceil_share", "check_share", "count_of", "floor_share", "shape_of"]

# decimal places of the shares that error messages advise
_PLACES = 1e4


def count_of(total: int, share: float) -> int:
    """Return floor(total * share) without rounding error: 0.29 of 100 is 29."""
    return int(total * share + 1e-9)


def ceil_share(share: float) -> float:
    """Round a smallest allowed share up, so that the rounded one is allowed too."""
    return math.ceil(share * _PLACES - 1e-6) / _PLACES


def floor_share(share: float) -> float:
    """Round a largest allowed share down, so that the rounded one is allowed too."""
    return math.floor(share * _PLACES + 1e-6) / _PLACES


def check_share(name: str, share: Any, example: str) -> float:
    """Return a share above 0 and below 1.

    Args:
        name: of the argument.
        share: what was given.
        example: one that can be used, and what it does.

    Raises:
        ConfigError: it is no number, or out of range.
    """
    real = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not (real and 0.0 < share < 1.0):
        raise ConfigError(f"{name} must be a share above 0 and below 1, got {share!r}. {example}")
    return float(share)


def shape_of(scores: Scores, tower: str) -> TowerShape:
    """Return the sizes of a tower.

    Raises:
        PlanError: the scores do not hold them.
    """
    if scores.shape is None or tower not in scores.shape.towers:
        raise PlanError(
            f"The scores do not know the sizes of the tower '{tower}', so nothing can be taken "
            "out of its layers. Score a real model with score()."
        )
    return scores.shape.towers[tower]
