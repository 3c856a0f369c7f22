"""One cut against several stages, on equal healing tokens: python bench/staged.py.

For each bundled model, fraction, rule and number of stages, with and without gates: il.progressive,
and what the finished student keeps of the dense model on held-out scenes. A single cut is a run of
one stage, so all cells share their code, calibration samples, healing samples and steps. One JSON
line per cell is written as soon as it is known, and cells that are there already are skipped.

`--table` prints the Markdown table of a results file instead of running anything.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from cells import Cells, read
from subjects import (
    BUNDLED,
    SUBJECTS,
    Subject,
    measure,
    open_subject,
    scenes,
    test_samples,
    train_samples,
)

import interlace as il
from interlace.config import HealSettings, PlanSettings, ScoreSettings

FRACTIONS = (0.25, 0.33, 0.5)
# name -> rule, stages, gates
WAYS = {
    "one cut, interlace": ("interlace", 1, "none"),
    "one cut, sleb": ("sleb", 1, "none"),
    "3 stages, interlace": ("interlace", 3, "none"),
    "3 stages, sleb": ("sleb", 3, "none"),
    "3 stages, interlace, l1 gates": ("interlace", 3, "l1"),
    "3 stages, sleb, l1 gates": ("sleb", 3, "l1"),
    "3 stages, interlace, L0 gates": ("interlace", 3, "hard_concrete"),
}


def _cell(
    vlm: Any, name: str, fraction: float, way: str, seed: int, sizes: argparse.Namespace, test: Any
) -> dict[str, Any]:
    rule, stages, gates = WAYS[way]
    subject = SUBJECTS[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = il.progressive(
            vlm,
            calibration=train_samples(subject, vlm, seed, 0, sizes.calibration),
            healing=train_samples(subject, vlm, seed, 1, sizes.healing),
            held_out=scenes(subject, vlm, 32, subject.data_tasks, "test", seed=1),
            output=folder,
            stages=stages,
            score=ScoreSettings(batch_size=32),
            plan=PlanSettings(drop_fraction=fraction, rule=rule, towers=subject.towers, seed=seed),
            heal=HealSettings(
                batch_size=sizes.heal_batch,
                learning_rate=subject.learning_rate,
                warmup_fraction=0.1,
                seed=seed,
                gates=gates,
            ),
        )
        seconds = time.monotonic() - started
        healed = measure(subject, made.student, test)
    return {
        "gone": {tower: sorted(layers) for tower, layers in made.stages[-1].layers.items()},
        "steps": sum(stage.record.steps for stage in made.stages),
        "tokens": sum(stage.record.tokens for stage in made.stages),
        "likelihood": [round(stage.retention, 4) for stage in made.stages],
        "healed": healed,
        "seconds": round(seconds, 1),
    }


def _dense(subject: Subject, vlm: Any, test: Any) -> dict[str, Any]:
    return {"healed": measure(subject, vlm, test)}


def measure_all(names: list[str], sizes: argparse.Namespace, path: Path) -> None:
    """Fill the results file cell by cell."""
    keys = ("calibration", "healing", "heal_batch", "held_out")
    keep = Cells(path, **{key: getattr(sizes, key) for key in keys}).keep
    for name in names:
        vlm = open_subject(name)
        subject = SUBJECTS[name]
        test = test_samples(subject, vlm, sizes.held_out)

        keep([name, "dense"], partial(_dense, subject, vlm, test))
        for cell in product([name], sizes.fractions, sizes.ways, range(sizes.seeds)):
            keep(list(cell), partial(_cell, vlm, *cell, sizes, test))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, percent of the dense model: a line per way, a column per metric of each model."""
    dense = {row["cell"][0]: row["healed"] for row in rows if row["cell"][1] == "dense"}
    columns = [(name, metric) for name, metrics in dense.items() for metric in metrics]
    cells: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        if len(row["cell"]) == 4:
            name, fraction, way, _ = row["cell"]
            cells.setdefault((name, fraction, way), []).append(row)

    def shown(name: str, metric: str, fraction: float, way: str) -> str:
        found = cells.get((name, fraction, way), [])
        kept = [100 * r["healed"][metric] / dense[name][metric] for r in found if "healed" in r]
        if not kept:
            return "no plan" if found else "-"
        return f"{statistics.fmean(kept):.1f}"

    lines = []
    for fraction in sorted({fraction for _, fraction, _ in cells}):
        head = " | ".join(f"{name} {metric.split('/')[1]}" for name, metric in columns)
        lines += [
            f"| {fraction:.0%} of the layers dropped | {head} |",
            "| --- " * (len(columns) + 1) + "|",
        ]
        for way in dict.fromkeys(way for _, at, way in cells if at == fraction):
            values = " | ".join(shown(*column, fraction, way) for column in columns)
            lines.append(f"| {way} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BUNDLED, default=list(BUNDLED))
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--healing", type=int, default=256)
    parser.add_argument("--heal-batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/staged.jsonl"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("interlace").setLevel(logging.WARNING)
    if not arguments.table:
        measure_all(arguments.models, arguments, arguments.output)
    sys.stdout.write(table(read(arguments.output)) + "\n")


if __name__ == "__main__":
    main()
