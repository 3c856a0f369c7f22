"""The main job on the bundled Qwen3-VL: four ways to the same cut, before and after healing.

Prints one table and writes one HTML page. Everything in it is measured while it runs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from interlace._files import check_new_file
from interlace._recommended import RECOMMENDED_HEAL, RECOMMENDED_PLAN, RECOMMENDED_PRUNE
from interlace.config import HealSettings
from interlace.data.samples import Samples, samples
from interlace.evaluate import evaluate
from interlace.evaluate._common import Options, TaskResult
from interlace.evaluate.speed import measure as measure_speed
from interlace.heal import heal
from interlace.models import VLM, open_model
from interlace.plan import make_plan
from interlace.progressive.loss import LOSS_SAMPLES, layer_loss
from interlace.report.html import Section, write_report
from interlace.report.plots import plan_strip, retention_chart, similarity_map
from interlace.scores import score
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path

    from interlace.records import EvalReport, HealReport, Plan, Scores

__all__ = ["run_demo"]

log = logging.getLogger(__name__)

# our own way, which also repairs the cuts; the published rule; two to compare them with
OURS = RECOMMENDED_PLAN.rule
RULES = (OURS, "interlace", "random", "consecutive")
MODEL = "bundled:qwen3-vl"
DROP_FRACTION = 0.25


@dataclass(frozen=True)
class Budget:
    """How much the demonstration measures.

    Attributes:
        calibration: samples to score with.
        held_out: samples per task to measure on.
        heal_samples: samples to heal with.
        speed_batch: samples of the batch that is timed.
        speed_rounds: how often every model is timed.
    """

    calibration: int
    held_out: int
    heal_samples: int
    speed_batch: int
    speed_rounds: int


FULL = Budget(calibration=128, held_out=256, heal_samples=1536, speed_batch=16, speed_rounds=7)
QUICK = Budget(calibration=16, held_out=32, heal_samples=64, speed_batch=8, speed_rounds=3)

BATCH_SIZE = 32
HEALING = HealSettings(batch_size=BATCH_SIZE, learning_rate=5e-4, warmup_fraction=0.1)


@dataclass(frozen=True)
class Row:
    """One rule: its plan, its healed student, and what it measured before and after healing."""

    rule: str
    plan: Plan
    student: VLM
    raw: EvalReport
    healed: EvalReport
    healing: HealReport


def _scenes(vlm: VLM, count: int, task: str, split: str, seed: int) -> Samples:
    return samples(
        "scenes", count=count, tasks=(task,), split=split, seed=seed, processor=vlm.processor
    )


def _cut(rule: str, vlm: VLM, scores: Scores, calibration: Samples) -> VLM:
    wanted: dict[str, Any] = {"drop_fraction": DROP_FRACTION, "rule": rule, "protect": "auto"}
    if rule != OURS:
        return prune(vlm, make_plan(scores, **wanted))
    weighed = RECOMMENDED_PRUNE.token_weights
    loss = layer_loss(
        vlm, calibration[:LOSS_SAMPLES], rule, batch_size=BATCH_SIZE, token_weights=weighed
    )
    return prune(
        vlm,
        make_plan(scores, loss=loss, **wanted),
        bridges=RECOMMENDED_PRUNE.bridges,
        data=calibration,
        batch_size=BATCH_SIZE,
        token_weights=weighed,
    )


def _measure_rule(
    rule: str,
    vlm: VLM,
    scores: Scores,
    calibration: Samples,
    held_out: dict[str, Samples],
    dense: EvalReport,
    budget: Budget,
) -> Row:
    student = _cut(rule, vlm, scores, calibration)
    plan = student.plan
    assert plan is not None
    log.info("%s drops layers %s", rule, ", ".join(map(str, plan["text"].drop)))
    measure: dict[str, Any] = {"tasks": tuple(held_out), "data": held_out, "baseline": dense}
    raw = evaluate(student, batch_size=64, **measure)
    healing_data = samples("scenes", count=budget.heal_samples, seed=2, processor=vlm.processor)
    settings = HEALING
    if rule == OURS:
        settings = HEALING.replace(
            hidden_weight=RECOMMENDED_HEAL.hidden_weight,
            validation_fraction=RECOMMENDED_HEAL.validation_fraction,
        )
    healing = heal(student, teacher=vlm, data=healing_data, settings=settings)
    healed = evaluate(student, batch_size=64, **measure)
    return Row(rule, plan, student, raw, healed, healing)


def _time(vlm: VLM, rows: list[Row], budget: Budget) -> list[TaskResult]:
    """Time the dense model and all students in turn in one run, so that none has a better hour."""
    return measure_speed(
        [vlm, *(row.student for row in rows)],
        _scenes(vlm, budget.speed_batch, "caption", "test", 0),
        Options(batch_size=budget.speed_batch),
        rounds=budget.speed_rounds,
    )


QUALITY = ("rule", "dropped", "VQA raw", "healed", "CIDEr raw", "healed", "kept raw", "kept healed")
COST = ("rule", "text layers", "parameters", "prefill ms", "decode tokens/s")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _kept(report: EvalReport) -> float:
    """Mean retention of VQA accuracy and CIDEr."""
    kept = report.retention or {}
    return (kept["vqa"]["accuracy"] + kept["caption"]["cider"]) / 2


def _quality(dense: EvalReport, rows: list[Row]) -> list[list[str]]:
    def vqa(report: EvalReport) -> str:
        return _percent(report.metrics["vqa"]["accuracy"])

    def cider(report: EvalReport) -> str:
        return f"{report.metrics['caption']['cider']:.2f}"

    table = [["dense", "", vqa(dense), "", cider(dense), "", _percent(1.0), ""]]
    for row in rows:
        dropped = " ".join(map(str, sorted(row.plan["text"].drop)))
        cells = [row.rule, dropped, vqa(row.raw), vqa(row.healed), cider(row.raw)]
        kept = [_percent(_kept(report)) for report in (row.raw, row.healed)]
        table.append([*cells, cider(row.healed), *kept])
    return table


def _cost(vlm: VLM, rows: list[Row], speeds: list[TaskResult]) -> list[list[str]]:
    named = [("dense", vlm), *((row.rule, row.student) for row in rows)]
    return [
        [
            name,
            str(model.towers["text"].num_layers),
            f"{model.num_parameters():,}",
            f"{1000 * speed.metrics['prefill_seconds']:.1f}",
            f"{speed.metrics['decode_tokens_per_second']:.0f}",
        ]
        for (name, model), speed in zip(named, speeds, strict=True)
    ]


def _print(title: str, header: tuple[str, ...], cells: list[list[str]]) -> None:
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 1 else "right")
    for row in cells:
        table.add_row(*row)
    console = Console()
    # no column is folded where the output is not a terminal
    (console if console.is_terminal else Console(width=110)).print(table)


def run_demo(output: Path, *, quick: bool = False) -> Path:
    """Run the demonstration.

    Args:
        output: folder for `index.html` and the records; an earlier page there is replaced.
        quick: measure less, for a look at how it works rather than at the figures.

    Returns:
        The path of the page.

    Raises:
        InterlaceError: as the stages raise it.
    """
    page = check_new_file(output / "index.html", overwrite=True)
    budget = QUICK if quick else FULL
    vlm = open_model(MODEL, dtype="float32")
    log.info("Opened %s: %s parameters", MODEL, f"{vlm.num_parameters():,}")
    held_out = {task: _scenes(vlm, budget.held_out, task, "test", 0) for task in ("vqa", "caption")}
    dense = evaluate(vlm, tasks=tuple(held_out), data=held_out, batch_size=64)
    calibration = samples("scenes", count=budget.calibration, seed=1, processor=vlm.processor)
    scores = score(vlm, calibration, packs="all", towers=("text",), batch_size=BATCH_SIZE)
    rows = [
        _measure_rule(rule, vlm, scores, calibration, held_out, dense, budget) for rule in RULES
    ]
    quality, cost = _quality(dense, rows), _cost(vlm, rows, _time(vlm, rows, budget))
    _print(f"{DROP_FRACTION:.0%} of the text layers dropped", QUALITY, quality)
    _print("What it costs", COST, cost)

    output.mkdir(parents=True, exist_ok=True)
    scores.save(output / "scores.json")
    for row in rows:
        row.plan.save(output / f"plan-{row.rule}.json")
        row.healed.save(output / f"eval-{row.rule}.json")
    chart = {
        "before healing": {row.rule: _kept(row.raw) for row in rows},
        "after healing": {row.rule: _kept(row.healed) for row in rows},
    }
    write_report(
        page,
        title="INTERLACE on the bundled Qwen3-VL",
        sections=[
            Section(
                "What was measured",
                text=(
                    f"{DROP_FRACTION:.0%} of the {vlm.towers['text'].num_layers} text layers were "
                    f"dropped by {len(rows)} rules, and the students healed on "
                    f"{budget.heal_samples} samples. Accuracy and CIDEr are on {budget.held_out} "
                    "held-out questions and captions each; kept is the mean of their shares of the "
                    "dense model."
                ),
                table=(QUALITY, quality),
            ),
            Section("Retention", figure=retention_chart(chart)),
            Section(
                "What it costs",
                text=(
                    "All models were timed in turn in one run on this machine; medians of "
                    f"{budget.speed_rounds} rounds."
                ),
                table=(COST, cost),
            ),
            Section("Which hidden states resemble each other", figure=similarity_map(scores)),
            *[Section(f"Plan: {row.rule}", figure=plan_strip(row.plan)) for row in rows],
        ],
    )
    return page
