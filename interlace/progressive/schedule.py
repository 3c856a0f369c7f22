"""How many layers are gone after each stage, and which samples heal it.

Legend: n layers to drop in all, S stages, s = 1..S.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interlace.data.samples import Samples
from interlace.errors import ConfigError
from interlace.heal.arguments import count_steps, total_samples
from interlace.heal.order import ShuffledRepeats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from interlace.config import HealSettings
    from interlace.data.samples import Sample

# n sin(pi/6) must come out as n / 2, not a rounding error below.
_SLACK = 1e-9
_GROWTH = 3


def gone_after(counts: Mapping[str, int], stages: int) -> list[dict[str, int]]:
    """Return how many layers of every tower are gone after each stage.

    floor(n sqrt((1 - cos(pi s / S)) / 2)) = floor(n sin(pi s / 2 S)): large steps while the model
    is whole, small ones towards the end, and exactly n after the last. A stage that would drop no
    further layer is merged into the next one.

    Args:
        counts: tower -> n, at least 1.
        stages: S, at least 1.

    Returns:
        One dict per stage that is left, every value at least that of the stage before; towers that
        lost nothing yet are in it with 0.

    Source: the schedule is that of UPop (arXiv 2301.13741), section 3.3, over stages instead of
    steps.
    """
    schedule: list[dict[str, int]] = []
    for stage in range(1, stages + 1):
        share = math.sin(math.pi * stage / (2 * stages)) if stage < stages else 1.0
        gone = {name: math.floor(count * share + _SLACK) for name, count in counts.items()}
        if any(gone.values()) and (not schedule or gone != schedule[-1]):
            schedule.append(gone)
    return schedule


def split_steps(total: int, stages: int) -> list[int]:
    """Split optimiser steps over stages: each gets three times as many as the one before.

    What follows the last cut decides what is kept in the end; earlier stages need just enough for
    the next choice to be made on a student that works. Every stage gets at least one step; the rest
    is rounded by the largest remainder, later stages first among equal ones.

    Args:
        total: steps in all.
        stages: number of stages.

    Raises:
        ConfigError: fewer steps than stages.
    """
    if total < stages:
        raise ConfigError(
            f"Healing takes {total} optimiser steps in all, fewer than the {stages} stages. "
            "Heal with more samples or steps, or in fewer stages."
        )
    weights = [_GROWTH**stage for stage in range(stages)]
    # one step for every stage, the rest by weight, in whole numbers throughout
    shares = [divmod((total - stages) * weight, sum(weights)) for weight in weights]
    steps = [1 + whole for whole, _ in shares]
    by_rest = sorted(range(stages), key=lambda stage: (-shares[stage][1], -stage))
    for stage in by_rest[: total - sum(steps)]:
        steps[stage] += 1
    return steps


def split_healing(
    data: Sequence[Sample], settings: HealSettings, stages: int
) -> list[Samples] | None:
    """Cut the samples of one healing run into those of the stages.

    A single run sees the samples in a shuffled order, pass after pass. The stages see the same
    order, cut between two optimiser steps: every sample is seen as often as in a single run of
    these settings, so the tokens are equal too.

    Args:
        data: samples to heal with.
        settings: of the whole budget.
        stages: number of stages.

    Returns:
        The samples of each stage, to be seen once; None where the settings ask for no steps.

    Raises:
        ConfigError: fewer steps than stages.
    """
    total = total_samples(len(data), settings, 1)
    if total == 0:
        return None
    steps = split_steps(count_steps(total, settings, 1), stages)
    per_step = settings.batch_size * settings.accumulation
    order = ShuffledRepeats(data, total, settings.seed)
    whole = Samples([order[i] for i in range(total)], source=getattr(data, "source", "memory"))
    ends = [min(sum(steps[: i + 1]) * per_step, total) for i in range(len(steps))]
    return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
