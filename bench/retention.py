"""How much of a model's ability every method keeps: python bench/retention.py --preset full.

For each seed, bundled model, fraction and method (`bench/methods`): make the student, measure,
heal, measure again. Methods that take bridges do so for each of `--bridges none,fold`. The preset
`bridges` compares bridges and does not heal; `ablation` shows how our own method differs without
each of its parts and with optional ones; in `parameters` a fraction is one of all parameters of the
layers, where a method can be held to it; `crowded` has harder scenes, and models trained on them;
`divergence` measures the same students by the distance of their predictions from the dense model's.
Every method is given the same calibration samples, the same healing samples, batches and steps, and
trains what it says. The seed changes the calibration samples, the healing samples and what methods
draw; the held-out samples stay the same.

One JSON line per cell [model, method, fraction, seed] is written as soon as it is known, and cells
that are there already are skipped, so a run can be stopped and continued. Seeds are the outermost
loop. `--shard 0/2` and `--shard 1/2` deal the cells out to two processes, each with an `--output`
of its own; `--merge FILES` then puts them together. `--table`, `--summary` and `--plot` show a
results file instead of running anything.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cells import Cells, read
from methods import METHODS, Case, Shared, Sizes
from methods.case import counts_of
from presets import PRESETS, Preset
from retention_chart import plot
from retention_report import summary, table
from subjects import (
    SUBJECTS,
    answers,
    diverge,
    measure,
    open_subject,
    test_samples,
    train_samples,
)

from interlace.config import HealSettings
from interlace.errors import unknown_name
from interlace.evaluate._common import Options
from interlace.evaluate.speed import measure as time_models
from interlace.surgery.bridges.names import check_bridges

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import torch

# one batch, and how much every sample of it is to write
SPEED_SAMPLES, SPEED_TOKENS = 16, 32


@dataclass(frozen=True)
class Job:
    """One cell to measure.

    Attributes:
        cell: its key.
        unit: what it belongs to; jobs of one unit are measured by one process.
        make: measures it.
        same_as: cells that would hold the same figures, since as many layers go.
    """

    cell: list[Any]
    unit: tuple[Any, ...]
    make: Callable[[], dict[str, Any]]
    same_as: tuple[list[Any], ...] = ()


class Bench:
    """Opens models and measures cells; what several cells need is made once."""

    def __init__(
        self,
        sizes: Sizes,
        device: str | None = None,
        rounds: int = 7,
        *,
        exact: bool = False,
        divergence: bool = False,
    ) -> None:
        """Say how much is measured, and where; the rest is as in `Preset`."""
        self.sizes, self.rounds, self.exact, self.divergence = sizes, rounds, exact, divergence
        self.model = functools.cache(lambda name: open_subject(name, device))
        self._test = functools.cache(self._make_test)
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}
        # of one seed at a time
        self._shared = functools.lru_cache(maxsize=len(SUBJECTS))(self._make_shared)

    def _make_test(self, name: str) -> Any:
        subject = SUBJECTS[name]
        draw = answers if self.divergence else test_samples
        return draw(subject, self.model(name), subject.held_out or self.sizes.held_out)

    def _make_shared(self, name: str, seed: int) -> Shared:
        return Shared(SUBJECTS[name], self.model(name), seed, self.sizes)

    def _measure(self, name: str, vlm: Any) -> dict[str, float]:
        if self.divergence:
            return diverge(vlm, self.model(name), self._test(name))
        return measure(SUBJECTS[name], vlm, self._test(name))

    def case(self, name: str, fraction: float, seed: int, bridges: str = "none") -> Case:
        """Return what a method is given."""
        batch = self.sizes.heal_batch
        if SUBJECTS[name].objective == "contrastive":
            batch = self.sizes.contrastive_batch or batch
        settings = HealSettings(
            epochs=1.0,
            batch_size=max(1, batch),
            learning_rate=SUBJECTS[name].learning_rate,
            warmup_fraction=0.1,
            validation_fraction=self.sizes.validation,
            seed=seed,
        )
        return Case(self._shared(name, seed), fraction, settings, bridges, self.exact)

    def dense(self, name: str) -> dict[str, Any]:
        """Measure the dense model."""
        vlm = self.model(name)
        return {"raw": self._measure(name, vlm), "parameters": vlm.num_parameters()}

    def retention(
        self, name: str, method: str, fraction: float, seed: int, bridges: str = "none"
    ) -> dict[str, Any]:
        """Measure a student before and after healing; what is known is kept."""
        cell = (name, method, fraction, seed, bridges)
        if cell not in self._known:
            self._known[cell] = self._retention(*cell)
        return self._known[cell]

    def _retention(
        self, name: str, method: str, fraction: float, seed: int, bridges: str
    ) -> dict[str, Any]:
        case = self.case(name, fraction, seed, bridges)
        chosen = METHODS[method]
        made = chosen.make(case)
        if made.same_as:
            same = self.retention(name, made.same_as, fraction, seed, bridges)
            return {**same, "note": f"the same student as `{made.same_as}`"}
        student = made.student
        found = {
            "dropped": {
                tower: list(planned.drop) for tower, planned in student.plan.towers.items()
            },
            "parameters": student.num_parameters(),
        }
        if made.healed is None:
            found["raw"] = self._measure(name, student)
        if made.note:
            found["note"] = made.note
        if self.sizes.heal_samples:
            report = made.healed or chosen.heal(case, student)
            found["heal"] = {
                "tokens": report.tokens,
                "steps": report.steps,
                "samples": report.num_samples,
                "trained_parameters": report.trainable_parameters,
            }
            if report.validation:
                found["heal"]["share"] = report.share
            found["heal_seconds"] = round(report.seconds, 1)
            found["healed"] = self._measure(name, student)
        if chosen.sparse:
            found["nonzero_parameters"] = nonzero(student.model)
        return found

    def speed(self, name: str, fraction: float, method: str = "uniform") -> dict[str, Any]:
        """Time a method's student against the dense model, in turns of one run."""
        vlm, chosen = self.model(name), METHODS[method]
        case = self.case(name, fraction, 0)
        student = chosen.make(case).student
        note = {}
        if chosen.fast is not None:
            fast = chosen.fast(student)
            student = fast or student
            note = {} if fast else {"note": "timed as it is: no faster form on this device"}
        data = train_samples(SUBJECTS[name], vlm, 0, 2, SPEED_SAMPLES)
        options = Options(batch_size=SPEED_SAMPLES, max_new_tokens=SPEED_TOKENS)
        pruned, dense = time_models((student, vlm), data, options, rounds=self.rounds)
        return {"speed": {"pruned": pruned.metrics, "dense": dense.metrics}, **note}


