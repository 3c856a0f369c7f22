"""`evaluate`: choose data, run tasks on a model and its baseline, and report what is retained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from interlace.errors import check_numbers
from interlace.evaluate import caption, fidelity, retrieval, speed, vqa
from interlace.evaluate._common import Options, TaskResult
from interlace.evaluate.selection import (
    TASK_TABLE,
    TASKS,
    check_before_work,
    check_models,
    checked_names,
    choose,
    given_samples,
)
from interlace.records import EvalReport, Provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interlace.data.samples import Sample, Samples
    from interlace.evaluate.selection import Chosen
    from interlace.models.handle import VLM

__all__ = ["TASKS", "evaluate", "retention"]

_MEASURES = {
    "perplexity": fidelity.perplexity,
    "vqa": vqa.measure,
    "caption": caption.measure,
    "retrieval": retrieval.measure,
}


def evaluate(
    vlm: VLM,
    *,
    tasks: Sequence[str] = ("fidelity",),
    data: Sequence[Sample] | Mapping[str, Sequence[Sample]] | None = None,
    baseline: VLM | EvalReport | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    count: int = 256,
    seed: int = 0,
    split: str = "test",
) -> EvalReport:
    """Measure a model, and what it retains of a baseline.

    Everything is greedy and deterministic, and in float32 no quality metric depends on the batch
    size; in half precision products of another shape round otherwise, and BLIP's decoder of answers
    also reads the padding of questions.

    Args:
        vlm: the model, from `open_model` or `prune`.
        tasks: any of "fidelity" (distance from the baseline, which must be a model),
            "perplexity" (of the right answers), "vqa" (accuracy), "caption" (CIDEr, BLEU, exact
            match), "retrieval" (R@1, R@5, R@10 both ways) and "speed".
        data: what to measure on: samples for all tasks, of which each takes what it can use; or
            task -> samples; or None for scenes of the built-in data set.
        baseline: the model to compare with, measured in the same call on the same data, or the
            report of an earlier call on the same data.
        batch_size: samples per batch, at least 1.
        max_new_tokens: longest answer or caption in tokens, at least 1.
        count: samples per task where `data` leaves the built-in scenes to be used, at least 1.
        seed: which scenes those are.
        split: part of the built-in scenes they are from, "test" or "train".

    Returns:
        The report. Retention is value / baseline value, or baseline value / value where lower is
        better; it is left out where it would divide by zero.

    Raises:
        ConfigError: an unknown task, one that this kind of model cannot do, a setting out of
            range, a baseline that does not fit, or a missing package.
        DataError: no sample for a task, samples without references, values that are not finite.
    """
    names = checked_names(tasks)
    check_numbers(batch_size=batch_size, max_new_tokens=max_new_tokens, count=count)
    check_models(vlm, baseline, names)
    given = given_samples(data)
    chosen = choose(vlm, names, given, count=count, seed=seed, split=split)
    options = Options(batch_size=batch_size, max_new_tokens=max_new_tokens)
    check_before_work(vlm, baseline, names, chosen, options)
    results, base = _run(vlm, baseline, names, chosen, options)
    inputs = {"model": vlm.fingerprint}
    inputs |= {f"data/{name}": fingerprint for name, (_, fingerprint) in chosen.items()}
    details: dict[str, Any] = {name: result.details for name, result in results.items()}
    details["settings"] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "data": _data_words(given, f"{split} scenes, {count} per task, seed {seed}"),
    }
    kept = None
    if baseline is not None:
        kept = {
            name: retention(each.metrics, base[name].metrics, TASK_TABLE[name].lower_is_better)
            for name, each in results.items()
        }
        inputs["baseline"] = baseline.fingerprint
        name = baseline.model_name if isinstance(baseline, EvalReport) else baseline.name
        details["baseline"] = {"model_name": name} | {
            task: result.details for task, result in base.items()
        }
    return EvalReport(
        metrics=_metrics_of(results),
        baseline=_metrics_of(base) if baseline is not None else None,
        retention=kept,
        num_samples={name: len(items) for name, (items, _) in chosen.items()},
        details=details,
        model_name=vlm.name,
        inputs=inputs,
        provenance=Provenance.collect(seed=seed),
    )


# far above what smoothing leaves of zero, far below anything measured
_NOTHING = 1e-9


def retention(
    metrics: Mapping[str, float],
    baseline: Mapping[str, float],
    lower_is_better: frozenset[str],
) -> dict[str, float]:
    """Divide metrics by those of a baseline.

    Args:
        metrics: name -> value.
        baseline: name -> value; names that only one side has are left out.
        lower_is_better: names for which baseline / value is taken instead of value / baseline.

    Returns:
        name -> retention, 1 where nothing is lost. A division by zero is left out, and by what the
        smoothing of BLEU makes of zero.
    """
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        if name not in baseline:
            continue
        upper, lower = value, baseline[name]
        if name in lower_is_better:
            upper, lower = lower, upper
        if abs(lower) > _NOTHING:
            kept[name] = upper / lower
    return kept


def _run(
    vlm: VLM,
    baseline: VLM | EvalReport | None,
    names: Sequence[str],
    chosen: Chosen,
    options: Options,
) -> tuple[dict[str, TaskResult], dict[str, TaskResult]]:
    results: dict[str, TaskResult] = {}
    base: dict[str, TaskResult] = {}
    for name in names:
        items = chosen[name][0]
        if isinstance(baseline, EvalReport):
            results[name] = _measure_alone(name, vlm, items, options)
            base[name] = TaskResult(dict(baseline.metrics[name]))
        elif name == "fidelity" and baseline is not None:
            results[name], base[name] = fidelity.compare(vlm, baseline, items, options)
        elif name == "speed" and baseline is not None:
            results[name], base[name] = speed.measure((vlm, baseline), items, options)
        else:
            results[name] = _measure_alone(name, vlm, items, options)
            if baseline is not None:
                theirs = replace(options, whose=" (baseline)")
                base[name] = _measure_alone(name, baseline, items, theirs)
    return results, base


def _measure_alone(name: str, vlm: VLM, items: Sequence[Sample], options: Options) -> TaskResult:
    if name == "speed":
        return speed.measure((vlm,), items, options)[0]
    return _MEASURES[name](vlm, items, options)


def _metrics_of(results: Mapping[str, TaskResult]) -> dict[str, dict[str, float]]:
    return {name: result.metrics for name, result in results.items()}


def _data_words(data: Samples | Mapping[str, Samples] | None, scenes: str) -> str:
    if data is None:
        return scenes
    if isinstance(data, Mapping):
        given = ", ".join(f"{name}: {each.source}" for name, each in data.items())
        return f"{given}; otherwise {scenes}"
    return str(data.source)
