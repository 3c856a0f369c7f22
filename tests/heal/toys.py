"""A tiny teacher, the student pruned from it, and batches made without a processor."""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING, Any

import torch
from tiny import PAD, TINY, tiny_inputs

from interlace.config import HealSettings
from interlace.data.samples import Sample, Turn
from interlace.heal.anchors import find_anchors, tuned_parameters
from interlace.heal.model import HealModel
from interlace.heal.shell import make_shell
from interlace.models.handle import VLM
from interlace.models.registry import family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

IGNORED = -100


def toy_plan(**depths: int) -> Plan:
    """Layer 1 is dropped, 2 tuned, 3 an anchor, in every tower named."""
    towers = {
        name: TowerPlan(num_layers=depth, drop=(1,), tune=(2,), freeze=(3,))
        for name, depth in depths.items()
    }
    return Plan(towers=towers)


def toy(
    name: str,
    towers: Collection[str] = ("text",),
    dtype: torch.dtype = torch.float32,
    depth: int = 5,
) -> tuple[VLM, VLM]:
    """A teacher of one of the tiny families, and its student."""
    model = TINY[name](text=depth, vision=5).to(dtype)
    teacher = VLM(model, family_of(model))
    if name == "blip_vqa":
        towers = {*towers, "text_encoder"}
    depths = {tower: teacher.towers[tower].num_layers for tower in towers}
    return teacher, prune(teacher, toy_plan(**depths), allow_pinned=True)


def toy_samples(count: int) -> list[Sample]:
    turns = (Turn("user", "?"), Turn("assistant", "!"))
    return [Sample(id=str(i), task="vqa", images=(), turns=turns) for i in range(count)]


def toy_collate(name: str, model: Any) -> Callable[[Sequence[Sample]], dict[str, torch.Tensor]]:
    """Batches whose rows depend on the sample alone, of unequal length, the answer at the end."""

    def one(number: int) -> dict[str, torch.Tensor]:
        row = tiny_inputs(name, model, 1, seed=number)
        if name not in ("blip_vqa", "blip2_t5", "clip", "siglip", "siglip2"):
            short = row["input_ids"].shape[1] - number % 3
            for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if key in row:
                    row[key] = row[key][:, :short]
            row["labels"] = row["input_ids"].clone()
            row["labels"][:, : -3 - number % 2] = IGNORED
        return row

    def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        rows = [one(int(sample.id)) for sample in samples]
        batch = {}
        for key in rows[0]:
            parts = [row[key] for row in rows]
            if key.endswith(("ids", "mask", "labels")) and parts[0].dim() == 2:
                width = max(part.shape[1] for part in parts)
                fill = IGNORED if key == "labels" else PAD
                parts = [
                    torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill)
                    for part in parts
                ]
            batch[key] = torch.cat(parts)
        return batch

    return collate


def heal_model(student: VLM, teacher: VLM | None, **settings: Any) -> HealModel:
    """Student and teacher as they train, without a trainer."""
    assert student.plan is not None
    extra: dict[str, Any] = {}
    if teacher is not None:
        extra = {
            "teacher": make_shell(teacher.model),
            "teacher_paths": {name: tower.path for name, tower in teacher.towers.items()},
            "anchors": find_anchors(student, teacher, student.plan),
        }
    return HealModel(
        make_shell(student.model, own=tuned_parameters(student, student.plan)),
        objective=student.family.objective,
        settings=HealSettings(**settings),
        paths={name: tower.path for name, tower in student.towers.items()},
        **extra,
    )


def start_child(target: Callable[..., None], *args: Any, **environment: str) -> Any:
    """Run a function in a forked process with one thread, as a worker of a launcher would.

    A fork saves the seconds that a fresh process spends on imports. Its exit code tells the end.
    """

    def work() -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)
        target(*args)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def run_child(target: Callable[..., None], *args: Any) -> int | None:
    """Run a function in a forked process to its end and return the exit code."""
    child = start_child(target, *args)
    child.join()
    code: int | None = child.exitcode
    return code
