"""A tiny teacher, the student pruned from it, and batches made without a processor."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tiny import PAD, TINY, tiny_inputs
from tiny_batches import PAIRS

from interlace.config import HealSettings
from interlace.data.samples import Sample, Turn
from interlace.heal import heal
from interlace.heal.anchors import find_anchors, tuned_parameters
from interlace.heal.model import HealModel
from interlace.heal.shell import make_shell
from interlace.heal.trainer import HealTrainer
from interlace.heal.units import find_gated
from interlace.models.handle import VLM
from interlace.models.registry import family_of
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

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
        if name not in ("blip_vqa", "blip2_t5", *PAIRS):
            short = row["input_ids"].shape[1] - number % 3
            for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
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
    if "gates" in settings:
        extra["gated"] = find_gated(student, student.plan.towers, ("branches",))
    if teacher is not None:
        extra |= {
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


def gated_run(folder: Path, result: Path, kill_at: int | None, settings: dict[str, Any]) -> None:
    """Heal with random gates, from the last checkpoint where there is one; write the weights.

    The process kills itself at the beginning of step `kill_at`.
    """
    plain = HealTrainer.training_step

    def training_step(self: HealTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == kill_at:
            signal.raise_signal(signal.SIGKILL)
        return plain(self, *args, **kwargs)

    HealTrainer.training_step = training_step
    teacher, student = toy("llava")
    heal(
        student,
        teacher=teacher,
        data=toy_samples(6),
        collate=toy_collate("llava", teacher.model),
        output=folder,
        resume=folder.exists(),
        save_steps=1,
        batch_size=2,
        learning_rate=1e-2,
        gates="hard_concrete",
        **settings,
    )
    save_file({n: p.detach().clone() for n, p in student.model.named_parameters()}, result)


def assert_gated_runs_resume(folder: Path, **settings: Any) -> None:
    """Compare the weights of a whole run with those of one that was killed at step 2."""
    one, other = folder / "one.safetensors", folder / "other.safetensors"
    assert run_child(gated_run, folder / "a", one, None, settings) == 0
    assert run_child(gated_run, folder / "b", other, 2, settings) == -signal.SIGKILL
    assert run_child(gated_run, folder / "b", other, None, settings) == 0
    left, right = load_file(one), load_file(other)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def double_vlm(name: str) -> VLM:
    """A tiny model in fp64."""
    model = TINY[name]().double()
    return VLM(model, family_of(model))


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that a model gives."""
    with torch.no_grad():
        given = model(**inputs, return_dict=True)
    return [each for each in given.values() if isinstance(each, torch.Tensor)]
