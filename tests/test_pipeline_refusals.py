"""What a recipe asks for that cannot be done is told early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny_processors import with_processor

import interlace as il
from interlace.config import Recipe
from interlace.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Section = dict[str, Any]


@pytest.mark.parametrize("stages", [{"progressive": {}}, {}])
@pytest.mark.parametrize(
    ("name", "place", "heal", "says"),
    [
        ("gemma3", {}, {"gates": "l1"}, "cannot be gated|learns no gates"),
        ("clip", {}, {"batch_size": 1}, "tells the samples of a batch apart"),
        ("clip", {"dtype": "float16", "device": "cpu"}, {}, "is in float16"),
    ],
)
def test_what_healing_refuses_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, place: Section, heal: Section, says: str, stages: Section
) -> None:
    il.export(with_processor(name), tmp_path / "m", verify=False)
    sections = {"model": {"path": str(tmp_path / "m"), **place}, "heal": heal, **stages}
    counts = {"calibration_count": 4, "heal_count": 4}
    with pytest.raises(ConfigError, match=says):
        il.run(Recipe.from_dict({**sections, "data": counts}), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").rglob("*.json")}
    assert left <= (set() if stages else {"scores.json", "plan.json", "run.json"})
