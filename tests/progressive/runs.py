"""A small progressive run on the bundled CLIP, to be called or to be killed in a process."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import interlace as il
from interlace._stages import Stages
from interlace.config import (
    HealSettings,
    PlanSettings,
    ProgressiveSettings,
    PruneSettings,
    ScoreSettings,
)
from interlace.heal.trainer import HealTrainer
from interlace.progressive import checkpoint, stages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from interlace.models import VLM
    from interlace.progressive import ProgressiveResult


def clip() -> VLM:
    return il.open_model("bundled:clip", dtype="float32", device="cpu")


def small(vlm: VLM, folder: Path, **changes: Any) -> ProgressiveResult:
    """Two stages that drop 2 and 1 of the 12 text layers, healed for 2 steps each."""

    def scenes(count: int, seed: int, split: str = "train") -> Any:
        return il.samples(
            "scenes",
            count=count,
            seed=seed,
            split=split,
            tasks=("retrieval",),
            processor=vlm.processor,
        )

    heal = {"batch_size": 2, "learning_rate": 1e-3, "save_steps": 1, "gates": "hard_concrete"}
    given: dict[str, Any] = {
        "plan": PlanSettings(num_drop=3, towers=("text",)),
        "heal": HealSettings(**{**heal, **changes.pop("heal", {})}),
        "score": ScoreSettings(batch_size=8, towers=("text",)),
        "prune": PruneSettings(),
        "stages": 2,
    }
    guard = changes.pop("guard_metric", None)
    if guard is not None:
        given["settings"] = ProgressiveSettings(guard=guard)
    given["calibration"] = scenes(8, 0)
    given["healing"] = scenes(8, 1)
    given["held_out"] = scenes(24 if guard else 8, 2, "test")
    return il.progressive(vlm, output=folder, **{**given, **changes})


def _die_at_call(owner: Any, name: str, number: int, *, before: bool = True) -> None:
    plain: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        mine = calls[0] == number
        if mine and before:
            os.kill(os.getpid(), signal.SIGKILL)
        made = plain(*args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    setattr(owner, name, dying)


# where a process can be killed -> how; stages that an earlier process finished call nothing
KILLS: dict[str, Callable[[], None]] = {
    "scoring of stage 1": lambda: _die_at_call(stages, "score", 1, before=False),
    "healing of stage 1, before a checkpoint": lambda: _die_at_call(
        HealTrainer, "training_step", 1
    ),
    "writing of the student of stage 1": lambda: _die_at_call(
        checkpoint, "write_tensors", 1, before=False
    ),
    "between student and mark of stage 1": lambda: _die_at_call(Stages, "mark", 1),
    "between the stages": lambda: _die_at_call(stages, "score", 1),
    "healing of stage 2, after a checkpoint": lambda: _die_at_call(HealTrainer, "training_step", 2),
    "measuring of stage 2": lambda: _die_at_call(stages, "measure", 1),
}


def killed(vlm: VLM, folder: Path, where: str | None) -> None:
    """Run, and be killed at a place of `KILLS`."""
    if where is not None:
        KILLS[where]()
    small(vlm, folder)
