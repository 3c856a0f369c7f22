"""What a run started from, kept beside its checkpoints where it could not be made again bit by bit.

A fit of bridges can end in other bits the next time: the gradients that weigh its tokens are summed
in any order on a GPU. A run that goes on therefore takes its student from its own folder. Students
that nothing was fitted to are the same every time.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from interlace.errors import CheckpointError
from interlace.heal.checkpoints import (
    PART,
    START,
    read_tensors,
    worded_errors,
    write_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from interlace.models import VLM


def keep(folder: Path, student: VLM) -> None:
    """Write the weights of a fitted student.

    Args:
        folder: of the checkpoints.
        student: before the first step.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written.
    """
    if student.record is None or not student.record.bridges:
        return
    with worded_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{START}{PART}"
        try:
            write_tensors(part, {n: p.detach() for n, p in student.model.named_parameters()})
            part.rename(folder / START)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def restored(folder: Path | None, student: VLM) -> Iterator[None]:
    """Give a student the weights that the run in a folder started from, where it kept them.

    The student has its own again if the block fails, as it does where the run was another.

    Args:
        folder: of the checkpoints; without one the student stays as it is.
        student: before healing.

    Raises:
        CheckpointError: they are those of another student.
    """
    path = folder / START if folder is not None else None
    if path is None or not path.exists():
        yield
        return
    parameters = dict(student.model.named_parameters())
    found = read_tensors(path)
    for name, value in found.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckpointError(
                f"{path} holds the weight {name} {list(value.shape)}, which this student does not "
                "have: it belongs to another run. Resume with what the run was started with, or "
                "choose another output folder."
            )
    own: dict[str, Tensor] = {}
    for name, value in found.items():
        old = parameters[name]
        new = value.to(old.device, old.dtype)
        # in memory of its own: the student shares weights with the model it was cut from
        if not torch.equal(new, old.detach()):
            own[name], old.data = old.data, new
    try:
        yield
    except BaseException:
        for name, weights in own.items():
            parameters[name].data = weights
        raise
