"""heal: the verb. It checks, makes shells of both models, trains, and hands over the result."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interlace._launch import is_first_process, world_size
from interlace._progress import bar, quiet
from interlace.config import HealSettings
from interlace.data.collate import Collator
from interlace.data.given import as_samples
from interlace.data.samples import Samples
from interlace.errors import ConfigError
from interlace.heal import checkpoints, checks, start
from interlace.heal.anchors import find_anchors, plan_of, tuned_parameters
from interlace.heal.arguments import count_steps, total_samples, training_arguments
from interlace.heal.interpolation import split_off
from interlace.heal.model import HealModel
from interlace.heal.order import ShuffledRepeats
from interlace.heal.shell import HALF, hand_over, make_shell, move_together
from interlace.heal.sparsity import final_gates, fold, reported
from interlace.heal.trainer import HealTrainer
from interlace.heal.units import find_gated
from interlace.models.handle import check_compares, check_one_device, check_vlm
from interlace.records import HealReport, Provenance

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import nn
    from transformers import TrainingArguments

    from interlace.data.samples import Sample
    from interlace.heal.sparsity import Gated
    from interlace.models import VLM
    from interlace.records import Plan

    Collate = Callable[[Sequence[Sample]], dict[str, torch.Tensor]]

logger = logging.getLogger(__name__)


def heal(
    student: VLM,
    *,
    teacher: VLM | None = None,
    data: Samples | Sequence[Sample],
    validation: Samples | Sequence[Sample] | None = None,
    settings: HealSettings | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    collate: Collate | None = None,
    **overrides: Any,
) -> HealReport:
    """Train the plan's `tune` layers of a student, in place.

    All other parameters stay frozen; gates, where the settings ask for them, scale the branches,
    heads or neurons of all layers of the planned towers and end in their weights. The loss is the
    task's own (cross-entropy of the answer tokens, or the contrastive loss of CLIP and SigLIP) and,
    with a teacher, the normalised squared distance of the hidden states at the anchors and at the
    end of each pruned tower, and the divergence of the predictions. The student changes only when
    everything went well.

    Works under torchrun, accelerate launch, FSDP2 and DeepSpeed ZeRO 1 and 2; `batch_size` then
    counts per process, and each process compares the images and texts of its own batch only. Layers
    stored in half precision are trained in fp32 under bfloat16 autocast.

    Source: which layers train and the training setup (AdamW, cosine, warm-up, clipping): INTERLACE,
    arXiv 2511.19676. Distillation of the last hidden state: arXiv 2507.20749.

    Args:
        student: what `prune` returned; it carries the plan. It trains where it is, on the CPU or on
            the GPU of its process.
        teacher: the model before the cut; without one there is no distillation. Its weights are not
            changed; it is left on the training device as well.
        data: samples to train on.
        validation: samples that say how far to go, as `validation_fraction` of `HealSettings` does
            with a share of `data`; of use instead of it.
        settings: default: `HealSettings()`.
        output: folder for checkpoints, made by this call; without it none are written.
        resume: continue from the newest complete checkpoint in `output`, or start where there is
            none, which the log says. The student must be the one the run was started with, before
            healing; what was fitted to it is taken from `output`, since a GPU need not fit the same
            bits twice.
        collate: makes a batch on the CPU out of samples; default: `Collator` with the student's
            processor.
        overrides: single settings, such as `max_steps=100`.

    Returns:
        The report. Its losses hold the weighted "loss" and the terms "ce" (the task's own),
        "hidden", "kl" and "gates" before weighting, each averaged over the steps since the entry
        before.

    Raises:
        ConfigError: no plan, nothing to tune, a tower that cannot be gated, a teacher that does not
            match, an output folder that exists, or a setting that does not exist or fit.
        DataError: no samples, or a loss or weights that are not finite.
        CheckpointError: the checkpoints belong to another run, or the disk is full.
    """
    check_vlm(student, "student")
    if teacher is not None:
        check_vlm(teacher, "teacher")
    if settings is not None and not isinstance(settings, HealSettings):
        raise ConfigError(
            f"settings is a {type(settings).__name__}; give HealSettings, or single settings by "
            "name, such as max_steps=100."
        )
    samples = as_samples(data, "healing data")
    judges = Samples(()) if validation is None else as_samples(validation, "validation data")
    chosen = (settings or HealSettings()).replace(**overrides)
    plan = plan_of(student)
    names = tuned_parameters(student, plan)
    units = chosen.gate_units if chosen.gates != "none" else ()
    gated = find_gated(student, plan.towers, units)
    if collate is None:
        checks.check_learnable_data(student, chosen.batch_size, samples)
    else:
        check_compares(student, chosen.batch_size, len(samples))
    checks.check_validation(chosen, teacher, judges)
    folder = checks.output_folder(output, resume=resume)
    checks.check_device(student)
    for vlm in (student, teacher):
        if vlm is not None:
            check_one_device(vlm, "healing")
            checks.check_half(vlm)
    if teacher is not None:
        checks.check_teacher(student, teacher)
    found = checkpoints.newest(folder) if resume and folder is not None else None
    with start.restored(found[0].parent if found is not None else None, student):
        # Read before training changes the weights.
        inputs = checks.inputs_of(student, teacher, plan, samples, judges)
        seen, kept_back = split_off(samples, chosen, student.family.objective)
        total = total_samples(len(seen), chosen, world_size())
        identity = checks.identity_of(inputs, chosen, total, (student, teacher))
        if found is not None:
            checkpoints.check_identity(found[0], found[1].identity, identity)
    sizes = _sizes(student.model, names)
    judging = judges or kept_back
    if total == 0:
        logger.info("Healing is skipped: the settings ask for no steps.")
        return _report(student, chosen, inputs, sizes, None)
    collate = collate or Collator.for_model(student, seed=chosen.seed)
    steps = count_steps(total, chosen, world_size())
    with contextlib.ExitStack() as stack:
        if folder is None:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="interlace-heal-"))
        else:
            stack.callback(_remove_if_unused, folder)
        work = folder or Path(made)
        stack.enter_context(_own_randomness())
        if not is_first_process():
            stack.enter_context(quiet())
        if found is None and folder is not None and is_first_process():
            if resume:
                logger.warning(
                    "There is no whole checkpoint in %s to go on from, so healing starts from the "
                    "beginning.",
                    folder,
                )
            start.keep(folder, student)
        extra = _device_arguments(student, names, chosen)
        args = training_arguments(
            chosen, steps=steps, folder=work, save=folder is not None, **extra
        )
        advance = stack.enter_context(bar("healing", steps))
        if found is not None:
            advance(found[1].step)
        trainer = HealTrainer(
            _model(student, teacher, plan, names, gated, chosen, args),
            args,
            dataset=ShuffledRepeats(seen, total, chosen.seed),
            collate=collate,
            identity=identity,
            advance=advance,
        )
        trainer.check_samples([*seen, *(judging or ())])
        trainer.train(resume_from_checkpoint=str(found[0]) if found is not None else None)
        trainer.check_weights()
        points = trainer.interpolate(student.model.get_parameter, judging) if judging else ()
        trainer.tick()
        trained = trainer.trained_values()
        hand_over(student.model, names, trained)
        gates = final_gates(trained("gates.values"), chosen.gates) if gated else []
        fold(student.model, gated, gates)
    report = _report(student, chosen, inputs, sizes, trainer)
    report = replace(report, validation=points, **reported(gated, gates))
    if points and is_first_process():
        logger.info("The validation samples keep %.0f %% of the way.", 100 * report.share)
    return report


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep the seeding of the run away from the caller's random numbers."""
    before = checkpoints.rng_state()
    try:
        yield
    finally:
        checkpoints.set_rng_state(before)


def _remove_if_unused(folder: Path) -> None:
    # A run that failed before its first checkpoint leaves nothing behind.
    if is_first_process() and not any(folder.glob("checkpoint-*")):
        (folder / checkpoints.START).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _device_arguments(student: VLM, names: Sequence[str], settings: HealSettings) -> dict[str, Any]:
    return {
        "bf16": settings.bf16 or student.dtype in HALF,
        "use_cpu": student.device.type == "cpu",
        # Batches without images leave the other towers out.
        "ddp_find_unused_parameters": not all(
            "text" in student.towers and name.startswith(f"{student.towers['text'].path}.")
            for name in names
        ),
    }


def _model(
    student: VLM,
    teacher: VLM | None,
    plan: Plan,
    names: tuple[str, ...],
    gated: tuple[Gated, ...],
    settings: HealSettings,
    args: TrainingArguments,
) -> HealModel:
    models = [vlm.model for vlm in (student, teacher) if vlm is not None]
    move_together(models, args.device)
    shell = make_shell(student.model, own=names)
    if settings.gradient_checkpointing:
        _recompute_activations(shell)
    extra: dict[str, Any] = {}
    if teacher is not None and (settings.hidden_weight or settings.kl_weight):
        extra = {
            "teacher": make_shell(teacher.model),
            "teacher_paths": {name: tower.path for name, tower in teacher.towers.items()},
            "anchors": find_anchors(student, teacher, plan),
        }
    return HealModel(
        shell,
        objective=student.family.objective,
        settings=settings,
        paths={name: tower.path for name, tower in student.towers.items()},
        gated=gated,
        **extra,
    )


def _recompute_activations(shell: nn.Module) -> None:
    model: Any = shell
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its activations. Set gradient_checkpointing "
            "to false and lower batch_size instead."
        )
    options = {"use_reentrant": False}
    # The older name warns since the newer one exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Those of embeddings serve the other kind of recomputation, and BLIP adds to its in place.
    model.disable_input_require_grads()


def _sizes(model: nn.Module, names: tuple[str, ...]) -> tuple[int, int]:
    trained = sum(model.get_parameter(name).numel() for name in names)
    return trained, sum(parameter.numel() for parameter in model.parameters())


def _report(
    student: VLM,
    settings: HealSettings,
    inputs: dict[str, str],
    sizes: tuple[int, int],
    trainer: HealTrainer | None,
) -> HealReport:
    losses = trainer.losses() if trainer is not None else ()
    progress = trainer.progress if trainer is not None else {}
    return HealReport(
        steps=trainer.state.global_step if trainer is not None else 0,
        num_samples=int(progress.get("num_samples", 0)),
        tokens=int(progress.get("tokens", 0)),
        trainable_parameters=sizes[0],
        total_parameters=sizes[1],
        losses=losses,
        final=dict(losses[-1]) if losses else {},
        seconds=progress.get("seconds", 0.0),
        objective=student.family.objective,
        settings=settings.to_dict(),
        inputs=inputs,
        provenance=Provenance.collect(settings.seed),
    )
