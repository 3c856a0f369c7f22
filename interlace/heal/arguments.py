"""The settings of healing in the Trainer's words, and how many steps they come to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.config import HealSettings

MAX_LOGGED = 200

_SCHEDULES = {"constant": "constant_with_warmup"}


def total_samples(num_samples: int, settings: HealSettings, num_processes: int) -> int:
    """Return how many samples, repeats counted, a run over `num_samples` different ones sees."""
    if settings.max_steps is None:
        return round(settings.epochs * num_samples)
    return settings.max_steps * settings.batch_size * settings.accumulation * num_processes


def count_steps(num_samples: int, settings: HealSettings, num_processes: int) -> int:
    """Return the optimiser steps that one pass over `num_samples` takes."""
    batches = math.ceil(num_samples / settings.batch_size)
    return math.ceil(math.ceil(batches / num_processes) / settings.accumulation)


def training_arguments(
    settings: HealSettings, *, steps: int, folder: Path, save: bool, **extra: Any
) -> TrainingArguments:
    """Translate the settings of healing.

    Args:
        settings: of healing.
        steps: optimiser steps of the whole run.
        folder: for checkpoints; made if missing.
        save: write checkpoints.
        extra: further arguments of the Trainer.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES.get(settings.schedule, settings.schedule),
        # Rounded down: a warm-up starts with a rate of 0, and a short run needs every step.
        warmup_steps=int(settings.warmup_fraction * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=settings.seed,
        logging_strategy="steps",
        logging_steps=math.ceil(steps / MAX_LOGGED),
        # Our own check stops the run; the Trainer's would hide the value.
        logging_nan_inf_filter=False,
        save_strategy="steps" if save else "no",
        save_steps=settings.save_steps or steps,
        dataloader_num_workers=settings.num_workers,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        **extra,
    )
    arguments.dataloader_pin_memory = arguments.device.type == "cuda"
    # One process trains on one GPU; the Trainer would spread it over all that it sees.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
