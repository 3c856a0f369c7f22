"""What the retention benchmarks measure on: the bundled models, their data and their figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import interlace as il
from interlace.bundled.train import PHASES


@dataclass(frozen=True)
class Subject:
    """A bundled model, the towers that are pruned, and what it is measured on.

    Attributes:
        name: of the bundled model.
        towers: that are pruned.
        tasks: task -> the metrics that count, each 0..1 or more, higher is better.
        longest: task -> longest answer in tokens; a little longer than the longest right one, so
            that a broken model is not listened to for long.
        data_tasks: tasks of the scenes to calibrate and heal with.
        chat_tasks: tasks of the scenes that are nearest to those it was trained on.
        objective: of the loss, see `interlace.data.collate.Collator`.
        learning_rate: of healing.
    """

    name: str
    towers: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    longest: dict[str, int]
    data_tasks: tuple[str, ...]
    chat_tasks: tuple[str, ...]
    objective: str
    learning_rate: float


SUBJECTS = {
    "qwen3-vl": Subject(
        "qwen3-vl",
        ("text",),
        {"vqa": ("accuracy",), "caption": ("cider",)},
        {"vqa": 8, "caption": 56},
        ("vqa", "caption"),
        ("chat", "chat", "chat", "caption"),
        "chat",
        5e-4,
    ),
    "clip": Subject(
        "clip",
        ("text", "vision"),
        {"retrieval": ("image_to_text_r1", "text_to_image_r1")},
        {},
        ("retrieval",),
        ("retrieval",),
        "contrastive",
        5e-4,
    ),
    "blip": Subject(
        "blip",
        ("text",),
        {"caption": ("cider", "exact_match")},
        {"caption": 56},
        ("caption",),
        ("caption",),
        "caption",
        5e-4,
    ),
}


def trained_on(subject: Subject) -> int:
    """Return how many scenes a bundled model was trained on."""
    return sum(phase.steps * phase.batch_size for phase in PHASES[subject.name])


def open_subject(name: str, device: str | None = None) -> Any:
    """Open a bundled model in fp32, on the CPU unless a device is named."""
    return il.open_model(f"bundled:{name}", dtype="float32", device=device or "cpu")


def train_samples(subject: Subject, vlm: Any, seed: int, number: int, count: float) -> Any:
    """Draw training scenes: number 0 to calibrate, 1 to heal; none are shared between seeds.

    A `count` below 1 is a share of the scenes that the model was trained on, in their own form.
    """
    share = count < 1
    return il.samples(
        "scenes",
        count=round(count * trained_on(subject)) if share else int(count),
        tasks=subject.chat_tasks if share else subject.data_tasks,
        seed=1000 * (seed + 1) + number,
        processor=vlm.processor,
    )


def test_samples(subject: Subject, vlm: Any, count: int) -> dict[str, Any]:
    """Return the held-out scenes of every task, the same for all seeds."""
    return {
        task: il.samples(
            "scenes", count=count, tasks=(task,), split="test", processor=vlm.processor
        )
        for task in subject.tasks
    }


def measure(subject: Subject, vlm: Any, test: dict[str, Any]) -> dict[str, float]:
    """Return "task/metric" -> value of a model on held-out scenes."""
    found = {}
    for task, names in subject.tasks.items():
        report = il.evaluate(
            vlm,
            tasks=(task,),
            data=test[task],
            batch_size=256,
            max_new_tokens=subject.longest.get(task, 1),
        )
        found |= {f"{task}/{name}": report.metrics[task][name] for name in names}
    return found