def nonzero(model: torch.nn.Module) -> int:
    """Count the parameters that are not zero."""
    return sum(int(each.count_nonzero()) for each in model.parameters())


def jobs_of(bench: Bench, preset: Preset, bridges: list[str], *, speed: str) -> Iterator[Job]:
    """Return all cells in the order in which they are measured.

    Args:
        bench: measures them.
        preset: models, methods, fractions, seeds.
        bridges: for the methods that take them.
        speed: "yes", "no", or "only".
    """
    for name in preset.models:
        yield Job([name, "dense"], (name, "dense"), partial(bench.dense, name))
        if speed != "no" and preset.sizes.heal_samples and preset.rounds:
            for group, (method, fractions) in _timed(preset).items():
                for fraction in fractions:
                    # the first ones had no group in their name
                    tail = [] if group == "layers" else [group]
                    yield Job(
                        [name, "speed", fraction, *tail],
                        (name, "speed"),
                        partial(bench.speed, name, fraction, method),
                    )
    if speed == "only":
        return
    by_fraction: dict[float, list[str]] = {}
    for method in preset.methods:
        for fraction in METHODS[method].fractions or preset.fractions:
            by_fraction.setdefault(fraction, []).append(method)
    for seed in preset.seeds:
        for name in preset.models:
            for fraction in sorted(by_fraction):
                for method in by_fraction[fraction]:
                    for each in bridges if METHODS[method].bridges else ["none"]:
                        # cells without bridges keep the name that they had before there were any
                        tail = [seed] if each == "none" else [seed, each]
                        yield Job(
                            [name, method, fraction, *tail],
                            (seed, name, METHODS[method].together or method),
                            partial(bench.retention, name, method, fraction, seed, each),
                            tuple(
                                [name, method, other, *tail]
                                for other in _equal(bench.model(name), name, preset, fraction)
                            ),
                        )


