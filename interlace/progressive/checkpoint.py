"""The student of a stage on disk: its plan, its manifest, and the weights that left the dense ones.

    plan.json              from the dense model to this stage, in the numbers of the first model
    interlace.json         the manifest of the cuts
    heal.json              how it was healed, where it was
    weights.safetensors    every parameter that differs from the dense model's, by its name here

Frozen weights are those of the dense model, so a stage costs what it trained.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from interlace._files import atomic_folder, remove_parts, sha256_of_file
from interlace.errors import CheckpointError
from interlace.heal.checkpoints import read_tensors, write_tensors
from interlace.models.checkpoint import MANIFEST
from interlace.records import HealReport, Plan, PruneRecord
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from interlace.config import PruneSettings
    from interlace.models import VLM

log = logging.getLogger(__name__)

PLAN = "plan.json"
HEAL = "heal.json"
WEIGHTS = "weights.safetensors"


def _dense_name(name: str, student: VLM, dense: VLM) -> str:
    for tower in student.towers.values():
        if name.startswith(f"{tower.path}."):
            position, _, rest = name.removeprefix(f"{tower.path}.").partition(".")
            place = dense.towers[tower.name].position(tower.original[int(position)])
            return f"{tower.path}.{place}.{rest}"
    return name


def _changed(student: VLM, dense: VLM) -> Iterator[tuple[str, torch.Tensor]]:
    before = dict(dense.model.named_parameters(remove_duplicate=False))
    for name, parameter in student.model.named_parameters():
        old = before.get(_dense_name(name, student, dense))
        value = parameter.detach()
        if old is not None and old.data_ptr() == value.data_ptr():
            continue
        if old is None or not torch.equal(value, old.detach().to(value.device)):
            yield name, value


def save_student(folder: Path, student: VLM, dense: VLM, healed: HealReport | None) -> str:
    """Write the student of a stage, whole or not at all.

    Args:
        folder: replaced if it exists.
        student: carries its plan and manifest, both told from the dense model on.
        dense: the model before the first stage.
        healed: how it was healed.

    Returns:
        SHA-256 of the weights.
    """
    remove_parts(folder)
    with atomic_folder(folder, overwrite=True) as made:
        plan, record = _told(student)
        plan.save(made / PLAN)
        record.save(made / MANIFEST)
        if healed is not None:
            healed.save(made / HEAL)
        write_tensors(made / WEIGHTS, dict(_changed(student, dense)))
        return sha256_of_file(made / WEIGHTS)


def _told(student: VLM) -> tuple[Plan, PruneRecord]:
    if student.plan is None or student.record is None:
        raise CheckpointError(f"{student.name} carries no plan and manifest; it was not pruned.")
    return student.plan, student.record


def is_whole(folder: Path, digest: str) -> bool:
    """Tell whether the student in a folder is the one whose weights have this SHA-256."""
    path = folder / WEIGHTS
    if not path.is_file():
        return False
    if sha256_of_file(path) == digest:
        return True
    log.warning("%s was damaged; its stage is carried out again", path)
    return False


def open_student(folder: Path, dense: VLM, settings: PruneSettings) -> VLM:
    """Make the student of a stage again: cut the dense model and put in the stage's weights.

    Args:
        folder: what `save_student` wrote.
        dense: the model before the first stage; frozen weights are shared with it.
        settings: how the stages were cut.

    Raises:
        CheckpointError: the weights are not of this plan.
    """
    student = prune(dense, Plan.load(folder / PLAN), allow_pinned=settings.allow_pinned)
    parameters = dict(student.model.named_parameters())
    for name, value in read_tensors(folder / WEIGHTS).items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != value.shape:
            raise CheckpointError(
                f"{folder} holds the weight {name} {list(value.shape)}, which the student of its "
                "plan does not have. Plan and weights are not of the same run."
            )
        # memory of its own: what the student shares with the dense model must not be written to
        parameter.data = value.to(parameter.device, parameter.dtype)
    student.record = PruneRecord.load(folder / MANIFEST)
    return student


def healing_of(folder: Path) -> HealReport | None:
    """Return how the student in a folder was healed; None where it was not."""
    return HealReport.load(folder / HEAL) if (folder / HEAL).exists() else None
