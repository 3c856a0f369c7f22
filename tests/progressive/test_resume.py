from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import torch
from heal.toys import run_child
from progressive.runs import KILLS, clip, killed, small
from safetensors.torch import load_file

from interlace.records import EvalReport, ProgressiveRecord, Scores

if TYPE_CHECKING:
    from pathlib import Path

# Python 3.12 warns of forks in processes with threads; the children use one thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_a_run_killed_anywhere_ends_in_the_same_bits(tmp_path: Path) -> None:
    vlm = clip()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert run_child(killed, vlm, straight, None) == 0
    for where in KILLS:
        assert run_child(killed, vlm, broken, where) == -signal.SIGKILL, where
    assert (broken / "stage-1/student").is_dir()
    assert not (broken / "progressive.json").exists()
    assert run_child(killed, vlm, broken, None) == 0

    for stage in ("stage-1", "stage-2"):
        one, other = (
            load_file(f / stage / "student/weights.safetensors") for f in (straight, broken)
        )
        assert one.keys() == other.keys()
        assert len(one) > 0
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    for name, kind in (
        ("progressive", ProgressiveRecord),
        ("stage-1/scores", Scores),
        ("stage-2/scores", Scores),
        ("stage-2/eval", EvalReport),
    ):
        assert kind.load(straight / f"{name}.json") == kind.load(broken / f"{name}.json"), name
    # nothing of the killed processes is left
    assert not list(broken.rglob("*.tmp"))
    assert not list(broken.rglob("checkpoint-*"))

    # a finished run has nothing left to do, and a damaged student is made again
    again = small(vlm, broken)
    assert {"stage-1/student", "stage-2/student", "stage-2/eval", "dense"} <= set(again.skipped)
    weights = broken / "stage-2/student/weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    # with as many threads as it was first made with
    assert run_child(killed, vlm, broken, None) == 0
    assert weights.read_bytes() == whole
    assert ProgressiveRecord.load(broken / "progressive.json") == again.record
