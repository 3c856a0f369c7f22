"""How much of a model's ability every rule keeps: python bench/retention.py [--preset small|full].

For each bundled model, rule, fraction, seed and bridge (`--bridges none,fold`): score, plan, prune,
measure, heal, measure again. The preset `bridges` compares bridges and does not heal. Every rule is
given the same calibration samples (bridges too), the same healing samples and steps, and trains the
same number of layers. The seed changes the calibration samples, the healing samples and what the
rules draw; the held-out samples stay the same. One JSON line per cell is written as soon as it is
known, and cells that are there already are skipped, so a run can be stopped and continued.

`--table` prints the Markdown table of a results file instead of running anything.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cells import Cells, read

import interlace as il
from interlace.config import HealSettings
from interlace.data.collate import Collator
from interlace.records import TowerPlan
from interlace.surgery.bridges.names import check_bridges, has_bridges

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLISHED = ("interlace", "interlace_oa", "interlace_tn", "random", "consecutive")
OTHERS = ("triplet_optimal", "shortgpt", "uidl", "last", "uniform", "sleb")


@dataclass(frozen=True)
class Subject:
    """A bundled model, the towers that are pruned, and what it is measured on."""

    name: str
    towers: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    data_tasks: tuple[str, ...]
    objective: str
    learning_rate: float


SUBJECTS = {
    "qwen3-vl": Subject(
        "qwen3-vl",
        ("text",),
        {"vqa": ("accuracy",), "caption": ("cider",)},
        ("vqa", "caption"),
        "chat",
        5e-4,
    ),
    "clip": Subject(
        "clip",
        ("text", "vision"),
        {"retrieval": ("image_to_text_r1", "text_to_image_r1")},
        ("retrieval",),
        "contrastive",
        5e-4,
    ),
    "blip": Subject(
        "blip", ("text",), {"caption": ("cider", "exact_match")}, ("caption",), "caption", 5e-4
    ),
}


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    rules: tuple[str, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    calibration: int
    # none at all: measured before healing only
    heal_samples: int
    heal_batch: int
    held_out: int


PRESETS = {
    # 0.334, since a third of 12 layers is to be 4
    "bridges": Preset(("interlace", "sleb"), (0.25, 0.334), (0,), 128, 0, 0, 128),
    "smoke": Preset(("interlace", "random", "sleb"), (0.25,), (0,), 16, 64, 16, 32),
    "small": Preset((*PUBLISHED, *OTHERS), (0.25,), (0, 1, 2), 128, 2048, 32, 384),
    "full": Preset(
        (*PUBLISHED, *OTHERS), (0.10, 0.15, 0.20, 0.25, 0.33), (0, 1, 2), 256, 4096, 32, 512
    ),
}


def _headline(subject: Subject, metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    return {
        f"{task}/{name}": metrics[task][name]
        for task, names in subject.tasks.items()
        for name in names
    }


def _loss_without(subject: Subject, vlm: Any, scores: Any, samples: list[Any]) -> Any:
    """What `sleb` chooses by: the model's own loss on calibration samples, without some layers."""
    collate = Collator(vlm.processor, subject.objective)
    batches = [collate(samples[start : start + 32]) for start in range(0, len(samples), 32)]
    options = {"return_loss": True} if subject.objective == "contrastive" else {}

    def loss(tower: str, drop: tuple[int, ...]) -> float:
        planned = TowerPlan(num_layers=vlm.towers[tower].num_layers, drop=drop)
        plan = il.Plan(towers={tower: planned}, shape=scores.shape, inputs=dict(scores.inputs))
        model = il.prune(vlm, plan).model
        with torch.no_grad():
            return statistics.fmean(float(model(**batch, **options).loss) for batch in batches)

    return loss


def _samples(subject: Subject, vlm: Any, seed: int, number: int, count: int) -> Any:
    return il.samples(
        "scenes",
        count=count,
        tasks=subject.data_tasks,
        seed=1000 * (seed + 1) + number,
        processor=vlm.processor,
    )


def _plan(
    subject: Subject, vlm: Any, rule: str, fraction: float, seed: int, calibration: Any
) -> Any:
    scores = il.score(vlm, calibration, packs="all", towers=subject.towers, batch_size=32)
    return il.make_plan(
        scores,
        drop_fraction=fraction,
        rule=rule,
        protect="auto",
        seed=seed,
        towers=subject.towers,
        loss=_loss_without(subject, vlm, scores, calibration[:64]),
    )


def _cells(
    subject: Subject, vlm: Any, rule: str, fraction: float, seed: int, preset: Preset, test: Any
) -> Callable[[str], dict[str, Any]]:
    """Give the function that measures one bridge; the first one called makes the plan for all."""
    calibration = _samples(subject, vlm, seed, 0, preset.calibration)
    plan = functools.cache(lambda: _plan(subject, vlm, rule, fraction, seed, calibration))

    def measure(student: Any) -> dict[str, float]:
        report = il.evaluate(
            student, tasks=tuple(subject.tasks), data=test, batch_size=64, max_new_tokens=56
        )
        return _headline(subject, report.metrics)

    def cell(bridges: str) -> dict[str, Any]:
        data = calibration if has_bridges(bridges) else None
        student = il.prune(vlm, plan(), bridges=bridges, data=data, batch_size=32)
        found = {
            "dropped": {name: list(tower.drop) for name, tower in plan().towers.items()},
            "parameters": student.num_parameters(),
            "raw": measure(student),
        }
        if not preset.heal_samples:
            return found
        started = time.monotonic()
        il.heal(
            student,
            teacher=vlm,
            data=_samples(subject, vlm, seed, 1, preset.heal_samples),
            settings=HealSettings(
                epochs=1.0,
                batch_size=preset.heal_batch,
                learning_rate=subject.learning_rate,
                warmup_fraction=0.1,
                seed=seed,
            ),
        )
        return {
            **found,
            "heal_seconds": round(time.monotonic() - started, 1),
            "healed": measure(student),
        }

    return cell


