"""Head maps: how many query heads every key-value head serves."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from interlace.microbenchmarks.case import Setup
    from interlace.microbenchmarks.shapes import Tower


def uniform(tower: Tower) -> list[int]:
    """Query heads per kv head as the model has them."""
    return [tower.query_heads // tower.kv_heads] * tower.kv_heads


def ragged(tower: Tower) -> list[int]:
    """What pruning leaves: groups that lost 0, 1, 2 ... heads, or kv heads that were merged."""
    group = tower.query_heads // tower.kv_heads
    if group > 1:
        return [group - j % group for j in range(tower.kv_heads)]
    return [1 + 2 * (j % 2) for j in range(tower.kv_heads // 2)]


def prefix(groups: list[int]) -> list[int]:
    """The op's `q_start`."""
    return list(accumulate(groups, initial=0))


def kv_heads(setup: Setup, groups: list[int]) -> Tensor:
    """Kv head of every query head."""
    return setup.whole([j for j, group in enumerate(groups) for _ in range(group)])
