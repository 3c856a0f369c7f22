"""What a run that can be continued remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from interlace._stages import Stages
from interlace.errors import CheckpointError
from interlace.records import Plan, TowerPlan

if TYPE_CHECKING:
    from pathlib import Path


def test_a_record_that_cannot_be_read_any_more_is_told_with_what_to_do(tmp_path: Path) -> None:
    plan = Plan({"text": TowerPlan(4, drop=(1,))}, rule="last", seed=0)
    Stages(tmp_path).record("plan", Plan, "key", lambda: plan)
    path = tmp_path / "plan.json"
    # as by a version of the package with other records
    path.write_text(path.read_text().replace('"schema": ', '"schema": 9'))
    again = Stages(tmp_path)
    with pytest.raises(CheckpointError, match=r"schema version 9.*remove .*plan\.json and run"):
        again.record("plan", Plan, "key", lambda: plan)
    path.unlink()
    assert again.record("plan", Plan, "key", lambda: plan) == plan
