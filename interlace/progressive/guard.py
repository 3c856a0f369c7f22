"""What is measured after every stage, beside the dense model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from interlace.data.samples import samples
from interlace.errors import ConfigError, unknown_name
from interlace.evaluate import evaluate
from interlace.evaluate.selection import PAIRED, TASK_TABLE
from interlace.progressive.loss import TaskLoss
from interlace.records import EvalReport, Provenance

if TYPE_CHECKING:
    from interlace.data.samples import Samples
    from interlace.models import VLM

LOSS = "loss"
_LIKELIHOOD = "likelihood"


def check_guard(guard: str, vlm: VLM) -> None:
    """Refuse a guard that cannot be measured on a model.

    Raises:
        ConfigError: it is neither "loss" nor "task/metric", or this model cannot do the task.
    """
    if guard == LOSS:
        return
    able = [
        task
        for task, each in TASK_TABLE.items()
        if task not in PAIRED and vlm.family.objective in each.scenes
    ]
    task, slash, metric = guard.partition("/")
    if not (slash and task and metric):
        raise ConfigError(
            f"The guard {guard!r} is not known. Give 'loss', or a task and its metric, such as "
            f"'vqa/accuracy'; tasks of this model: {', '.join(able)}."
        )
    if task not in able:
        raise ConfigError(unknown_name("task for the guard", task, able))


def held_out_scenes(vlm: VLM, guard: str, *, count: int, seed: int, split: str) -> Samples:
    """Return built-in scenes that a guard can be measured on.

    Args:
        vlm: the model.
        guard: what is measured.
        count: samples.
        seed: which scenes.
        split: "test" or "train".
    """
    task = "fidelity" if guard == LOSS else guard.partition("/")[0]
    tasks = TASK_TABLE[task].scenes[vlm.family.objective]
    return samples(
        "scenes", count=count, seed=seed, split=split, tasks=tasks, processor=vlm.processor
    )


def measure(
    vlm: VLM,
    guard: str,
    held_out: Samples,
    dense: EvalReport | None,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> EvalReport:
    """Measure a model.

    Args:
        vlm: the model.
        guard: "loss" or "task/metric".
        held_out: samples that it was neither scored nor healed with.
        dense: the same of the dense model; None to measure that.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer.

    Returns:
        The report; with `dense` it holds retention.

    Raises:
        ConfigError: the task has no such metric, or the dense model's is 0.
    """
    if guard != LOSS:
        task, _, metric = guard.partition("/")
        report = evaluate(
            vlm,
            tasks=(task,),
            data={task: held_out},
            baseline=dense,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
        if metric not in report.metrics[task]:
            raise ConfigError(unknown_name(f"metric of {task}", metric, report.metrics[task]))
        if dense is None and not report.metrics[task][metric]:
            raise ConfigError(
                f"The dense model has a {metric} of 0 in {task}, so nothing can be retained of "
                "it. Choose another guard, or data that the model can do something with."
            )
        return report
    loss = TaskLoss(vlm, held_out, batch_size)()
    inputs = {"model": vlm.fingerprint, "data/loss": held_out.fingerprint}
    retention = None
    if dense is not None:
        inputs["baseline"] = dense.fingerprint
        retention = {LOSS: {_LIKELIHOOD: _likelihood(loss - dense.metrics[LOSS][LOSS])}}
    return EvalReport(
        metrics={LOSS: {LOSS: loss, _LIKELIHOOD: _likelihood(loss)}},
        baseline=None if dense is None else dense.metrics,
        retention=retention,
        num_samples={LOSS: len(held_out)},
        model_name=vlm.name,
        inputs=inputs,
        provenance=Provenance.collect(),
    )


def _likelihood(loss: float) -> float:
    """Geometric mean of the likelihood of a right answer; a loss that is not a number leaves 0."""
    return 0.0 if math.isnan(loss) else math.exp(min(-loss, 700.0))


def retention_of(report: EvalReport, guard: str) -> float:
    """Return what a student retains by the guard: 1 where nothing is lost, 0 for all."""
    task, _, metric = (LOSS, "/", _LIKELIHOOD) if guard == LOSS else guard.partition("/")
    # a student that is so lost that its metric cannot be divided by retains nothing
    return (report.retention or {}).get(task, {}).get(metric, 0.0)
