from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from interlace.records import Scores

if TYPE_CHECKING:
    from collections.abc import Callable


def _random_scores(
    num_layers: int, seed: int, *, levels: int | None = None, most: int | None = None, **more
) -> Scores:
    """Tables of the packs up to `most`; few `levels` of values make many ties."""
    draw = random.Random(seed)

    def value() -> float:
        return draw.randrange(levels) / levels if levels else draw.uniform(0.3, 1.0)

    packs = {
        p: [value() for _ in range(num_layers - p)] for p in range(1, (most or num_layers - 1) + 1)
    }
    return Scores.from_similarity("text", packs, num_layers, **more)


@pytest.fixture
def random_scores() -> Callable[..., Scores]:
    return _random_scores
