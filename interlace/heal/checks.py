"""What healing refuses before it starts, in words, and what a run is known by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from interlace._files import as_path, check_place, sha256_of
from interlace._launch import is_first_process, world_size
from interlace.data.sample_texts import check_learnable
from interlace.errors import ConfigError, DataError
from interlace.models.handle import check_compares

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from interlace.config import HealSettings
    from interlace.data.samples import Samples
    from interlace.models import VLM
    from interlace.records import Plan

# These change how a run is carried out, not what comes out of it but for rounding.
FREE_SETTINGS = ("num_workers", "save_steps", "chunk_tokens", "gradient_checkpointing")


def output_folder(output: str | os.PathLike[str] | None, *, resume: bool) -> Path | None:
    """Check the folder for checkpoints.

    Raises:
        ConfigError: it exists and the run does not resume, it is a file, or a run that is to be
            resumed has none.
        CheckpointError: it cannot be made.
    """
    if output is None:
        if resume:
            raise ConfigError("To resume, give the output folder that holds the checkpoints.")
        return None
    folder = as_path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Give a folder for the checkpoints.")
    # The first process makes the folder, so no other can tell whether it was there before.
    if folder.exists() and not resume and is_first_process():
        raise ConfigError(
            f"The output folder {folder} exists already. Resume the run in it (resume=True, "
            "--resume), remove it, or choose another one."
        )
    if not folder.exists():
        check_place(folder)
    return folder


def check_device(vlm: VLM) -> None:
    """Refuse a GPU that a single process would not train on.

    Raises:
        ConfigError: the model is on another GPU than the first.
    """
    device = vlm.device
    if world_size() == 1 and device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(
            f"{vlm.name} is on {device}, but a single process trains on cuda:0. Choose the GPU "
            f"with CUDA_VISIBLE_DEVICES={device.index} and open the model on 'cuda'."
        )


def check_half(vlm: VLM) -> None:
    """Refuse float16 where it would be trained on a CPU.

    Raises:
        ConfigError: bfloat16 autocast of a CPU takes no float16 weights.
    """
    if vlm.dtype is torch.float16 and vlm.device.type == "cpu":
        raise ConfigError(
            f"{vlm.name} is in float16 on a CPU, which cannot train beside such weights. Open it "
            "with dtype='bfloat16' or 'float32', or on a GPU."
        )


def check_teacher(student: VLM, teacher: VLM) -> None:
    """Refuse a teacher that cannot teach this student.

    Raises:
        ConfigError: it is the student itself, or of another family.
    """
    if teacher is student or teacher.model is student.model:
        raise ConfigError(
            "Teacher and student are the same model. Give the model before the cut as the teacher."
        )
    if teacher.family.name != student.family.name:
        raise ConfigError(
            f"The teacher is of the family '{teacher.family.name}', the student of "
            f"'{student.family.name}'. Give the model that the student was pruned from as the "
            "teacher."
        )


def check_learnable_data(vlm: VLM, batch_size: int, data: Samples) -> None:
    """Refuse samples that training would stop at once it comes to them.

    Raises:
        ConfigError: batches of one sample, where the loss tells samples of a batch apart.
        DataError: a sample without an answer, or with images that the model cannot take.
    """
    check_compares(vlm, batch_size, len(data))
    problems: list[str] = []
    for sample in data:
        try:
            check_learnable(sample, vlm.family.objective)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(
            f"{data.source}: {len(problems)} of {len(data)} samples cannot be trained on. "
            f"{' '.join(problems[:3])}"
        )


def check_validation(settings: HealSettings, teacher: VLM | None, validation: Samples) -> None:
    """Refuse validation samples with nothing to judge predictions by.

    Raises:
        ConfigError: samples of both kinds, only the divergence from a teacher counts and there is
            none, no predictions count, or there are gates.
    """
    share = settings.validation_fraction
    if validation and share:
        raise ConfigError(
            f"There are {len(validation)} validation samples, and validation_fraction is "
            f"{share:g}. Give one of them."
        )
    if not (validation or share):
        return
    if settings.gates != "none":
        raise ConfigError(
            f"There are validation samples and gates is {settings.gates!r}, but gates that stop "
            "half way are neither open nor closed. Leave validation out."
        )
    if not settings.ce_weight and not settings.kl_weight:
        raise ConfigError(
            "There are validation samples, but ce_weight and kl_weight are 0, so nothing says "
            "which predictions are better. Set one above 0, or leave validation out."
        )
    if not settings.ce_weight and teacher is None:
        raise ConfigError(
            "There are validation samples and ce_weight is 0, so only the divergence from a "
            "teacher can say which predictions are better, but healing is without a teacher. Give "
            "one, or set ce_weight above 0."
        )


def inputs_of(
    student: VLM,
    teacher: VLM | None,
    plan: Plan,
    data: Samples,
    validation: Samples,
) -> dict[str, str]:
    """Return the fingerprints of what a run starts from."""
    inputs = {
        "plan": plan.fingerprint,
        "data": data.fingerprint,
        "student": student.fingerprint,
    }
    if student.record is not None:
        # what it was cut from and fitted to
        inputs["cut"] = sha256_of(student.record.inputs)
    if validation:
        inputs["validation"] = validation.fingerprint
    if teacher is not None:
        inputs["teacher"] = teacher.fingerprint
    return inputs


def identity_of(
    inputs: dict[str, str], settings: HealSettings, num_samples: int, models: Sequence[VLM | None]
) -> dict[str, Any]:
    """Return what must be the same for a run to be continued.

    Args:
        inputs: from `inputs_of`.
        settings: of the run.
        num_samples: samples of the whole run, repeats counted.
        models: the student and its teacher, whose fingerprints are alike in every precision.
    """
    bound = {key: value for key, value in settings.to_dict().items() if key not in FREE_SETTINGS}
    return {
        **inputs,
        "settings": bound,
        "num_processes": world_size(),
        "num_samples": num_samples,
        "dtypes": [str(vlm.dtype) for vlm in models if vlm is not None],
    }
