"""What a run that can be continued remembers."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from interlace._stages import Stages
from interlace.errors import CheckpointError, ConfigError
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


HOLD = """
import sys, pathlib
from interlace._stages import Stages
with Stages(pathlib.Path(sys.argv[1])).alone():
    print("working", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"working\n"
        with (
            pytest.raises(ConfigError, match=r"Another run is working in .*run\. Wait until"),
            Stages(folder).alone(),
        ):
            pytest.fail("two at once")
        # other folders are free
        with Stages(tmp_path / "other").alone():
            pass
        other.kill()
    with Stages(folder).alone(), pytest.raises(ConfigError), Stages(folder).alone():
        pass
    with Stages(folder).alone():
        pass