def _speed(subject: Subject, vlm: Any, fraction: float) -> dict[str, Any]:
    """Dense against pruned in one run; which layers go does not matter for speed."""
    calibration = il.samples("scenes", count=16, tasks=subject.data_tasks, processor=vlm.processor)
    scores = il.score(vlm, calibration, towers=subject.towers)
    plan = il.make_plan(
        scores, drop_fraction=fraction, rule="uniform", protect="auto", towers=subject.towers
    )
    report = il.evaluate(il.prune(vlm, plan), tasks=("speed",), baseline=vlm, count=64)
    return {"pruned": report.metrics["speed"], "dense": (report.baseline or {})["speed"]}


def measure_all(
    subjects: list[str], preset: Preset, path: Path, bridges: list[str], *, speed: bool = True
) -> None:
    """Fill the results file cell by cell."""
    keep = Cells(path).keep
    for name in subjects:
        subject = SUBJECTS[name]
        vlm = il.open_model(f"bundled:{name}", dtype="float32")
        test = {
            task: il.samples(
                "scenes",
                count=preset.held_out,
                tasks=(task,),
                split="test",
                processor=vlm.processor,
            )
            for task in subject.tasks
        }

        def dense(subject: Subject = subject, vlm: Any = vlm, test: Any = test) -> dict[str, Any]:
            report = il.evaluate(
                vlm, tasks=tuple(subject.tasks), data=test, batch_size=64, max_new_tokens=56
            )
            return {
                "raw": _headline(subject, report.metrics),
                "parameters": vlm.num_parameters(),
                "held_out": preset.held_out,
            }

        keep([name, "dense"], dense)
        for fraction in preset.fractions:
            if speed and preset.heal_samples:
                keep(
                    [name, "speed", fraction],
                    lambda s=subject, v=vlm, f=fraction: {"speed": _speed(s, v, f)},
                )
            for rule in preset.rules:
                for seed in preset.seeds:
                    cell = _cells(subject, vlm, rule, fraction, seed, preset, test)
                    for each in bridges:
                        key = [name, rule, fraction, seed]
                        # cells without bridges keep the name that they had before there were any
                        keep(key if each == "none" else [*key, each], partial(cell, each))


def _retention(rows: list[dict[str, Any]], metric: str, dense: float) -> str:
    """Percent of the dense model: mean before -> mean after healing, half the range over seeds."""
    done = [row for row in rows if "raw" in row]
    if not rows:
        return ""
    if not done:
        return "refused"
    before = [100 * row["raw"][metric] / dense for row in done]
    after = [100 * row["healed"][metric] / dense for row in done if "healed" in row]
    if not after:
        return f"{statistics.fmean(before):.1f}"
    spread = (max(after) - min(after)) / 2
    return f"{statistics.fmean(before):.1f} → {statistics.fmean(after):.1f} ± {spread:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table per fraction: a line per rule, a column per metric of each model."""
    dense = {row["cell"][0]: row for row in rows if row["cell"][1] == "dense"}
    columns = [(name, metric) for name, row in dense.items() for metric in row["raw"]]
    cells: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if len(row["cell"]) >= 4:
            name, rule, fraction, _, *bridges = row["cell"]
            label = " + ".join([f"`{rule}`", *bridges])
            cells.setdefault((fraction, label, name), []).append(row)
    rules = list(dict.fromkeys(rule for _, rule, _ in cells))
    lines = []
    for fraction in sorted({fraction for fraction, _, _ in cells}):
        head = " | ".join(f"{name} {metric.split('/')[1]}" for name, metric in columns)
        full = " | ".join(f"{dense[name]['raw'][metric]:.3f}" for name, metric in columns)
        lines += [
            f"| {fraction:.0%} of the layers dropped | {head} |",
            "| --- " * (len(columns) + 1) + "|",
            f"| dense | {full} |",
        ]
        for rule in rules:
            found = " | ".join(
                _retention(
                    cells.get((fraction, rule, name), []), metric, dense[name]["raw"][metric]
                )
                for name, metric in columns
            )
            lines.append(f"| {rule} | {found} |")
    return "\n".join(lines)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--no-speed", action="store_true", help="leave speed out, while the machine is busy"
    )
    rules = (*PUBLISHED, *OTHERS)
    parser.add_argument("--rules", nargs="+", choices=rules, help="default: those of the preset")
    parser.add_argument("--bridges", default="none", help="comma separated: none, scale, fold")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("interlace").setLevel(logging.WARNING)
    path = arguments.output or Path(f"bench/results/cpu/retention-{arguments.preset}.jsonl")
    preset = PRESETS[arguments.preset]
    if arguments.rules:
        preset = replace(preset, rules=tuple(arguments.rules))
    if not arguments.table:
        bridges = [each.strip() for each in arguments.bridges.split(",")]
        for each in bridges:
            check_bridges(each)
        measure_all(
            arguments.models,
            preset,
            path,
            bridges,
            speed=not arguments.no_speed,
        )
    sys.stdout.write(table(read(path)) + "\n")


if __name__ == "__main__":
    main()