def _timed(preset: Preset) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Return group of equally fast methods -> the one that is timed, and its fractions."""
    groups = {"layers": ("uniform", preset.fractions)}
    for method in preset.methods:
        chosen = METHODS[method]
        groups.setdefault(chosen.timed, (method, chosen.fractions or preset.fractions))
    return groups


def _equal(vlm: Any, name: str, preset: Preset, fraction: float) -> list[float]:
    """Return the smaller fractions that come to the same numbers of layers."""
    counts = functools.partial(counts_of, SUBJECTS[name], vlm)
    alike = [f for f in preset.fractions if f < fraction and counts(f) == counts(fraction)]
    return [] if preset.exact else alike


def measure_all(jobs: Iterator[Job], cells: Cells, shard: tuple[int, int] = (0, 1)) -> None:
    """Fill the results file cell by cell.

    Args:
        jobs: all cells, in order.
        cells: the results file.
        shard: (number of this process, number of processes); units are dealt out in turn.
    """
    units: dict[tuple[Any, ...], int] = {}
    for job in jobs:
        if units.setdefault(job.unit, len(units)) % shard[1] == shard[0]:
            cells.keep(job.cell, partial(_known_or_made, job, cells))


def _known_or_made(job: Job, cells: Cells) -> dict[str, Any]:
    for other in job.same_as:
        known = cells.get(other)
        if known is not None:
            return {**known, "same_as": other[2]}
    return job.make()


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/2, the first of two")
    return int(number), int(count)


def _named(kind: str, known: Collection[str], text: str) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(unknown_name(kind, text, known))
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"MODEL is one of {', '.join(SUBJECTS)}. METHOD is one of {', '.join(METHODS)}.",
    )
    models = {"nargs": "+", "metavar": "MODEL", "type": partial(_named, "model", SUBJECTS)}
    methods = {"nargs": "+", "metavar": "METHOD", "type": partial(_named, "method", METHODS)}
    parser.add_argument("--models", **models, help="default: those of the preset")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--methods", **methods, help="default: those of the preset")
    parser.add_argument("--fractions", nargs="+", type=float, help="such as 0.25 0.5")
    parser.add_argument("--seeds", nargs="+", type=int, help="such as 0 1 2")
    parser.add_argument("--bridges", default="none", help="comma separated: none, scale, fold")
    parser.add_argument("--device", help="such as cuda; default: cpu")
    parser.add_argument(
        "--speed",
        choices=("yes", "no", "only"),
        default="yes",
        help="measure speed too; 'no' while the machine is busy, 'only' to add it later",
    )
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="I/N: this process, of N")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="add to --output")
    parser.add_argument("--table", action="store_true", help="only show what the file holds")
    parser.add_argument(
        "--summary", action="store_true", help="the same in one table, the mean of all metrics"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what the file holds")
    parser.add_argument("--highlight", **methods, default=["interlace"], help="in the chart")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the benchmark."""
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("interlace").setLevel(logging.WARNING)
    place = (given.device or "cpu").partition(":")[0]
    path = given.output or Path(f"bench/results/{place}/retention-{given.preset}.jsonl")
    preset = PRESETS[given.preset]
    chosen = {key: getattr(given, key) for key in ("models", "methods", "fractions", "seeds")}
    preset = replace(preset, **{key: tuple(value) for key, value in chosen.items() if value})
    stated = {key: getattr(preset.sizes, key) for key in Sizes.__dataclass_fields__}
    cells = Cells(path, **stated)
    for each in given.merge or ():
        cells.adopt(each)
    if not (given.table or given.summary or given.plot or given.merge):
        bridges = [each.strip() for each in given.bridges.split(",")]
        for each in bridges:
            check_bridges(each)
        bench = Bench(
            preset.sizes,
            given.device,
            preset.rounds,
            exact=preset.exact,
            divergence=preset.divergence,
        )
        jobs = jobs_of(bench, preset, bridges, speed=given.speed)
        measure_all(jobs, cells, given.shard)
    if given.plot:
        plot(read(path), given.plot, given.highlight)
    if given.summary:
        shown = summary(read(path), given.fractions)
    else:
        shown = table(read(path), preset.against, sizes=preset.exact)
    sys.stdout.write(shown + "\n")


if __name__ == "__main__":
    main()
