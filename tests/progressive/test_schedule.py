from __future__ import annotations

import math
from collections import Counter

import pytest
from heal.toys import toy_samples

from interlace.config import HealSettings
from interlace.errors import ConfigError
from interlace.heal.arguments import count_steps
from interlace.heal.order import ShuffledRepeats
from interlace.progressive.schedule import gone_after, split_healing, split_steps


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 60])
def test_the_cosine_schedule_rises_and_ends_exactly(stages: int) -> None:
    for count in range(1, 40):
        gone = [each["text"] for each in gone_after({"text": count}, stages)]
        assert gone[-1] == count
        assert gone == sorted(set(gone))
        assert gone[0] > 0
        written_out = {
            math.floor(count * math.sqrt((1 - math.cos(math.pi * s / stages)) / 2) + 1e-9)
            for s in range(1, stages + 1)
        }
        assert set(gone) == written_out - {0}


def test_towers_share_the_stages_and_empty_stages_are_merged() -> None:
    assert gone_after({"text": 6, "vision": 2}, 3) == [
        {"text": 3, "vision": 1},
        {"text": 5, "vision": 1},
        {"text": 6, "vision": 2},
    ]
    assert gone_after({"text": 1}, 5) == [{"text": 1}]


def test_every_stage_heals_three_times_as_long_as_the_one_before() -> None:
    assert split_steps(3, 3) == [1, 1, 1]
    assert split_steps(3 + 13, 3) == [2, 4, 10]
    assert split_steps(32, 3) == [3, 8, 21]
    assert split_steps(7, 1) == [7]
    for total in range(4, 200):
        steps = split_steps(total, 4)
        assert sum(steps) == total
        assert steps == sorted(steps)
    with pytest.raises(ConfigError, match="2 optimiser steps in all, fewer than the 3 stages"):
        split_steps(2, 3)


@pytest.mark.parametrize(
    "settings",
    [
        HealSettings(batch_size=4, epochs=2.0),
        HealSettings(batch_size=3, accumulation=2, epochs=1.5),
        HealSettings(batch_size=4, max_steps=9),
    ],
)
def test_the_stages_see_exactly_the_samples_of_one_run(settings: HealSettings) -> None:
    data = toy_samples(23)
    parts = split_healing(data, settings, 3)
    assert parts is not None
    total = sum(len(part) for part in parts)
    order = ShuffledRepeats(data, total, settings.seed)
    assert [each.id for part in parts for each in part] == [order[i].id for i in range(total)]
    wanted = 36 if settings.max_steps else round(settings.epochs * 23)
    assert total == wanted
    assert max(Counter(each.id for part in parts for each in part).values()) <= 2
    # and take as many steps
    steps = [count_steps(len(part), settings, 1) for part in parts]
    assert sum(steps) == count_steps(total, settings, 1)


def test_no_steps_means_no_healing() -> None:
    assert split_healing(toy_samples(4), HealSettings(max_steps=0), 2) is None
