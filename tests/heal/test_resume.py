from __future__ import annotations

import errno
import json
import shutil
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from heal.runs import resumed
from heal.toys import run_child, toy, toy_collate, toy_plan, toy_samples
from safetensors.torch import load_file

from interlace.errors import CheckpointError
from interlace.heal import checkpoints, heal
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path

# Python 3.12 warns of forks in processes with threads; the children use one thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def test_a_killed_run_resumes_to_bit_equal_weights(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    killed = -signal.SIGKILL
    assert run_child(resumed, whole, tmp_path / "a") == 0
    # Before the first checkpoint, between two, and while one is being written.
    assert run_child(resumed, broken, tmp_path / "b", 1) == killed
    assert run_child(resumed, broken, tmp_path / "b", 3) == killed
    assert run_child(resumed, broken, tmp_path / "b", None, 2) == killed
    assert sorted(path.name for path in broken.iterdir()) == [
        ".checkpoint-6.part",
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert run_child(resumed, broken, tmp_path / "b") == 0

    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    facts = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert facts[0] == facts[1]
    assert facts[0][:2] == [8, 30]
    names = sorted(path.name for path in broken.iterdir())
    assert names == ["checkpoint-6", "checkpoint-8"]
    files = {path.suffix for path in (broken / "checkpoint-8").iterdir()}
    assert files == {".json", ".safetensors"}
    # The finished run has nothing left to do.
    assert run_child(resumed, broken, tmp_path / "c") == 0
    again = load_file(tmp_path / "c.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in one.items())


def _start(folder: Path, **changes: Any) -> None:
    given = {name: changes.pop(name) for name in ("depth", "dtype") if name in changes}
    teacher, student = toy("llava", **given)
    settings = {"max_steps": 4, "save_steps": 2, "batch_size": 2, "learning_rate": 1e-3}
    heal(
        student,
        teacher=teacher,
        data=toy_samples(changes.pop("count", 4)),
        collate=toy_collate("llava", teacher.model),
        output=folder,
        resume=changes.pop("resume", folder.exists()),
        **{**settings, **changes},
    )


def test_only_complete_checkpoints_of_the_same_run_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    _start(folder)
    assert "starts from the beginning" not in caplog.text
    newest = folder / "checkpoint-4"
    weights = newest / checkpoints.WEIGHTS
    sizes = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    teacher, _ = toy("llava")
    assert sizes < 4 * teacher.num_parameters()

    for changes, word in (
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 then, 0.002 now"),
        ({"count": 5}, "data"),
        ({"depth": 6}, "student"),
        ({"dtype": torch.bfloat16}, "dtypes"),
    ):
        with pytest.raises(CheckpointError, match=word):
            _start(folder, **changes)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = checkpoints.newest(folder)
    assert found is not None
    assert found[0].name == "checkpoint-2"
    assert "Passed over" in caplog.text
    (newest / checkpoints.MANIFEST).write_text("{}")
    (folder / "checkpoint-2" / checkpoints.OPTIMIZER).unlink()
    assert checkpoints.newest(folder) is None

    # one command for the first try and all others
    for nothing in (folder, tmp_path / "elsewhere"):
        caplog.clear()
        _start(nothing, resume=True)
        assert f"no whole checkpoint in {nothing} to go on from" in caplog.text
        caplog.clear()
        _start(nothing, resume=True)
        assert "starts from the beginning" not in caplog.text


def test_a_fitted_student_goes_on_from_the_weights_it_started_with(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    teacher, _ = toy("llava")
    collate = toy_collate("llava", teacher.model)
    settings = {"max_steps": 4, "save_steps": 2, "batch_size": 2, "learning_rate": 1e-3}

    def cut(seeds: range) -> Any:
        batches = [collate(toy_samples(i + 1)[i:]) for i in seeds]
        return prune(teacher, toy_plan(text=5), bridges="refit", data=batches)

    def go_on(student: Any) -> Any:
        heal(
            student,
            teacher=teacher,
            data=toy_samples(4),
            collate=collate,
            output=folder,
            resume=folder.exists(),
            **settings,
        )
        return student.model.state_dict()

    student = cut(range(8))
    assert student.record.bridges
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    whole = go_on(student)
    # as a GPU would fit it again: other last bits, in layers that train and in those that do not
    other = cut(range(8))
    fresh = dict(teacher.model.named_parameters())
    for parameter in other.model.parameters():
        if all(parameter.data_ptr() != each.data_ptr() for each in fresh.values()):
            parameter.data = parameter.data * (1 + 1e-3)
    shutil.rmtree(folder / "checkpoint-4")
    again = go_on(other)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert all(torch.equal(value, before[name]) for name, value in fresh.items())
    shared = {each.data_ptr() for each in fresh.values()}
    assert any(each.data_ptr() in shared for each in other.model.parameters())
    elsewhere = cut(range(1, 9))
    elsewhere.record = replace(elsewhere.record, inputs={"calibration": "other samples"})
    own = {name: value.clone() for name, value in elsewhere.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="cut: "):
        go_on(elsewhere)
    kept = elsewhere.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in own.items())
    with pytest.raises(CheckpointError, match="which this student does not have"):
        go_on(prune(teacher, Plan({"text": TowerPlan(5, drop=(1, 3), tune=(2,))})))


def test_a_full_disk_is_reported_in_words_and_leaves_no_part(tmp_path: Path) -> None:
    checkpoints.begin(tmp_path, 2)
    (checkpoints.part_of(tmp_path, 2) / checkpoints.WEIGHTS).write_bytes(b"half")
    (tmp_path / "checkpoint-1").mkdir()
    with (
        pytest.raises(CheckpointError, match="disk is full"),
        checkpoints.worded_errors(tmp_path, 2),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
