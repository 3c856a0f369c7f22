"""Which task can be done by which model on which samples, checked before any work is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interlace.data.collate import processor_of
from interlace.data.given import as_samples
from interlace.data.sample_texts import check_num_images
from interlace.data.samples import Sample, samples, scenes_tasks
from interlace.data.schemas import as_task
from interlace.errors import ConfigError, DataError, unknown_name
from interlace.evaluate import caption, retrieval, speed, vqa
from interlace.evaluate.generate import check_room, prompt_batch
from interlace.models.handle import check_one_device, check_vlm
from interlace.records import EvalReport

if TYPE_CHECKING:
    from interlace.data.samples import Samples
    from interlace.evaluate._common import Options
    from interlace.models.handle import VLM

# task -> its samples, and the fingerprint of the data set they were taken from
Chosen = dict[str, tuple[list[Sample], str]]


@dataclass(frozen=True)
class Task:
    """What a task needs and how its metrics read.

    Attributes:
        scenes: kind of model that can do it -> tasks of the built-in scenes it is measured on.
        own: whether it takes samples of its own task only; otherwise models that predict tokens
            take any sample.
        lower_is_better: metrics of which less is better.
        generates: whether the longest answer changes its metrics.
    """

    scenes: Mapping[str, tuple[str, ...]]
    own: bool = True
    lower_is_better: frozenset[str] = frozenset()
    generates: bool = False


_ANSWERS = {"chat": ("vqa", "caption"), "caption": ("caption",), "vqa": ("vqa",)}
_PAIRS = {"contrastive": ("retrieval",)}
_LOSSES = frozenset({"perplexity"})

TASK_TABLE = {
    "fidelity": Task(_ANSWERS | _PAIRS, own=False, lower_is_better=_LOSSES),
    "perplexity": Task(_ANSWERS, own=False, lower_is_better=_LOSSES),
    "vqa": Task(dict.fromkeys(("chat", "vqa", "caption"), ("vqa",)), generates=True),
    "caption": Task(dict.fromkeys(("chat", "caption"), ("caption",)), generates=True),
    "retrieval": Task(_PAIRS),
    "speed": Task(_ANSWERS | _PAIRS, own=False, lower_is_better=speed.LOWER_IS_BETTER),
}
TASKS = tuple(TASK_TABLE)
# these compare two models inside one run, so a report of an earlier run cannot stand in for one
PAIRED = ("fidelity", "speed")


def checked_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """Give the tasks without repeats; ConfigError for an unknown one or none at all."""
    if not isinstance(tasks, Iterable):
        raise ConfigError(f"tasks is {tasks!r}; name at least one of {', '.join(TASKS)}.")
    names = (tasks,) if isinstance(tasks, str) else tuple(dict.fromkeys(tasks))
    if not names:
        raise ConfigError(f"tasks is empty; name at least one of {', '.join(TASKS)}.")
    for name in names:
        if name not in TASK_TABLE:
            raise ConfigError(unknown_name("evaluation task", name, TASKS))
    return names


def check_models(vlm: VLM, baseline: VLM | EvalReport | None, names: Sequence[str]) -> None:
    """Refuse tasks that the model or its baseline cannot do, with a ConfigError in words."""
    given = [("model", vlm)]
    if baseline is not None and not isinstance(baseline, EvalReport):
        given.append(("baseline", baseline))
    for role, each in given:
        check_vlm(each, role)
        check_one_device(each, "evaluate")
        processor_of(each)
        for name in names:
            able = TASK_TABLE[name].scenes
            if each.family.objective not in able:
                kinds = ", ".join(able)
                possible = [
                    task for task in TASKS if each.family.objective in TASK_TABLE[task].scenes
                ]
                raise ConfigError(
                    f"The task {name} cannot be done by {each.name}, a {each.family.objective} "
                    f"model (family {each.family.name}); it needs one of the kinds {kinds}. "
                    f"For this model choose from {', '.join(possible)}."
                )
    if "fidelity" in names and baseline is None:
        raise ConfigError(
            "The task fidelity compares with a baseline, but none was given. Pass baseline=, the "
            "model that this one was pruned from, or use the task perplexity."
        )
    paired = [name for name in names if name in PAIRED]
    if paired and isinstance(baseline, EvalReport):
        raise ConfigError(
            f"The task {paired[0]} needs the baseline itself, not its report: it compares two "
            "models within one run. Pass the model as baseline=, or leave the task out."
        )


def default_tasks(vlm: VLM, data: Samples | None = None) -> tuple[str, ...]:
    """Return the tasks that a model is for; of given samples, those that some of them serve."""
    tasks = scenes_tasks(vlm.family.objective)
    served = tuple(task for task in tasks if any(as_task(each, (task,)) for each in data or ()))
    return served or tasks


def _serving(name: str, objective: str) -> tuple[str, ...] | None:
    """Tasks of samples that a task takes from given data; None for any."""
    task = TASK_TABLE[name]
    if not task.own and objective != "contrastive":
        return None
    return task.scenes[objective]


def given_samples(
    data: Sequence[Sample] | Mapping[str, Sequence[Sample]] | None,
) -> Samples | dict[str, Samples] | None:
    """Give what to measure on as `Samples`; an error for unknown tasks and all but samples."""
    if isinstance(data, Mapping):
        for name in data:
            if name not in TASK_TABLE:
                raise ConfigError(unknown_name("evaluation task in data", name, TASKS))
        return {name: as_samples(each, f"data for {name}") for name, each in data.items()}
    return None if data is None else as_samples(data, "data to measure on")


def choose(
    vlm: VLM,
    names: Sequence[str],
    data: Samples | Mapping[str, Samples] | None,
    *,
    count: int,
    seed: int,
    split: str,
) -> Chosen:
    """Samples of every task, and the fingerprint of the data set they were taken from."""
    if isinstance(data, Mapping):
        unused = [name for name in data if name not in names]
        if unused:
            raise ConfigError(
                f"data holds samples for {', '.join(unused)}, but the tasks are "
                f"{', '.join(names)}. Name these in tasks too, or leave them out of data."
            )
    objective = vlm.family.objective
    chosen: Chosen = {}
    for name in names:
        given = data.get(name) if isinstance(data, Mapping) else data
        if given is None:
            kinds = TASK_TABLE[name].scenes[objective]
            given = samples("scenes", count=count, seed=seed, split=split, tasks=kinds)
        wanted = _serving(name, objective)
        fitting = [item for item in (as_task(each, wanted) for each in given) if item is not None]
        if not fitting:
            found = Counter(each.task for each in given)
            listed = ", ".join(f"{number} {kind}" for kind, number in found.items()) or "none"
            raise DataError(
                f"{given.source}: no sample serves the task {name} (samples by task: {listed}; "
                f"needed: {', '.join(wanted or ('any',))}). Give data for it, as "
                f"data={{'{name}': samples(...)}}."
            )
        chosen[name] = (fitting, given.fingerprint)
    return chosen


def check_before_work(
    vlm: VLM,
    baseline: VLM | EvalReport | None,
    names: Sequence[str],
    chosen: Chosen,
    options: Options,
) -> None:
    """Find what would fail after an hour before that hour is spent."""
    for items, _ in chosen.values():
        check_num_images(items, vlm.family.objective)
    models = [vlm] if baseline is None or isinstance(baseline, EvalReport) else [vlm, baseline]
    if any(TASK_TABLE[name].generates for name in names):
        for each in models:
            check_room(each, options.max_new_tokens)
    if "caption" in names:
        caption.check_scorers()
        caption.accepted_captions([item.references for item in chosen["caption"][0]])
    if "retrieval" in names:
        retrieval.caption_pool(chosen["retrieval"][0])
    if "vqa" in names:
        vqa.check_references(chosen["vqa"][0])
        for each in models:
            if "input_ids" not in prompt_batch(each, chosen["vqa"][0][:1]):
                raise ConfigError(
                    f"The task vqa cannot be done by {each.name} (family {each.family.name}): it "
                    "describes images but takes no question. Use the task caption."
                )
    if isinstance(baseline, EvalReport):
        for name in names:
            _check_report(baseline, name, chosen[name][1], options)


def _check_report(report: EvalReport, name: str, fingerprint: str, options: Options) -> None:
    if name not in report.metrics:
        raise ConfigError(
            f"The baseline report has no task {name}; it holds {', '.join(report.metrics)}. "
            "Evaluate the baseline on it too, or pass the model as baseline=."
        )
    theirs = report.inputs.get(f"data/{name}", "")
    if theirs != fingerprint:
        raise ConfigError(
            f"The baseline report measured {name} on other data (fingerprint {theirs[:12]}..., "
            f"here {fingerprint[:12]}...). Use the same data, count and seed, or pass the model "
            "as baseline=."
        )
    limit = report.details.get("settings", {}).get("max_new_tokens")
    if TASK_TABLE[name].generates and limit != options.max_new_tokens:
        raise ConfigError(
            f"The baseline report measured {name} with max_new_tokens={limit}, here it is "
            f"{options.max_new_tokens}. Use the same value, or pass the model as baseline=."
        )
