"""Every family's pruned checkpoint, reloaded by plain transformers in a fresh process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tiny import ALL, tiny_inputs

from interlace.export import export
from interlace.export.verify import verify_checkpoints
from interlace.models import open_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from interlace.models import VLM


def test_every_family_computes_the_same_in_plain_transformers(
    make_student: Callable[..., VLM], tmp_path: Path
) -> None:
    # one fresh process for all of them, since starting it costs more than all else
    students = {name: make_student(name) for name in ALL}
    jobs: list[Any] = []
    for name, student in students.items():
        folder = export(student, tmp_path / name, verify=False)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [type(student.model).__name__]
        jobs += [(student, folder, tiny_inputs(name, student.model)), (student, folder, None)]
    for (student, folder, inputs), proof in zip(jobs, verify_checkpoints(jobs), strict=True):
        # weights lie at other addresses after a reload, which may round some sums differently
        assert proof.max_difference <= 1e-6 * proof.max_value, folder.name
        assert proof.num_outputs > 0
        # what is made from the config alone reaches every tower too
        assert proof.towers == tuple(student.towers), (folder.name, inputs is None)


def test_a_checkpoint_opens_with_its_original_numbers(
    make_student: Callable[..., VLM], tmp_path: Path
) -> None:
    student = make_student("qwen3_vl")
    opened = open_model(export(student, tmp_path / "out", verify=False))
    assert opened.record == student.record
    assert {name: tower.original for name, tower in opened.towers.items()} == {
        name: tower.original for name, tower in student.towers.items()
    }
    assert opened.fingerprint == student.fingerprint
    inputs = tiny_inputs("qwen3_vl", student.model)
    with torch.no_grad():
        expected = student.model(**inputs).logits
        assert torch.equal(opened.model(**inputs).logits, expected)
